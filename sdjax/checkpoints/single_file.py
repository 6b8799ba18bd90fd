"""Single-file checkpoints: the `.safetensors` that AUTOMATIC1111 and ComfyUI read.

All networks of a pipeline under the names of the original code (`sdjax.checkpoints.ldm_names`), each
family with prefixes of its own; or an autoencoder alone, without a prefix. There is no tokenizer in
them, no noise schedule, no config. What sdjax writes has configs and schedule in the file's
header; of other files, shapes decide the architecture (`sdjax.checkpoints.ldm_configs`), the rest is
that of the release the family is named after, and what even that leaves open is asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax.checkpoints import ldm_configs, ldm_names
from sdjax.checkpoints.bundle import (
    NETWORKS,
    TOKENIZERS,
    Pretrained,
    PretrainedError,
    check_components,
)
from sdjax.checkpoints.scheduler_json import scheduler_from_diffusers
from sdjax.checkpoints.single_file_layout import (
    ENCODERS,
    counted,
    is_open_clip,
    layout,
    sort_out,
    whole_average,
    within,
)
from sdjax.data.tokenizer import Tokenizer
from sdjax.diffusion.prediction import check_prediction
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.models.config import read_config
from sdjax.models.weight_checks import quantised
from sdjax.models.weights import (
    WeightsError,
    abstract,
    from_diffusers,
    load_file,
    read_header,
    weight_name,
)
from sdjax.system import paths
from sdjax.system.untrusted import brief, check_depth, damage, explained, why

# The name of our entry in the file's header.
METADATA = "sdjax"
# What it says, besides a schedule with a prediction type.
_SAID = {
    **dict.fromkeys((*NETWORKS, "schedule", "scheduler"), dict),
    "prediction_type": str,
    "zero_empty_prompt": bool,
}


@dataclasses.dataclass(frozen=True)
class Hints:
    """What a single file may leave open.

    tokenizer: folder of a CLIP tokenizer; "" where `like` or nothing has one.
    prediction_type: "epsilon" or "v_prediction"; "" for what the file says, or its family.
    scaling_factor: of an autoencoder's latents.
    like: a pipeline (without weights) whose configs, schedule and tokenizers the file's are.
    """

    tokenizer: str = ""
    prediction_type: str = ""
    scaling_factor: float | None = None
    like: Pretrained | None = None


def read_single_file(
    file: paths.PathLike,
    *,
    components: Sequence[str] = tuple(NETWORKS),
    weights: str = "ema",
    hints: Hints,
) -> Pretrained:
    """Reads the networks of a single-file checkpoint.

    Args:
        file: a `.safetensors`.
        components: which networks to read, if it has them.
        weights: "ema" takes the average where the file has one beside the parameters of the UNet,
            or of an autoencoder that is alone; "raw" never does.
        hints: what the file does not say.

    Raises:
        PretrainedError: with everything that is missing, unused, mis-shaped, or not said; or of
            which the average is not whole, values are NaN or Inf, or weights are quantised.
    """
    file = paths.to_path(file)
    check_components(components)
    if weights not in ("ema", "raw"):
        raise PretrainedError(f"weights is {weights!r}; a single file has ema and raw")
    with explained(file, "a single-file checkpoint", error=PretrainedError):
        return _read(file, components, weights, hints)


def _read(file: paths.Path, components: Sequence[str], weights: str, hints: Hints) -> Pretrained:
    """See `read_single_file`."""
    shapes, metadata = read_header(file)
    family, prefixes = layout(file, shapes)
    _refuse_quantised(file, shapes, prefixes, components)
    contents = sort_out(file, shapes, prefixes)
    ignored, averages = list(contents.ignored), contents.averages
    said = _said(file, metadata)
    schedule = _schedule(file, shapes, family, said, hints) if "unet" in prefixes else None
    parts: dict[str, Any] = {"params": {}}
    for name, prefix in prefixes.items():
        if name not in components:
            continue
        origin = _origin(file, name, prefix, contents.weights)
        own = {key: shapes[full] for key, full in origin.items()}
        prediction = schedule[1] if schedule else ""
        config = _config(file, name, own, family, prediction, said, hints)
        if weights == "ema" and (name == "unet" or not prefix):
            if taken := whole_average(file, name, origin, averages):
                origin, averages = taken, ()
                who = "UNet" if name == "unet" else "VAE"
                what = f"the {who}'s parameters: the file has their average, which was taken"
                ignored.append(what)
        params, unused = _read_network(file, name, prefix, config, origin)
        ignored += unused
        parts[name] = config
        parts["params"] |= {f"{name}.{path}": value for path, value in params.items()}
    encoders = [name for name in TOKENIZERS if name in parts]
    parts |= _tokenizers(file, family, encoders, parts, hints)
    ignored += counted("model_ema.*" for _ in averages)
    if "unet" in parts:
        assert schedule
        parts["schedule"], parts["prediction_type"] = schedule
        parts |= _scheduler(file, family, said, hints)
    if encoders:
        # As in Stability's model_index.json of SDXL; that of the refiner says False.
        default = hints.like.zero_empty_prompt if hints.like else family == "sdxl"
        parts["zero_empty_prompt"] = said.get("zero_empty_prompt", default)
    return Pretrained(**parts, ignored=tuple(ignored))


def _refuse_quantised(
    file: paths.Path,
    names: Iterable[str],
    prefixes: Mapping[str, str],
    components: Sequence[str],
) -> None:
    """WeightsError if what is to be read is quantised; other networks of the file may be."""
    others = [prefix for name, prefix in prefixes.items() if name not in components]
    wanted = [name for name in names if not any(within(name, prefix) for prefix in others)]
    if problem := quantised(wanted):
        raise WeightsError(f"{file}: {problem}")


def _said(file: paths.Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What sdjax wrote into the header, or nothing."""
    try:
        said = json.loads(metadata.get(METADATA, "{}"))
        check_depth(said)
        for name, kind in _SAID.items():
            if not isinstance(said.get(name, kind()), kind):
                raise ValueError(f"{name} is {brief(said[name])}; expected a {kind.__name__}")
        if "schedule" in said:
            said["schedule"] = read_config(ScheduleConfig, said["schedule"], where="schedule")[0]
            check_prediction(said["prediction_type"])
    except damage() as error:
        raise PretrainedError(
            f"{file}: the header has a part of sdjax's that this version cannot read "
            f"({why(error)}); use the version that wrote it, or write it again"
        ) from error
    return said


