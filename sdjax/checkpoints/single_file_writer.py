"""Writing single-file checkpoints; see `single_file` for what they are."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from sdjax.checkpoints.bundle import TOKENIZERS, Pretrained, PretrainedError
from sdjax.checkpoints.ldm_names import renamer, to_ldm
from sdjax.checkpoints.single_file import METADATA
from sdjax.checkpoints.single_file_layout import ENCODERS, UNET, VAE, is_open_clip
from sdjax.checkpoints.weight_files import cast
from sdjax.models.weights import WeightsError, save_file, to_diffusers, weight_name
from sdjax.system import paths

CLIP_VOCABULARY = 49408  # OpenAI CLIP, clip/simple_tokenizer.py


def write_single_file(
    file: paths.PathLike, pretrained: Pretrained, *, dtype: str = "float32", overwrite: bool = False
) -> list[str]:
    """Writes a pipeline, or an autoencoder alone, as one `.safetensors`.

    Args:
        file: to write; appears under its name only once it is complete.
        pretrained: all networks of a pipeline with its schedule; or a VAE.
        dtype: of the weights: float32, bfloat16 or float16.
        overwrite: replace a file that is there.

    Returns:
        What readers of the file will not know, as lines for the user.

    Raises:
        PretrainedError: something is missing, has no place in such a file, or overflows in `dtype`.
        OSError: the disk's own error; nothing is left behind.
    """
    file = paths.to_path(file)
    _check_target(file, overwrite)
    prefixes = _prefixes(file, pretrained)
    tensors: dict[str, np.ndarray] = {}
    try:
        for name, config in pretrained.networks.items():
            prefix = prefixes[name]
            own: dict[str, np.ndarray] = {}
            for path, value in pretrained.component(name).items():
                where = f"{name}: {weight_name(path)}"
                own |= to_diffusers({path: cast(where, value, dtype)})
            clip = name in TOKENIZERS
            rename = renamer(config, open_clip=clip and is_open_clip(prefix))
            # transformers 4, which A1111 has, keeps CLIP-L under this name.
            prefix += "text_model." if clip and not is_open_clip(prefix) else ""
            tensors |= {prefix + key: value for key, value in to_ldm(own, rename).items()}
    except WeightsError as error:
        raise PretrainedError(f"{file}: {error}") from error
    if pretrained.text_encoder_2 is not None:
        # ComfyUI (supported_models.py, SDXL.model_type) and A1111 ask whether these are there.
        marks = {
            "v_pred": pretrained.prediction_type == "v_prediction",
            "ztsnr": bool(pretrained.schedule and pretrained.schedule.zero_terminal_snr),
        }
        tensors |= {name: np.zeros(0, np.float32) for name, set_ in marks.items() if set_}
    save_file(tensors, file, metadata={METADATA: json.dumps(_header(pretrained))})
    return _warnings(pretrained)


def _check_target(file: paths.Path, overwrite: bool) -> None:
    if paths.exists(file) and (file.is_dir() or not overwrite):
        raise PretrainedError(
            f"{file} is there already; choose another name"
            + ("" if file.is_dir() else ", or --force to replace it")
        )
    if file.suffix != ".safetensors":
        raise PretrainedError(f"{file}: expected a name that ends in .safetensors")
    paths.make_folder(file.parent)


def _prefixes(file: paths.Path, pretrained: Pretrained) -> dict[str, str]:
    """{network: prefix} in the layout of the family that these networks are."""
    networks = pretrained.networks
    if list(networks) == ["vae"]:
        return {"vae": ""}
    if missing := pretrained.missing():
        raise PretrainedError(
            f"{file}: a single file holds a VAE or a whole pipeline; {', '.join(missing)} missing"
        )
    if pretrained.prediction_type not in ("epsilon", "v_prediction"):
        raise PretrainedError(
            f"{file}: prediction_type is {pretrained.prediction_type!r}; who reads single files "
            "takes a UNet to predict epsilon or v. Write a diffusers folder instead"
        )
    if pretrained.text_encoder_2 is not None:
        family = "sdxl" if pretrained.text_encoder is not None else "refiner"
    else:
        assert pretrained.text_encoder
        family = "sd1" if pretrained.text_encoder.hidden_act == "quick_gelu" else "sd2"
    return {"unet": UNET, "vae": VAE, **ENCODERS[family]}


def _header(pretrained: Pretrained) -> dict[str, Any]:
    """What `read_single_file` needs to be exact: configs, and the schedule."""
    header: dict[str, Any] = {n: config.to_json() for n, config in pretrained.networks.items()}
    if pretrained.schedule is not None:
        header["schedule"] = dataclasses.asdict(pretrained.schedule)
        header["prediction_type"] = pretrained.prediction_type
        header["zero_empty_prompt"] = pretrained.zero_empty_prompt
        if pretrained.schedule.snr_scale == 1.0:  # which no scheduler file says
            header["scheduler"] = pretrained.scheduler_file()
    return header


def _warnings(pretrained: Pretrained) -> list[str]:
    """What sets these networks apart from all that readers of single files expect."""
    lines = []
    for name in TOKENIZERS:
        config = getattr(pretrained, name)
        if config is not None and config.vocab_size != CLIP_VOCABULARY:
            lines.append(
                f"{name} has {config.vocab_size:,} tokens: A1111 and ComfyUI tokenise with CLIP's "
                f"{CLIP_VOCABULARY:,} and cannot draw with it; sdjax can"
            )
    if pretrained.schedule is not None:
        default = type(pretrained.schedule)()
        marked = pretrained.text_encoder_2 is not None
        own = dataclasses.replace(pretrained.schedule, zero_terminal_snr=False)
        if own != default or (pretrained.schedule.zero_terminal_snr and not marked):
            lines.append(
                "the noise schedule is not Stable Diffusion's, which A1111 and ComfyUI assume"
            )
        if pretrained.prediction_type != "epsilon" and not marked:
            lines.append(
                "v-prediction: A1111 wants a .yaml of the same name beside the file that says so; "
                "ComfyUI a ModelSamplingDiscrete node"
            )
    return lines
