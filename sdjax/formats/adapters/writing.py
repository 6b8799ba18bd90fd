"""Writing adapters as diffusers and PEFT read them, and as kohya's trainer writes them.

    diffusers  FOLDER/pytorch_lora_weights.safetensors: NETWORK.PATH.lora_A.weight, .lora_B.weight
    kohya      NAME.safetensors: PREFIX_PATH_WITH_UNDERSCORES.lora_down.weight, .lora_up.weight,
               .alpha; read by A1111, ComfyUI and diffusers

The first has s in `lora_B`, so that alpha is the rank and a reader that ignores metadata is right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.families.family import Model, said_task
from sdjax.formats.adapters import peft_metadata
from sdjax.formats.adapters.fused import join_layers
from sdjax.formats.adapters.layers import BIAS, DORA, Adapter, AdapterLayer, per_input
from sdjax.formats.adapters.reading import DIFFUSERS_FILE, TASK
from sdjax.formats.adapters.spellings import (
    Module,
    in_transformers,
    kohya_prefixes,
    modules_of,
    native_targets,
    own_target,
)
from sdjax.formats.folders import ModelError
from sdjax.formats.weight_files import cast
from sdjax.models.weights import WeightsError, save_file
from sdjax.system import paths

_MERGE = "merge the adapter into its model instead (sdjax.convert --lora)"


def write_diffusers_adapter(
    target: paths.PathLike, model: Model, adapter: Adapter, *, dtype: str = "float32"
) -> list[str]:
    """Writes an adapter for `load_lora_weights` of diffusers; replaces a file that is there.

    Args:
        target: a folder, for pytorch_lora_weights.safetensors in it, or a .safetensors file.
        model: gives the names; its parameters are not read.
        dtype: of the tensors: float32, float16 or bfloat16.

    Returns:
        What readers do otherwise, as lines for the user.

    Raises:
        ModelError: diffusers cannot read such an adapter, or values overflow in `dtype`.
    """
    file = _file(target, DIFFUSERS_FILE)
    _check(file, adapter, modules_of(model))
    biased = {_network(path) for path, layer in adapter.items() if BIAS in layer.factors}
    dora = {_network(path) for path, layer in adapter.items() if layer.kind == "dora"}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, dict[str, int]] = {}
    for path, layer in adapter.items():
        network, name = _network(path), path.partition(".")[2]
        if problem := _no_peft(layer, network in dora):
            raise ModelError(f"{file}: {path}: {problem}")
        ranks.setdefault(network, {})[name] = layer.rank
        stem = f"{network}.{in_transformers(model.family.parts[network], name)}"
        up = layer.factors["lora_up"]
        tensors[f"{stem}.lora_A.weight"] = layer.factors["lora_down"]
        tensors[f"{stem}.lora_B.weight"] = up * np.float32(layer.scale)
        if network in biased:
            none = np.zeros(len(up), np.float32)
            tensors[f"{stem}.lora_B.bias"] = layer.factors.get(BIAS, none)
        if layer.kind == "dora":
            magnitude = layer.factors[DORA].reshape(-1)
            conv = (1, -1, *(1,) * (up.ndim - 2)) if up.ndim > 2 else (-1,)
            # transformers wants the last word for its networks, and diffusers does not write it.
            end = ".weight" if network in model.text_encoders else ""
            tensors[f"{stem}.lora_magnitude_vector{end}"] = magnitude.reshape(conv)
    encoders = model.text_encoders
    entry = peft_metadata.written(ranks, encoders=encoders, dora=dora, bias=biased)
    _save(file, tensors, {"format": "pt", peft_metadata.ENTRY: entry, **_task(model)}, dtype)
    return _encoder_notes(model, adapter)


def write_kohya_adapter(
    file: paths.PathLike,
    model: Model,
    adapter: Adapter,
    metadata: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
) -> list[str]:
    """Writes an adapter for A1111, ComfyUI and their kin; replaces a file that is there.

    Args:
        file: to write, a .safetensors.
        model: gives the names, and what the metadata says of the base.
        metadata: {`ss_...` or `modelspec....`: value}, beside and over what follows from model and
            adapter; lists and dictionaries become JSON.
        dtype: of the tensors.

    Returns:
        What readers do otherwise, as lines for the user.

    Raises:
        ModelError: the adapter has no form there, or values overflow in `dtype`.
    """
    file = _file(file, "adapter.safetensors")
    modules = modules_of(model)
    _check(file, adapter, modules)
    tensors: dict[str, np.ndarray] = {}
    layers = _kohya_layers(file, model, adapter, modules)
    alpha = _common([layer.alpha for layer in layers.values() if layer.rank] or [1.0])
    for stem, layer in layers.items():
        own = _kohya_tensors(_with_alpha(layer, alpha))
        tensors |= {f"{stem}.{key}": value for key, value in own.items()}
    said = {**_kohya_metadata(model, adapter, alpha), **_task(model), **(metadata or {})}
    _save(file, tensors, {key: _text(value) for key, value in said.items()}, dtype)
    return _encoder_notes(model, adapter) + _dora_notes(adapter)


def _file(target: paths.PathLike, name: str) -> paths.Path:
    file = paths.to_path(target)
    file = file if file.suffix == ".safetensors" else file / name
    if file.is_dir():
        raise ModelError(f"{file} is a folder; expected the name of a file")
    paths.make_folder(file.parent)
    return file


def _save(
    file: paths.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], dtype: str
) -> None:
    try:
        laid = {key: cast(key, np.asarray(value), dtype) for key, value in tensors.items()}
    except WeightsError as error:
        raise ModelError(f"{file}: {error}") from error
    save_file(laid, file, metadata=metadata)


def _check(file: paths.Path, adapter: Adapter, modules: Mapping[str, Module]) -> None:
    """ModelError if an adapter changes what the model does not have, or nothing."""
    if not adapter:
        raise ModelError(f"{file}: the adapter changes nothing; expected a module or more")
    if strange := [path for path in adapter if path not in modules]:
        raise ModelError(f"{file}: the model has no {', '.join(strange[:8])}")


def _network(path: str) -> str:
    return path.partition(".")[0]


def is_of_peft(adapter: Adapter) -> bool:
    """Whether `write_diffusers_adapter` has a place for each change of an adapter, by its kind."""
    return not any(_no_peft(layer, layer.kind == "dora") for layer in adapter.values())


def _no_peft(layer: AdapterLayer, dora: bool) -> str:
    """Return why PEFT's keys do not hold a change, or "".

    Args:
        dora: whether its network has DoRA elsewhere, which `LoraConfig` says of all its modules.
    """
    if layer.kind not in ("lora", "dora"):
        title = {"loha": "a LoHa", "lokr": "a LoKr", "full": "a whole difference"}[layer.kind]
        return f"{title}, which diffusers does not read; write --format=kohya, or {_MERGE}"
    if "lora_mid" in layer.factors:
        return f"Tucker's form, which diffusers does not read; write --format=kohya, or {_MERGE}"
    if layer.kind == "dora" and per_input(layer.factors[DORA]):
        return (
            "a DoRA with magnitudes of inputs, where PEFT has those of outputs; write "
            f"--format=kohya, or {_MERGE}"
        )
    if dora and layer.kind != "dora":
        return f"a LoRA beside DoRAs, where PEFT wants one or the other of a network; {_MERGE}"
    return ""


def _kohya_layers(
    file: paths.Path, model: Model, adapter: Adapter, modules: Mapping[str, Module]
) -> dict[str, AdapterLayer]:
    """{name of a module in the file: its change}."""
    prefixes, denoiser = kohya_prefixes(model), model.family.denoiser
    native = model.family.adapters is not None and model.family.adapters.native
    targets = native_targets(model, modules) if native else {}
    found: dict[str, AdapterLayer] = {}
    for stem, target in targets.items():
        layers = [adapter.get(path) for path in target.parts]
        if any(layers):
            try:
                joined = join_layers(layers, target, [modules[p].shape for p in target.parts])
            except ValueError as error:
                raise ModelError(f"{file}: {error}") from error
            found[f"{prefixes[denoiser]}_{stem.replace('.', '_')}"] = joined
    for path, layer in adapter.items():
        network, name = _network(path), path.partition(".")[2]
        if network != denoiser or not native:
            name = in_transformers(model.family.parts[network], name)
            found[f"{prefixes[network]}_{name.replace('.', '_')}"] = join_layers(
                [layer], own_target(path), [modules[path].shape]
            )
    return found


def _with_alpha(layer: AdapterLayer, alpha: float) -> AdapterLayer:
    """Return a LoRA with this alpha and the same change.

    Where a file has several alphas, diffusers takes the most common one for some modules of a UNet:
    it looks for the others under the names of its old files (`get_peft_kwargs`).
    """
    if layer.kind not in ("lora", "dora") or layer.alpha == alpha:
        return layer
    scale = alpha / layer.rank
    up = layer.factors["lora_up"] * np.float32(layer.scale / scale)
    return AdapterLayer(layer.kind, {**layer.factors, "lora_up": up}, scale)


def _kohya_tensors(layer: AdapterLayer) -> dict[str, np.ndarray]:
    """{part with ".weight" where kohya has it: array} of one module."""
    parts = dict(layer.factors)
    if layer.kind == "full":
        norm = parts["diff"].ndim == 1 if "diff" in parts else False
        names = {"diff": "w_norm", BIAS: "b_norm"} if norm else {}
        return {names.get(part, part): value for part, value in parts.items()}
    alpha = layer.alpha
    if layer.kind == "lokr" and not layer.rank:  # readers take s = 1 whatever alpha says
        parts["lokr_w1"] = parts["lokr_w1"] * np.float32(layer.scale)
        alpha = 1.0
    weights = ("lora_down", "lora_up", "lora_mid")
    tensors = {f"{p}.weight" if p in weights else p: value for p, value in parts.items()}
    return {**tensors, "alpha": np.asarray(alpha, np.float32)}


def _kohya_metadata(model: Model, adapter: Adapter, alpha: float) -> dict[str, Any]:
    """Return what follows from model and adapter: kohya's minimum, and modelspec's."""
    layers = list(adapter.values())
    kinds = {layer.kind for layer in layers}
    plain = kinds <= {"lora"} and not any("lora_mid" in layer.factors for layer in layers)
    ranks = [layer.rank for layer in layers if layer.rank]
    names = model.family.adapters
    facts = dict(names.facts(model)) if names else {}
    if "modelspec.architecture" in facts:
        facts["modelspec.architecture"] += "/lora"
        facts["modelspec.sai_model_spec"] = "1.0.1"
        side = "x".join(map(str, reversed(model.native_size))) if "vae" in model.networks else ""
        facts |= {"modelspec.resolution": side} if side else {}
    return {
        **facts,
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": max(ranks, key=ranks.count) if ranks else "None",
        "ss_network_alpha": alpha,
        "ss_network_args": {} if plain else {"algo": _algorithm(kinds)},
    }


def _task(model: Model) -> dict[str, str]:
    """Return the entry of metadata with the model's task, where its shape does not say it."""
    task = said_task(model)
    return {TASK: task} if task else {}