def _config(
    file: paths.Path,
    name: str,
    shapes: Mapping[str, Sequence[int]],
    family: str,
    prediction_type: str,
    said: Mapping[str, Any],
    hints: Hints,
) -> Any:
    """The config of a network: the one pointed to, the header's, or what the shapes say."""
    if hints.like is not None and getattr(hints.like, name) is not None:
        return getattr(hints.like, name)
    if name in said:
        return NETWORKS[name][1].from_json(said[name], where=f"{file}, header, {name}")[0]
    xl = family in ("sdxl", "refiner")
    v2 = family == "sd2" and prediction_type == "v_prediction"
    if name == "unet":
        return ldm_configs.unet_config(
            shapes, sample_size=128 if xl else 96 if v2 else 64, upcast=v2
        )
    if name == "vae":
        factor = hints.scaling_factor
        if factor is None and not family:
            raise PretrainedError(
                f"{file}: an autoencoder alone does not say how its latents are scaled; give "
                f"--scaling_factor, {ldm_configs.SD_SCALING} for SD1 and SD2, "
                f"{ldm_configs.SDXL_SCALING} for SDXL"
            )
        own = ldm_configs.SDXL_SCALING if xl else ldm_configs.SD_SCALING
        size = 1024 if xl else 768 if v2 else 512
        return ldm_configs.vae_config(shapes, scaling_factor=factor or own, sample_size=size)
    if is_open_clip(ENCODERS[family][name]):
        return ldm_configs.open_clip_config(shapes, penultimate=family == "sd2")
    return ldm_configs.clip_config(shapes)


