"""Writing single-file checkpoints; see `single_file` for what they are."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from sdjax.data.text.tokenizer import Tokenizer
from sdjax.data.text.tokenizers import KINDS
from sdjax.families.family import Model
from sdjax.families.single_file import Shapes, SingleFile, to_file
from sdjax.formats.folders import ModelError, scheduler_file
from sdjax.formats.single_file import METADATA
from sdjax.formats.weight_files import cast
from sdjax.models.weights import WeightsError, save_file, to_diffusers, weight_name
from sdjax.system import paths


def write_single_file(
    file: paths.PathLike, model: Model, *, dtype: str = "float32", overwrite: bool = False
) -> list[str]:
    """Writes a pipeline, or an autoencoder alone, as one `.safetensors`.

    Args:
        file: to write; appears under its name only once it is complete.
        model: all networks of a pipeline with its schedule; or a VAE.
        dtype: of the weights: float32, bfloat16 or float16.
        overwrite: replace a file that is there.

    Returns:
        What readers of the file will not know, as lines for the user.

    Raises:
        ModelError: something is missing, has no place in such a file, or overflows in `dtype`.
        OSError: the disk's own error; nothing is left behind.
    """
    file = paths.to_path(file)
    _check_target(file, overwrite)
    for tokenizer in model.tokenizers.values():
        if isinstance(tokenizer, Tokenizer) and (words := tokenizer.added_words):
            raise ModelError(
                f"{file}: a single file has no tokenizer, and the model has learnt {words[0]!r}: "
                "write a diffusers folder, or take the files in embedding/ of the run"
            )
    layout, prefixes = _layout(file, model)
    tensors: dict[str, np.ndarray] = {}
    lines: list[str] = []
    try:
        for name, config in model.networks.items():
            own: dict[str, np.ndarray] = {}
            for path, value in model.component(name).items():
                where = f"{name}: {weight_name(path)}"
                own |= to_diffusers({path: cast(where, value, dtype)})
            places = layout.networks[name].places(config)
            laid = to_file(own, places)
            tensors |= {prefixes[name] + key: value for key, value in laid.items()}
            lines += [
                f"{name}.{key} is not the one that other programs assume; they draw other pictures"
                for key in own
                if places(key).default is not None and places(key).name in laid
            ]
    except WeightsError as error:
        raise ModelError(f"{file}: {error}") from error
    if model.schedule is not None and layout.marks is not None:
        marks = layout.marks(model.schedule, model.prediction_type)
        tensors |= {name: np.zeros(0, np.float32) for name in marks}
    save_file(tensors, file, metadata={METADATA: json.dumps(_header(model))})
    shapes = {name: value.shape for name, value in tensors.items()}
    return lines + _warnings(model, layout, shapes)


def _check_target(file: paths.Path, overwrite: bool) -> None:
    if paths.exists(file) and (file.is_dir() or not overwrite):
        raise ModelError(
            f"{file} is there already; choose another name"
            + ("" if file.is_dir() else ", or --force to replace it")
        )
    if file.suffix != ".safetensors":
        raise ModelError(f"{file}: expected a name that ends in .safetensors")
    paths.make_folder(file.parent)


def _layout(file: paths.Path, model: Model) -> tuple[SingleFile, dict[str, str]]:
    """(layout that a model is written in, {network: its prefix})."""
    family, names = model.family, list(model.networks)
    alone = [
        layout
        for layout in reversed(family.single_files)
        if len(names) == 1 and names[0] in layout.networks
        if "" in layout.networks[names[0]].prefixes
    ]
    if alone:
        layout, prefixes = alone[0], {names[0]: ""}
    else:
        if not family.single_files:
            raise ModelError(f"{file}: {family.title} has no single files; write a folder")
        partial = family.denoiser in names and all(f.partial for f in family.single_files)
        if (missing := model.missing()) and not (partial and "schedule" not in missing):
            raise ModelError(
                f"{file}: a single file holds a VAE or a whole pipeline; {', '.join(missing)} "
                "missing"
            )
        name = family.single_file(model)
        layout = next(layout for layout in family.single_files if layout.name == name)
        prefixes = {name: layout.networks[name].prefixes[0] for name in names}
    if model.schedule is not None and model.prediction_type not in layout.predictions:
        raise ModelError(
            f"{file}: prediction_type is {model.prediction_type!r}; who reads single files of "
            f"{family.title} takes {' or '.join(layout.predictions)}. Write a diffusers folder "
            "instead"
        )
    return layout, prefixes


def _header(model: Model) -> dict[str, Any]:
    """Return the header that makes `read_single_file` exact: configs, schedule and settings."""
    header: dict[str, Any] = {n: config.to_json() for n, config in model.networks.items()}
    if model.schedule is not None:
        header["schedule"] = dataclasses.asdict(model.schedule)
        header["prediction_type"] = model.prediction_type
        header["family"] = model.family.name
        header["settings"] = dict(model.settings)
        if model.schedule.snr_scale == 1.0:  # which no scheduler file says
            header["scheduler"] = scheduler_file(model)
    return header


def _warnings(model: Model, layout: SingleFile, shapes: Shapes) -> list[str]:
    """Return a line for each thing that readers of single files do not expect."""
    lines = []
    for name, config in model.text_encoders.items():
        expected = layout.networks[name].vocabulary
        kind = KINDS[model.family.parts[name].tokenizer_kind].title
        if expected and config.vocab_size != expected:
            lines.append(
                f"{name} has {config.vocab_size:,} tokens: A1111 and ComfyUI tokenise with "
                f"{kind}'s {expected:,} and cannot draw with it; sdjax can"
            )
    if model.schedule is not None:
        schedule, prediction = layout.objective(shapes)
        if model.schedule != schedule:
            lines.append(
                f"the noise schedule is not that of {model.family.title}, which A1111 and ComfyUI "
                "assume"
            )
        if model.prediction_type not in (prediction, "epsilon"):
            lines.append(
                "v-prediction: A1111 wants a .yaml of the same name beside the file that says so; "
                "ComfyUI a ModelSamplingDiscrete node"
            )
    return lines
