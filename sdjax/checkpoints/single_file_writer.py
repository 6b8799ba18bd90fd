"""Writing single-file checkpoints; see `single_file` for what they are."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from sdjax.checkpoints.folders import ModelError, scheduler_file
from sdjax.checkpoints.single_file import METADATA
from sdjax.checkpoints.single_file_layout import UNET, VAE, is_open_clip
from sdjax.checkpoints.weight_files import cast
from sdjax.families.family import Model, SingleFile
from sdjax.families.ldm_names import renamer, to_ldm
from sdjax.models.weights import WeightsError, save_file, to_diffusers, weight_name
from sdjax.system import paths

CLIP_VOCABULARY = 49408  # OpenAI CLIP, clip/simple_tokenizer.py


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
    prefixes = _prefixes(file, model)
    tensors: dict[str, np.ndarray] = {}
    try:
        for name, config in model.networks.items():
            prefix = prefixes[name]
            own: dict[str, np.ndarray] = {}
            for path, value in model.component(name).items():
                where = f"{name}: {weight_name(path)}"
                own |= to_diffusers({path: cast(where, value, dtype)})
            clip = bool(model.family.parts[name].tokens)
            rename = renamer(config, open_clip=clip and is_open_clip(prefix))
            # transformers 4, which A1111 has, keeps CLIP-L under this name.
            prefix += "text_model." if clip and not is_open_clip(prefix) else ""
            tensors |= {prefix + key: value for key, value in to_ldm(own, rename).items()}
    except WeightsError as error:
        raise ModelError(f"{file}: {error}") from error
    release = _release(model)
    if release is not None and release.marks:
        # ComfyUI (supported_models.py, SDXL.model_type) and A1111 ask whether these are there.
        marks = {
            "v_pred": model.prediction_type == "v_prediction",
            "ztsnr": bool(model.schedule and model.schedule.zero_terminal_snr),
        }
        tensors |= {name: np.zeros(0, np.float32) for name, set_ in marks.items() if set_}
    save_file(tensors, file, metadata={METADATA: json.dumps(_header(model))})
    return _warnings(model)


def _check_target(file: paths.Path, overwrite: bool) -> None:
    if paths.exists(file) and (file.is_dir() or not overwrite):
        raise ModelError(
            f"{file} is there already; choose another name"
            + ("" if file.is_dir() else ", or --force to replace it")
        )
    if file.suffix != ".safetensors":
        raise ModelError(f"{file}: expected a name that ends in .safetensors")
    paths.make_folder(file.parent)


def _prefixes(file: paths.Path, model: Model) -> dict[str, str]:
    """{network: prefix} in the layout of the family that these networks are."""
    networks = model.networks
    if list(networks) == ["vae"]:
        return {"vae": ""}
    if missing := model.missing():
        raise ModelError(
            f"{file}: a single file holds a VAE or a whole pipeline; {', '.join(missing)} missing"
        )
    if model.prediction_type not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"{file}: prediction_type is {model.prediction_type!r}; who reads single files "
            "takes a UNet to predict epsilon or v. Write a diffusers folder instead"
        )
    release = _release(model)
    assert release is not None
    return {"unet": UNET, "vae": VAE, **release.prefixes}


def _release(model: Model) -> SingleFile | None:
    """The layout that a whole model is written in; None of a VAE alone."""
    if not model.text_encoders:
        return None
    name = model.family.single_file(model)
    return next(release for release in model.family.single_files if release.name == name)


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


def _warnings(model: Model) -> list[str]:
    """Return a line for each thing that readers of single files do not expect."""
    lines = []
    for name, config in model.text_encoders.items():
        if config.vocab_size != CLIP_VOCABULARY:
            lines.append(
                f"{name} has {config.vocab_size:,} tokens: A1111 and ComfyUI tokenise with CLIP's "
                f"{CLIP_VOCABULARY:,} and cannot draw with it; sdjax can"
            )
    if model.schedule is not None:
        default = type(model.schedule)()
        release = _release(model)
        marked = release is not None and release.marks
        own = dataclasses.replace(model.schedule, zero_terminal_snr=False)
        if own != default or (model.schedule.zero_terminal_snr and not marked):
            lines.append(
                "the noise schedule is not Stable Diffusion's, which A1111 and ComfyUI assume"
            )
        if model.prediction_type != "epsilon" and not marked:
            lines.append(
                "v-prediction: A1111 wants a .yaml of the same name beside the file that says so; "
                "ComfyUI a ModelSamplingDiscrete node"
            )
    return lines