def _read_network(
    file: paths.Path, name: str, prefix: str, config: Any, origin: dict[str, str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(float32 parameters of one network without its name; lines about what it does not use).

    Args:
        origin: {key without prefix: name in the file} of its weights, or of their averages.
    """
    open_clip = is_open_clip(prefix)
    dropped = _surplus(config, origin) if open_clip else {}
    chosen = {key: full for key, full in origin.items() if key not in dropped}
    found = load_file(file, wanted=set(chosen.values()).__contains__)
    tensors = {key: found[full] for key, full in chosen.items()}
    rename = ldm_names.renamer(config, open_clip=open_clip)
    _, expected = abstract(NETWORKS[name][0], config, param_dtype=jnp.float32)
    originals = {new: rename(new) for new in map(weight_name, expected)}

    def spell(key: str) -> str:
        key = originals.get(key, key)
        return origin.get(key, prefix + key)

    weights = ldm_names.from_ldm(tensors, originals, rename)
    try:
        params = from_diffusers(weights, expected, spell=spell)
    except WeightsError as error:
        raise WeightsError(f"{file}: {name}: {error}") from error
    return params, counted(prefix + label for label in dropped.values())


def _surplus(config: Any, keys: Iterable[str]) -> dict[str, str]:
    """{key: label} of what an encoder of OpenCLIP has in a file and diffusers drops.

    SD2's files hold the layer after the one that is used, and the head.
    """
    last = f"transformer.resblocks.{config.num_hidden_layers}."
    head = ("text_projection", "text_projection.weight") if config.projection_dim is None else ()
    return {key: f"{last}*" for key in keys if key.startswith(last)} | {
        key: key for key in keys if key in head
    }


def _origin(file: paths.Path, name: str, prefix: str, shapes: Iterable[str]) -> dict[str, str]:
    """{key without prefix: name in the file} of a network's weights.

    CLIP-L is stored under the names of transformers 4, in some files of 5.
    """
    origin: dict[str, str] = {}
    for full in shapes:
        if within(full, prefix):
            key = full[len(prefix) :]
            key = key.removeprefix("text_model.") if name in TOKENIZERS else key
            if key in origin:
                raise WeightsError(f"{file}: {origin[key]} and {full} are the same weight")
            origin[key] = full
    return origin


def _schedule(
    file: paths.Path,
    shapes: Mapping[str, Any],
    family: str,
    said: Mapping[str, Any],
    hints: Hints,
) -> tuple[ScheduleConfig, str]:
    """(noise schedule, prediction type), checked against the file's own table if it has one."""
    if hints.like is not None and hints.like.schedule is not None:
        schedule, prediction = hints.like.schedule, hints.like.prediction_type
    elif "schedule" in said:
        schedule, prediction = said["schedule"], said["prediction_type"]
    else:
        # A mark that ComfyUI and A1111 look for; the rest is every release's.
        schedule = ScheduleConfig(zero_terminal_snr="ztsnr" in shapes)
        prediction = "v_prediction" if "v_pred" in shapes else "epsilon"
        if family == "sd2" and "v_pred" not in shapes and not hints.prediction_type:
            raise PretrainedError(
                f"{file}: a Stable Diffusion 2 file does not say what its UNet predicts; give "
                "--prediction_type, epsilon for the 512 px models (2-base, 2.1-base), v_prediction "
                "for the 768 px ones"
            )
    prediction = hints.prediction_type or prediction
    if "alphas_cumprod" in shapes:
        table = load_file(file, wanted=lambda name: name == "alphas_cumprod")["alphas_cumprod"]
        # The precision of float8, or of bfloat16.
        small = jnp.issubdtype(table.dtype, jnp.floating) and table.dtype.itemsize == 1
        relative = float(jnp.finfo(table.dtype).eps) / 2 if small else 4e-3
        table = table.astype(np.float64)
        for zero in (False, True):
            candidate = dataclasses.replace(schedule, zero_terminal_snr=zero)
            expected = make_schedule(candidate).alphas_cumprod
            # Ends of SD's table: 0.0047, or 0 for a zero terminal SNR.
            if table.shape == expected.shape and np.allclose(table, expected, relative, 1e-3):
                return (candidate if zero else schedule), prediction
        raise PretrainedError(
            f"{file}: its alphas_cumprod (from {table.flat[0]:.4g} to {table.flat[-1]:.4g}) is not "
            "the noise schedule of Stable Diffusion; point --config_from at a diffusers folder or "
            "workdir that has the right one"
        )
    return schedule, prediction


def _scheduler(
    file: paths.Path, family: str, said: Mapping[str, Any], hints: Hints
) -> dict[str, Any]:
    """How to sample, from where the user says or from the header; otherwise nothing."""
    like = hints.like
    if like is not None and like.schedule is not None:
        names = ("sampler", "unsupported_sampler", "scheduler")
        return {name: getattr(like, name) for name in names}
    if "scheduler" not in said:
        return {}
    xl = "XL" if family in ("sdxl", "refiner") else ""
    pipeline = f"StableDiffusion{xl}Pipeline"
    read = scheduler_from_diffusers(said["scheduler"], where=f"{file}, header", pipeline=pipeline)
    return {
        "sampler": read.sampler,
        "unsupported_sampler": read.unsupported,
        "scheduler": said["scheduler"],
    }


def _tokenizers(
    file: paths.Path,
    family: str,
    encoders: Sequence[str],
    configs: Mapping[str, Any],
    hints: Hints,
) -> dict[str, Tokenizer]:
    """{tokenizer: the one of its text encoder}, from where the user says."""
    found: dict[str, Tokenizer] = {}
    for encoder in encoders:
        name, length = TOKENIZERS[encoder], configs[encoder].max_position_embeddings
        own = getattr(hints.like, name) if hints.like is not None else None
        if own is None and not hints.tokenizer:
            raise PretrainedError(
                f"{file}: single files have no tokenizer. Convert it with python -m sdjax.convert, "
                "giving --tokenizer, a folder with CLIP's vocab.json and merges.txt (as the "
                "tokenizer/ of any Stable Diffusion), or --config_from, a whole pipeline"
            )
        if own is None:
            # OpenCLIP pads with zeros, and "!" is token 0 (open_clip/tokenizer.py).
            pad = "!" if is_open_clip(ENCODERS[family][encoder]) else None
            own = Tokenizer.load(hints.tokenizer, context_length=length, pad_token=pad)
        own.check_vocabulary(configs[encoder].vocab_size, f"{file}: {encoder}")
        found[name] = own
    return found
