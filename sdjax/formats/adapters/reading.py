"""Reading files of adapters, of any layout, for the model that they change.

Alpha is that of the file's metadata (`lora_adapter_metadata`, or PEFT's adapter_config.json), else
of the tensors `.alpha`, else the rank. Every key belongs to a module of the model, or is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from absl import logging

from sdjax.families.adapter_names import AdapterNames
from sdjax.families.family import Model
from sdjax.formats.adapters import keys
from sdjax.formats.adapters.fused import split_layer
from sdjax.formats.adapters.layers import (
    BIAS,
    DORA,
    WHOLE,
    Adapter,
    AdapterLayer,
    delta,
    fitted,
)
from sdjax.formats.adapters.peft_metadata import PeftScales, read_scales
from sdjax.formats.adapters.recognition import family_of
from sdjax.formats.adapters.spellings import Module, Target, modules_of, spellings
from sdjax.formats.folders import ModelError
from sdjax.models.weight_checks import describe, is_finite, not_finite
from sdjax.models.weights import load_file, read_header
from sdjax.system import paths
from sdjax.system.untrusted import explained, plain

DIFFUSERS_FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
# The entry of a file's metadata with the task of models whose shape does not say it: "edit" of
# FLUX.1-Kontext, whose adapters other trainers do not tell from those of FLUX.1-dev.
TASK = "sdjax_task"
_NO_ADAPTERS = ("scheduler", "optimizer", "checkpoint")  # in names of other files of a folder
_MOST_SHOWN = 12  # lines of an error
# Parts that make a change, and without which it is half of one.
_WHOLE = {
    "lora": ("lora_down", "lora_up"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
}


def adapter_file(path: paths.PathLike) -> paths.Path:
    """Return the file of an adapter, which may be in the folder that is named.

    Raises:
        ModelError: there is none, or one has to be chosen.
    """
    path = paths.to_path(path)
    if not path.is_dir():
        if path.suffix != ".safetensors" or not paths.exists(path):
            raise ModelError(f"{path}: expected a .safetensors file of an adapter, or its folder")
        return path
    for name in (DIFFUSERS_FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix == ".safetensors")
    found = [file for file in found if not any(word in file.name for word in _NO_ADAPTERS)]
    if len(found) != 1:
        has = ", ".join(file.name for file in found[:8]) or "none"
        raise ModelError(
            f"{path}: expected {DIFFUSERS_FILE} or one .safetensors file of an adapter; it has: "
            f"{has}. Name the file"
        )
    return found[0]


def read_adapter(path: paths.PathLike, model: Model) -> Adapter:
    """Return the adapter in a file, for a model whose configs give its modules.

    Args:
        path: a .safetensors file, or a folder with one.

    Raises:
        ModelError: naming the keys that belong to no module, are half of a pair, do not fit the
            module, or are NaN or Inf.
    """
    file = adapter_file(path)
    with explained(file, "an adapter", error=ModelError):
        shapes, metadata = read_header(file)
        read = load_file(file)
        scales = read_scales(file, metadata)
        return _adapter(file, read, scales, model)


def entrance_inputs(path: paths.PathLike, model: Model) -> int:
    """Return the inputs of a file's LoRA of the layer that reads latents; 0 if it has none of it.

    Raises:
        ModelError: it cannot be read.
    """
    file, names = adapter_file(path), model.family.adapters or AdapterNames({})
    with explained(file, "an adapter", error=ModelError):
        shapes, _ = read_header(file)
    spelled = spellings(model, modules_of(model))
    layer = (f"{model.family.denoiser}.{names.entrance}",)
    for key, shape in shapes.items():
        found = keys.split(names.respelled(key))
        target = spelled.get(found[0]) if found else None
        if found and found[1] == "lora_down" and target and target.parts == layer:
            return shape[1] if len(shape) > 1 else 0
    return 0


def adapter_task(path: paths.PathLike, model: Model) -> str:
    """Return what the model that a file's adapter was trained with does with a picture, as `EDITS`.

    It is "" where that model reads none, or files do not need to say it: see `TASK`.

    Raises:
        ModelError: it cannot be read.
    """
    file = adapter_file(path)
    with explained(file, "an adapter", error=ModelError):
        task = read_header(file)[1].get(TASK, "")
    reading = model.family.readings.get(task)
    return task if reading is not None and reading.setting else ""


def _adapter(
    file: paths.Path, tensors: Mapping[str, np.ndarray], scales: PeftScales, model: Model
) -> Adapter:
    modules = modules_of(model)
    names = model.family.adapters or AdapterNames({})
    groups, problems = _grouped(tensors, names, spellings(model, modules))
    adapter: Adapter = {}
    for stem, (target, parts) in groups.items():
        try:
            for module, layer in _layers(stem, target, parts, scales, modules, names, model):
                if module in adapter:
                    raise ValueError(f"{module} is there under another name as well")
                adapter[module] = layer
        except ValueError as error:
            problems.append(f"{plain(stem)}: {error}")
    if problems:
        raise ModelError(_refusal(file, problems, model))
    if not adapter:
        raise ModelError(f"{file}: no adapter in it: it has no tensors")
    return adapter


Parts = dict[str, np.ndarray]


def _grouped(
    tensors: Mapping[str, np.ndarray], names: AdapterNames, spelled: Mapping[str, Target]
) -> tuple[dict[str, tuple[Target, Parts]], list[str]]:
    """({name of a module in the file: (its modules, {part: float32})}, what is wrong)."""
    groups: dict[str, tuple[Target, Parts]] = {}
    problems, lines, bundled = [], [], 0
    for key, value in tensors.items():
        if key.startswith(keys.BUNDLED):
            bundled += 1
            continue
        found = keys.split(names.respelled(key))
        target = spelled.get(found[0]) if found else None
        if found is None or target is None:
            problems.append(f"unknown: {plain(key)} {value.shape}")
        elif not jnp.issubdtype(value.dtype, jnp.floating):
            problems.append(f"no floats: {plain(key)} is {value.dtype}")
        elif found[1] in groups.setdefault(found[0], (target, {}))[1]:
            problems.append(f"twice: {plain(key)}")
        else:
            with np.errstate(over="ignore"):  # float64 beyond float32 is Inf, which is refused
                groups[found[0]][1][found[1]] = np.asarray(value, np.float32)
            if not is_finite(value := groups[found[0]][1][found[1]]):
                lines.append(describe(plain(key), value))
    if lines:
        problems.append(not_finite(lines, len(tensors)))
    if bundled:
        logging.warning("%d tensors of embeddings (%s*) were not read", bundled, keys.BUNDLED)
    return groups, problems


def _layers(
    stem: str,
    target: Target,
    parts: Parts,
    scales: PeftScales,
    modules: Mapping[str, Module],
    names: AdapterNames,
    model: Model,
) -> Iterable[tuple[str, AdapterLayer]]:
    """(path, change) of each module that a name stands for. ValueError if parts do not fit."""
    layer = _layer(target.parts[0], dict(parts), scales)
    if any(modules[path].bias is None for path in target.parts) and "diff_b" in layer.factors:
        raise ValueError("diff_b is of a bias, which the module does not have")
    shapes = [modules[path].shape for path in target.parts]
    if len(target.parts) == 1 and target.parts[0] == f"{model.family.denoiser}.{names.entrance}":
        layer = _with_more_inputs(layer, shapes[0])
    for path, own in split_layer(layer, target, shapes):
        yield path, fitted(own, modules[path].shape)


def _layer(module: str, parts: Parts, scales: PeftScales) -> AdapterLayer:
    """Return the record that some parts make. ValueError if they are a half, or of two kinds."""
    alpha = parts.pop(keys.ALPHA, None)
    kinds = {part.partition("_")[0] for part in parts} & {"lora", "hada", "lokr"}
    kinds |= {"lora"} if keys.PEFT_BIAS in parts or keys.PEFT_MAGNITUDE in parts else set()
    kinds |= {"diff"} if "diff" in parts or WHOLE in parts else set()
    if len(kinds) > 1:
        raise ValueError(f"expected one kind of adapter, found parts of {', '.join(sorted(kinds))}")
    if not kinds and "diff_b" not in parts:
        raise ValueError(f"has {', '.join([*parts, *(['alpha'] if alpha is not None else [])])} "
                         "alone, without the factors")  # fmt: skip
    kind = {"hada": "loha", "diff": "full"}.get(*kinds, *kinds) if kinds else "full"
    missing = [part for part in _WHOLE.get(kind, ()) if part not in parts]
    missing += _missing_of_lokr(parts) if kind == "lokr" else []
    if missing:
        raise ValueError(f"has no {', '.join(missing)} beside {', '.join(parts)}")
    if (value := parts.pop(keys.PEFT_MAGNITUDE, None)) is not None:
        ones = (1,) * (parts["lora_down"].ndim - 1)
        parts[DORA] = value.reshape(-1, *ones)
    bias = parts.pop(keys.PEFT_BIAS, None)
    kind = "dora" if kind == "lora" and DORA in parts else kind
    layer = AdapterLayer(kind, parts)
    layer = dataclasses.replace(layer, scale=_scale(module, layer, alpha, scales))
    if bias is not None:
        layer = dataclasses.replace(layer, factors={**parts, "diff_b": layer.scale * bias})
    return layer


def _missing_of_lokr(parts: Parts) -> list[str]:
    found = []
    for name in ("lokr_w1", "lokr_w2"):
        if name not in parts:
            found += [part for part in (f"{name}_a", f"{name}_b") if part not in parts]
    return found


def _scale(module: str, layer: AdapterLayer, alpha: np.ndarray | None, scales: PeftScales) -> float:
    """Return s. A LoKr of whole factors has 1 whatever alpha says, as LyCORIS and ComfyUI do."""
    if layer.kind == "full" or not layer.rank:
        return 1.0
    if (said := scales.scale(module, layer.rank)) is not None:
        return said
    if alpha is None:
        return 1.0
    if alpha.size != 1:
        raise ValueError(f"alpha is {alpha.shape}; expected one number")
    value = float(alpha.reshape(()))
    return value / layer.rank if value else 1.0  # kohya takes 0 for "as the rank"


def _with_more_inputs(layer: AdapterLayer, shape: tuple[int, ...]) -> AdapterLayer:
    """Return a change of the layer that reads latents, for a model that reads more than them.

    What a model of inpainting reads besides comes after the latents, and is not changed; A1111
    does the same. A LoRA stays one, LoHa and LoKr become whole differences.
    """
    if len(shape) not in (2, 4) or DORA in layer.factors:
        return layer  # the norms of a DoRA are those of all inputs
    for inputs in range(shape[1], 0, -1):
        try:
            narrow = fitted(layer, (shape[0], inputs, *shape[2:]))
        except ValueError:
            continue
        if inputs == shape[1] or not layer.changes_weight or WHOLE in layer.factors:
            return layer
        return _with_inputs(narrow, (shape[0], inputs, *shape[2:]), shape[1])
    return layer


def _with_inputs(layer: AdapterLayer, shape: tuple[int, ...], inputs: int) -> AdapterLayer:
    """A change of a weight of `shape`, for one of more inputs."""
    if layer.kind == "lora":
        factors = {**layer.factors, "lora_down": _padded(layer.factors["lora_down"], inputs)}
        return dataclasses.replace(layer, factors=factors)
    whole = {"diff": _padded(delta(layer).reshape(shape), inputs)}
    kept = {BIAS: layer.factors[BIAS]} if BIAS in layer.factors else {}
    return AdapterLayer("full", whole | kept)


def _padded(value: np.ndarray, inputs: int) -> np.ndarray:
    """[n, in, ...] with zeros for the inputs that it lacks."""
    rest = [(0, 0)] * (value.ndim - 2)
    return np.pad(value, [(0, 0), (0, inputs - value.shape[1]), *rest])


def _refusal(file: paths.Path, problems: list[str], model: Model) -> str:
    """The message about what is wrong with a file."""
    shown = problems[:_MOST_SHOWN]
    shown += [f"and {len(problems) - len(shown):,} more"] if len(problems) > len(shown) else []
    lines = "\n  ".join(shown)
    other = family_of(file)
    if other and other != model.family.title:
        return (
            f"{file}: an adapter of {other}, but the model is {model.family.title}; take a model "
            f"of {other}:\n  {lines}"
        )
    return f"{file}: the adapter does not fit the model, {model.family.title}:\n  {lines}"
