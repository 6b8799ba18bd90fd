"""Folders in the layout of diffusers: pipelines, and the folder of one network.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

What is written loads in torch's `StableDiffusionPipeline.from_pretrained`, with transformers 4
and 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax import paths
from sdjax.data.tokenizer import Tokenizer, TokenizerError
from sdjax.diffusion.scheduler_json import scheduler_from_diffusers, scheduler_to_diffusers
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.config import ConfigError
from sdjax.models.weights import (
    WeightsError,
    abstract,
    from_diffusers,
    load_file,
    save_file,
    to_diffusers,
)
from sdjax.train.bundle import (
    NETWORKS,
    Pretrained,
    PretrainedError,
    check_components,
    read_json,
    replaced_folder,
    write_json,
)
from sdjax.train.weight_files import STEMS, find_weights

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)
DTYPES = ("float32", "bfloat16", "float16")
# Parts of a pipeline that have no part in training or drawing.
_IGNORED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


def read_diffusers(
    folder: paths.PathLike,
    *,
    components: Sequence[str] = tuple(NETWORKS),
    variant: str = "",
) -> Pretrained:
    """Reads a pipeline folder, or the folder of one network (its config.json and weights).

    The tokenizer comes with the text encoder, the schedule with the UNet.

    Raises:
        PretrainedError: listing everything wrong in any part: fields that are not supported,
            weights that are missing, unused or of another shape, files that cannot be read.
    """
    folder = paths.to_path(folder)
    check_components(components)
    problems: list[str] = []
    ignored: list[str] = []
    parts: dict[str, Any] = {"params": {}}
    whole = (folder / "model_index.json").is_file()
    folders = _parts(folder, ignored) if whole else _single_part(folder, components)
    for name, part in folders.items():
        if name in components:
            try:
                config, skipped, params = _read_network(name, part, variant)
            except (ConfigError, WeightsError, PretrainedError) as error:
                problems.append(str(error))
                continue
            parts[name] = config
            parts["params"] |= {f"{name}.{path}": value for path, value in params.items()}
            ignored += [f"{name}: {field}" for field in skipped if not field.startswith("_")]
    if "unet" in components and "scheduler" in folders:
        file = folders["scheduler"] / "scheduler_config.json"
        try:
            read = scheduler_from_diffusers(read_json(file), where=str(file))
            parts["schedule"], parts["prediction_type"], parts["sampler"] = read
        except ValueError as error:
            problems.append(str(error))
    if "text_encoder" in components and "tokenizer" in folders:
        try:
            parts["tokenizer"] = _read_tokenizer(
                folders["tokenizer"], parts.get("text_encoder"), ignored
            )
        except TokenizerError as error:
            problems.append(str(error))
    if problems:
        raise PretrainedError("\n".join(problems))
    return Pretrained(**parts, ignored=tuple(ignored))


def _parts(folder: paths.Path, ignored: list[str]) -> dict[str, paths.Path]:
    """{part: folder} of a pipeline, from its model_index.json."""
    index = read_json(folder / "model_index.json")
    cls = index.get("_class_name")
    known = (*NETWORKS, "scheduler", "tokenizer", *_IGNORED_PARTS)
    listed = [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]
    unknown = [name for name in listed if name not in known]
    if cls not in PIPELINES or unknown:
        more = f" with {', '.join(unknown)}" if unknown else ""
        raise PretrainedError(
            f"{folder / 'model_index.json'}: a {cls}{more}; sdjax reads {', '.join(PIPELINES)}"
        )
    ignored += [name for name in listed if name in _IGNORED_PARTS]
    return {name: folder / name for name in listed if name not in _IGNORED_PARTS}


def _single_part(folder: paths.Path, components: Sequence[str]) -> dict[str, paths.Path]:
    """{name: folder} of a folder that holds one network."""
    config = read_json(folder / "config.json")
    classes = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}
    name = classes.get(config.get("_class_name", ""))
    if config.get("model_type") == "clip_text_model":
        name = "text_encoder"
    if name is None:
        what = config.get("_class_name") or config.get("model_type") or config.get("architectures")
        raise PretrainedError(
            f"{folder / 'config.json'}: of a {what!r}; expected {', '.join(classes)} or "
            "clip_text_model"
        )
    if name not in components:
        raise PretrainedError(f"{folder} holds a {name}; expected {' or '.join(components)}")
    parts = {name: folder}
    if name == "text_encoder" and (folder / "tokenizer_config.json").is_file():
        parts["tokenizer"] = folder
    return parts


def _read_network(
    name: str, folder: paths.Path, variant: str
) -> tuple[Any, list[str], dict[str, np.ndarray]]:
    """(config, ignored fields, float32 params without prefix) of one network's folder."""
    cls, config_cls = NETWORKS[name]
    file = folder / "config.json"
    config, ignored = config_cls.from_json(read_json(file), where=str(file))
    _, shapes = abstract(cls, config, param_dtype=jnp.float32)
    found = find_weights(folder, variant)
    tensors = load_file(found)
    try:
        return config, ignored, from_diffusers(tensors, shapes)
    except WeightsError as error:
        raise WeightsError(f"{found}: {error}") from error