def _common(values: list[float]) -> float:
    return max(values, key=values.count)


def _algorithm(kinds: set[str]) -> str:
    return next((kind for kind in ("loha", "lokr", "full") if kind in kinds), "locon")


def _text(value: Any) -> str:
    """Return an entry of metadata as kohya's trainer has it: JSON of lists and dictionaries."""
    return json.dumps(value) if isinstance(value, dict | list | tuple) else str(value)


def _encoder_notes(model: Model, adapter: Adapter) -> list[str]:
    """Return a line where diffusers would drop a part of a CLIP's modules.

    It looks at `out_proj` for the ranks of an encoder's other modules (loaders/lora_base.py).
    """
    lines = []
    for name in model.text_encoders:
        own = [path for path in adapter if path.startswith(f"{name}.")]
        clip = [path for path in own if ".self_attn." in path or ".mlp." in path]
        if clip and not any(path.endswith(".out_proj") for path in clip):
            lines.append(
                f"{name}: no out_proj is among its modules; of a file of kohya's, diffusers then "
                "drops others without an error. Train out_proj too, or give it the diffusers file"
            )
    return lines


def _dora_notes(adapter: Adapter) -> list[str]:
    """Return a line about the readers of a DoRA in kohya's keys."""
    if not any(DORA in layer.factors for layer in adapter.values()):
        return []
    return [
        "DoRA in kohya's keys: ComfyUI and Forge divide by the norm of the base weight, where the "
        "paper has that of the changed one, and diffusers leaves dora_scale out; "
        f"--format=diffusers is exact there. For the others {_MERGE}"
    ]
