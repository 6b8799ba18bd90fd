"""The files of a run of adapters: trained factors in the layouts of other programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.family import Model
from sdjax.formats.adapters.layers import DORA, Adapter, AdapterLayer
from sdjax.formats.adapters.reading import DIFFUSERS_FILE
from sdjax.formats.adapters.writing import is_of_peft, write_diffusers_adapter, write_kohya_adapter
from sdjax.models.adapters import networks as adapters
from sdjax.models.adapters.factors import Rule
from sdjax.models.stacked_paths import block_paths, leading_axes
from sdjax.system import paths, text_files

FOLDER = "adapter"  # in a workdir


def adapter_of(model: Model, trained: Mapping[str, np.ndarray]) -> Adapter:
    """Return what a run has trained, module by module.

    Args:
        model: with the change of the run; its parameters are not read.
        trained: {path: array} of the factors.
    """
    networks = bind(model)
    found: Adapter = {}
    for name in networks.configs:
        network = networks.module(name, networks.abstract)
        for path, layer in adapters.layers(network):
            if layer.adapter is not None:
                stem = f"{name}.{path}"
                found |= _blocks(stem, layer.adapter.rule, _factors(stem, trained))
    return found


def export(
    model: Model, trained: Mapping[str, np.ndarray], folder: paths.Path
) -> dict[str, paths.Path | str]:
    """Write DIR/adapter: one file for diffusers and one for A1111 and ComfyUI; see `Export`."""
    adapter = adapter_of(model, trained)
    plain = dataclasses.replace(model, changes=())
    own = folder / FOLDER
    paths.make_folder(own)
    written: dict[str, paths.Path | str] = {}
    notes = []
    if is_of_peft(adapter):
        notes += write_diffusers_adapter(own, plain, adapter)
        written["diffusers"] = own / DIFFUSERS_FILE
    else:
        notes.append(
            "diffusers reads no LoHa, no LoKr and no Tucker's form: there is no file for it"
        )
    file = own / f"{paths.absolute(folder).name or FOLDER}.safetensors"
    notes += write_kohya_adapter(file, plain, adapter, _about(folder))
    written["kohya"] = file
    return written | ({"note": "\n               ".join(notes)} if notes else {})


def _factors(stem: str, trained: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    prefix = stem + adapters.MARK
    return {path[len(prefix) :]: v for path, v in trained.items() if path.startswith(prefix)}


def _blocks(
    stem: str, rule: Rule, factors: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, AdapterLayer]]:
    """(path of a module, its change) of a layer, or of each block that is stacked in it."""
    if not leading_axes(stem):
        yield stem, _layer(rule, factors)
        return
    for i, path in enumerate(block_paths(stem)):
        yield path, _layer(rule, {name: value[i] for name, value in factors.items()})


def _layer(rule: Rule, factors: Mapping[str, np.ndarray]) -> AdapterLayer:
    """One module's change, in torch's layout and under LyCORIS's names."""
    f = {name: np.asarray(value, np.float32) for name, value in factors.items()}
    found: dict[str, np.ndarray]
    if rule.kind in ("lora", "dora"):
        ones = (1,) * (f["A"].ndim - 2)
        found = {"lora_down": _kernel(f["A"]), "lora_up": f["B"].T.reshape(*f["B"].T.shape, *ones)}
        if "C" in f:
            found["lora_mid"] = _kernel(f["C"])
        if rule.kind == "dora":
            found[DORA] = f["magnitude"].reshape(-1, 1, *ones)
    elif rule.kind == "loha":
        found = {**_pair(f, "1", "hada_w1", "hada_t1"), **_pair(f, "2", "hada_w2", "hada_t2")}
    elif "w2" in f:
        found = {"lokr_w1": f["w1"].T, "lokr_w2": _kernel(f["w2"])}
    else:
        found = {"lokr_w1": f["w1"].T, **_pair(f, "2", "lokr_w2", "lokr_t2")}
    scale = 1.0 if "w2" in f else rule.scale
    return AdapterLayer(rule.kind, {k: np.ascontiguousarray(v) for k, v in found.items()}, scale)


def _pair(
    factors: Mapping[str, np.ndarray], number: str, name: str, core: str
) -> dict[str, np.ndarray]:
    """The two factors of a matrix; in Tucker's form three, and then [r, out] and [r, in]."""
    a, b = factors[f"A{number}"], factors[f"B{number}"]
    if f"C{number}" in factors:
        return {f"{name}_a": b, f"{name}_b": _rows(a), core: _kernel(factors[f"C{number}"])}
    return {f"{name}_a": b.T, f"{name}_b": _rows(a)}


def _kernel(value: np.ndarray) -> np.ndarray:
    """[in, r] -> [r, in], or [kh, kw, in, r] -> [r, in, kh, kw]."""
    return value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1)


def _rows(value: np.ndarray) -> np.ndarray:
    """[in, r] or [kh, kw, in, r] -> [r, in * kh * kw]."""
    return _kernel(value).reshape(value.shape[-1], -1)


def _about(folder: paths.Path) -> dict[str, Any]:
    """Metadata of kohya's trainer and of modelspec that say how a run was trained."""
    about = {
        "ss_output_name": folder.name,
        "ss_training_finished_at": str(datetime.now(UTC).timestamp()),
        "modelspec.title": folder.name,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        run = text_files.read_json(folder / "config.json")
    except (OSError, ValueError, UserError):
        return about  # the factors are worth more than what is said of them
    optim, train, objective = run["optim"], run["train"], run["objective"]
    snr = objective["min_snr_gamma"] if objective["weighting"] == "min_snr" else None
    return {
        **about,
        "ss_learning_rate": optim["learning_rate"],
        "ss_optimizer": optim["name"],
        "ss_lr_scheduler": optim["schedule"],
        "ss_max_train_steps": train["steps"],
        "ss_seed": run["seed"],
        "ss_sd_model_name": run["init_from"],
        "ss_noise_offset": objective["offset_noise"],
        "ss_min_snr_gamma": snr,
    }