def _read_tokenizer(
    folder: paths.Path, text_encoder: CLIPTextConfig | None, ignored: list[str]
) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    longest = text_encoder.max_position_embeddings if text_encoder else tokenizer.context_length
    if tokenizer.context_length > longest:
        ignored.append(
            f"tokenizer: model_max_length {tokenizer.context_length}, taken as {longest}"
        )
        tokenizer = Tokenizer.load(folder, context_length=longest)
    return tokenizer


def write_diffusers(
    folder: paths.PathLike,
    pretrained: Pretrained,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> paths.Path:
    """Writes a pipeline folder, or the folder of one network if there is but one.

    It appears under its name only once it is complete.

    Args:
        folder: to write.
        pretrained: all three networks, tokenizer and schedule; or one network.
        dtype: of the weights in the files: float32, bfloat16 or float16.
        overwrite: replace a folder of networks that is there.

    Raises:
        PretrainedError: something is missing, a weight overflows in `dtype`, or `folder` is not
            empty.
        OSError: the disk's own error; nothing is left behind.
    """
    folder = paths.to_path(folder)
    if dtype not in DTYPES:
        raise PretrainedError(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}")
    networks = pretrained.networks
    single = next(iter(networks)) if len(networks) == 1 else None
    if single is None:
        wanted = (*NETWORKS, "schedule", "tokenizer")
        missing = [name for name in wanted if getattr(pretrained, name) is None]
        if missing:
            raise PretrainedError(f"{folder}: a pipeline needs {', '.join(missing)} as well")
    with replaced_folder(folder, overwrite=overwrite) as partial:
        for name in networks:
            _write_network(partial if single else partial / name, name, pretrained, dtype)
        if single is None:
            _write_pipeline(partial, pretrained)
    return folder


def _write_network(folder: paths.Path, name: str, pretrained: Pretrained, dtype: str) -> None:
    """config.json and weights of one network."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", pretrained.networks[name].to_json())
    clip = name == "text_encoder"
    # transformers 4 insists on this prefix, and 5 takes it off where it is.
    tensors = to_diffusers(pretrained.component(name), prefix="text_model." if clip else "")
    tensors = {key: _cast(f"{name}: {key}", value, dtype) for key, value in tensors.items()}
    save_file(tensors, folder / f"{STEMS[1 if clip else 0]}.safetensors")


def _write_pipeline(folder: paths.Path, pretrained: Pretrained) -> None:
    """What a pipeline has besides its networks."""
    assert pretrained.schedule and pretrained.tokenizer and pretrained.unet
    pretrained.tokenizer.save(folder / "tokenizer")
    scheduler = scheduler_to_diffusers(
        pretrained.schedule, pretrained.prediction_type, pretrained.sampler
    )
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    # Latents, a mask and masked latents: the network of an inpainting pipeline.
    inpaints = pretrained.unet.in_channels == 2 * pretrained.unet.out_channels + 1
    index = {
        "_class_name": PIPELINES[2] if inpaints else PIPELINES[0],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)


def _cast(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = value.astype(jnp.dtype(dtype))
    if dtype == "float16" and np.any(np.isinf(cast) & np.isfinite(value)):
        raise PretrainedError(
            f"{name} reaches {np.abs(value).max():.3g}, beyond float16's 65504; use bfloat16"
        )
    return cast
