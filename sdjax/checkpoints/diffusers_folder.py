"""Folders in the layout of diffusers: pipelines, and the folder of one network.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

and, of SDXL, text_encoder_2/ and tokenizer_2/, which are all that its refiner has. What is written
loads in torch's `StableDiffusionPipeline.from_pretrained` (`StableDiffusionXLPipeline`, ...), with
transformers 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax.checkpoints.bundle import (
    NETWORKS,
    TOKENIZERS,
    Pretrained,
    PretrainedError,
    check_components,
    read_json,
    replaced_folder,
    write_json,
)
from sdjax.checkpoints.scheduler_json import scheduler_from_diffusers
from sdjax.checkpoints.single_file_layout import counted
from sdjax.checkpoints.weight_files import MAX_SHARD_SIZE, find_weights, parse_size, write_weights
from sdjax.data.tokenizer import Tokenizer, TokenizerError
from sdjax.models.clip import CLIPTextConfig, has_projection
from sdjax.models.config import ConfigError
from sdjax.models.weight_checks import quantised_config
from sdjax.models.weights import (
    WeightsError,
    abstract,
    from_diffusers,
    load_file,
)
from sdjax.system import paths
from sdjax.system.untrusted import brief, explained, plain

PIPELINES = tuple(
    f"StableDiffusion{xl}{kind}Pipeline" for xl in ("", "XL") for kind in ("", "Img2Img", "Inpaint")
)
DTYPES = ("float32", "bfloat16", "float16")
# Parts of a pipeline that have no part in training or drawing.
_IGNORED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


def read_diffusers(
    folder: paths.PathLike,
    *,
    components: Sequence[str] = tuple(NETWORKS),
    variant: str = "",
    with_weights: bool = True,
) -> Pretrained:
    """Reads a pipeline folder, or the folder of one network (its config.json and weights).

    A tokenizer comes with its text encoder, the schedule with the UNet. Without weights, `params`
    is empty and the folder need not have any.

    Raises:
        PretrainedError: listing everything wrong in any part: fields that are not supported,
            weights that are missing, unused or of another shape, files that cannot be read.
    """
    folder = paths.to_path(folder)
    check_components(components)
    with explained(folder, "a diffusers folder", error=PretrainedError):
        return _read(folder, components, variant, with_weights)


def _read(
    folder: paths.Path, components: Sequence[str], variant: str, with_weights: bool
) -> Pretrained:
    """See `read_diffusers`."""
    problems: list[str] = []
    ignored: list[str] = []
    parts: dict[str, Any] = {"params": {}}
    whole = (folder / "model_index.json").is_file()
    folders = _parts(folder, ignored) if whole else _single_part(folder, components)
    for name, part in folders.items():
        if name in components:
            try:
                config, skipped, params = _read_network(name, part, variant, with_weights)
            except (ConfigError, WeightsError, PretrainedError) as error:
                problems.append(str(error))
                continue
            parts[name] = config
            parts["params"] |= {f"{name}.{path}": value for path, value in params.items()}
            ignored += [f"{name}: {field}" for field in skipped if not field.startswith("_")]
    if "unet" in components and "scheduler" in folders:
        try:
            parts |= _read_scheduler(folders["scheduler"], read_json(folder / "model_index.json"))
        except ValueError as error:
            problems.append(str(error))
    for encoder, name in TOKENIZERS.items():
        if encoder in components and name in folders:
            try:
                parts[name] = _read_tokenizer(folders[name], parts.get(encoder), ignored)
            except TokenizerError as error:
                problems.append(str(error))
    if whole and set(TOKENIZERS) & set(components):
        index = read_json(folder / "model_index.json")
        if "XL" in index["_class_name"]:
            # The default of the pipelines, which their files may leave out.
            parts["zero_empty_prompt"] = bool(index.get("force_zeros_for_empty_prompt", True))
    if problems:
        raise PretrainedError("\n".join(problems))
    return Pretrained(**parts, ignored=tuple(ignored))


def _parts(folder: paths.Path, ignored: list[str]) -> dict[str, paths.Path]:
    """{part: folder} of a pipeline, from its model_index.json."""
    file = folder / "model_index.json"
    index = read_json(file)
    cls = index.get("_class_name")
    known = (*NETWORKS, "scheduler", *TOKENIZERS.values(), *_IGNORED_PARTS)
    listed = [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]
    # As in diffusers, names that begin so are somebody's own notes (configuration_utils.py).
    private = [name for name in listed if name.startswith("_")]
    listed = [name for name in listed if name not in private]
    unknown = [name for name in listed if name not in known]
    if cls not in PIPELINES or unknown:
        more = f" with {', '.join(map(plain, unknown[:8]))}" if unknown else ""
        raise PretrainedError(f"{file}: a {plain(cls)}{more}; sdjax reads {', '.join(PIPELINES)}")
    ignored += [*private, *(name for name in listed if name in _IGNORED_PARTS)]
    return {name: folder / name for name in listed if name not in _IGNORED_PARTS}


def _single_part(folder: paths.Path, components: Sequence[str]) -> dict[str, paths.Path]:
    """{name: folder} of a folder that holds one network."""
    config = read_json(folder / "config.json")
    classes = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}
    kind = config.get("_class_name")
    name = classes.get(kind) if isinstance(kind, str) else None
    if config.get("model_type") == "clip_text_model":
        name = "text_encoder_2" if has_projection(config) else "text_encoder"
    if name is None:
        what = kind or config.get("model_type") or config.get("architectures")
        raise PretrainedError(
            f"{folder / 'config.json'}: of a {brief(what)}; expected {', '.join(classes)} or "
            "clip_text_model"
        )
    if name not in components:
        raise PretrainedError(f"{folder} holds a {name}; expected {' or '.join(components)}")
    parts = {name: folder}
    if name in TOKENIZERS and (folder / "tokenizer_config.json").is_file():
        parts[TOKENIZERS[name]] = folder
    return parts


def _read_network(
    name: str, folder: paths.Path, variant: str, with_weights: bool
) -> tuple[Any, list[str], dict[str, np.ndarray]]:
    """(config, ignored fields and weights, float32 params without prefix) of a network's folder."""
    cls, config_cls = NETWORKS[name]
    file = folder / "config.json"
    content = read_json(file)
    if problem := quantised_config(content):
        raise WeightsError(f"{file}: {problem}")
    config, ignored = config_cls.from_json(content, where=str(file))
    if not with_weights:
        return config, ignored, {}
    _, shapes = abstract(cls, config, param_dtype=jnp.float32)
    found = find_weights(folder, variant)
    surplus: list[str] = []

    def wanted(key: str) -> bool:
        label = _surplus(name, config, key)
        surplus.extend([label] if label else [])
        return not label

    tensors = load_file(found, wanted=wanted)
    try:
        return config, [*ignored, *counted(surplus)], from_diffusers(tensors, shapes)
    except WeightsError as error:
        raise WeightsError(f"{found}: {error}") from error


def _surplus(name: str, config: Any, key: str) -> str:
    """The label of a weight of a whole CLIPModel that its text encoder alone lacks, or ""."""
    if name not in TOKENIZERS:
        return ""
    head = ("text_projection.weight",) if config.projection_dim is None else ()
    if key in ("logit_scale", "visual_projection.weight", *head):
        return key
    return "vision_model.*" if key.startswith("vision_model.") else ""


def _read_scheduler(folder: paths.Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Pretrained that a scheduler's folder fills."""
    file = folder / "scheduler_config.json"
    # Pipelines load the class that their index names, whatever the file says of itself.
    content = {**read_json(file), "_class_name": index["scheduler"][-1]}
    read = scheduler_from_diffusers(content, where=str(file), pipeline=index["_class_name"])
    return {
        "schedule": read.schedule,
        "prediction_type": read.prediction_type,
        "sampler": read.sampler,
        "unsupported_sampler": read.unsupported,
        "scheduler": content,
    }


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
    if text_encoder:
        tokenizer.check_vocabulary(text_encoder.vocab_size, folder)
    return tokenizer


def write_diffusers(
    folder: paths.PathLike,
    pretrained: Pretrained,
    *,
    dtype: str = "float32",
    max_shard_size: str = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> paths.Path:
    """Writes a pipeline folder, or the folder of one network if there is but one.

    It appears under its name only once it is complete.

    Args:
        folder: to write.
        pretrained: all networks of a pipeline, tokenizers and schedule; or one network.
        dtype: of the weights in the files: float32, bfloat16 or float16.
        max_shard_size: of a file of weights, as "10GB"; larger networks take several.
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
    if single is None and (missing := pretrained.missing()):
        raise PretrainedError(f"{folder}: a pipeline needs {', '.join(missing)} as well")
    try:
        limit = parse_size(max_shard_size)
        with replaced_folder(folder, overwrite=overwrite) as partial:
            for name, config in networks.items():
                part = partial if single else partial / name
                part.mkdir(exist_ok=True)
                write_json(part / "config.json", config.to_json())
                params = pretrained.component(name)
                write_weights(part, params, name=name, dtype=dtype, max_shard_size=limit)
            if single is None:
                _write_pipeline(partial, pretrained)
    except WeightsError as error:
        raise PretrainedError(str(error)) from error
    return folder


def _write_pipeline(folder: paths.Path, pretrained: Pretrained) -> None:
    """What a pipeline has besides its networks."""
    assert pretrained.schedule and pretrained.unet
    scheduler = pretrained.scheduler_file()
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {
        "_class_name": pipeline_class(pretrained),
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    xl = pretrained.text_encoder_2 is not None
    for name, tokenizer_name in TOKENIZERS.items():
        config, tokenizer = getattr(pretrained, name), getattr(pretrained, tokenizer_name)
        if config is not None:
            tokenizer.save(folder / tokenizer_name)
            index[name] = ["transformers", config.architecture]
            index[tokenizer_name] = ["transformers", "CLIPTokenizer"]
        elif xl:
            index[name] = index[tokenizer_name] = [None, None]
    if xl:
        index["force_zeros_for_empty_prompt"] = pretrained.zero_empty_prompt
        index["image_encoder"] = [None, None]
        if pretrained.text_encoder is None:
            index["requires_aesthetics_score"] = True
    else:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    write_json(folder / "model_index.json", index)


def pipeline_class(pretrained: Pretrained) -> str:
    """The class of diffusers that draws with these networks."""
    assert pretrained.unet
    # Latents, a mask and masked latents: the network of an inpainting pipeline.
    inpaints = pretrained.unet.in_channels == 2 * pretrained.unet.out_channels + 1
    refines = pretrained.text_encoder_2 is not None and pretrained.text_encoder is None
    xl = "XL" if pretrained.text_encoder_2 is not None else ""
    kind = "Inpaint" if inpaints else "Img2Img" if refines else ""
    return f"StableDiffusion{xl}{kind}Pipeline"
