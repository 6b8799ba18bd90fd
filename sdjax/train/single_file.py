"""Single-file checkpoints: the `.safetensors` that AUTOMATIC1111 and ComfyUI read.

All networks of a pipeline under the names of the original code (`sdjax.models.ldm_names`), each
family with prefixes of its own; or an autoencoder alone, without a prefix. There is no tokenizer in
them, no noise schedule, no config. What sdjax writes has configs and schedule in the file's
header; of other files, shapes decide the architecture (`sdjax.models.ldm_configs`), the rest is
that of the release the family is named after, and what even that leaves open is asked for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax import paths
from sdjax.data.tokenizer import Tokenizer, TokenizerError
from sdjax.diffusion.scheduler_json import scheduler_from_diffusers
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.models import ldm_configs, ldm_names
from sdjax.models.config import ConfigError
from sdjax.models.weights import (
    WeightsError,
    abstract,
    from_diffusers,
    load_file,
    read_header,
    weight_name,
)
from sdjax.train.bundle import NETWORKS, TOKENIZERS, Pretrained, PretrainedError, check_components

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPEN_CLIP = "transformer.", "model."
# {family: {text encoder: its prefix}}, from the most to the least particular.
ENCODERS: dict[str, dict[str, str]] = {
    "sdxl": {
        "text_encoder": f"conditioner.embedders.0.{_CLIP}",
        "text_encoder_2": f"conditioner.embedders.1.{_OPEN_CLIP}",
    },
    "refiner": {"text_encoder_2": f"conditioner.embedders.0.{_OPEN_CLIP}"},
    "sd2": {"text_encoder": f"cond_stage_model.{_OPEN_CLIP}"},
    "sd1": {"text_encoder": f"cond_stage_model.{_CLIP}"},
}
_VAE_PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
_EMA = "model_ema."
# Under these names training scripts leave tables, counters and losses, which no network reads.
_HARMLESS = (
    "model_ema",
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "loss", "global_step", "denoiser",
    "v_pred", "ztsnr",
)  # fmt: skip
# Parts of an OpenCLIP file that a text encoder does not have, or that only SD2's does not use.
_OPEN_CLIP_EXTRA = ("logit_scale", "attn_mask")
# The name of our entry in the file's header.
METADATA = "sdjax"


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
        weights: "ema" takes the average where the file has one beside the UNet's parameters, "raw"
            never does.
        hints: what the file does not say.

    Raises:
        PretrainedError: with everything that is missing, unused, mis-shaped, or not said.
    """
    file = paths.to_path(file)
    check_components(components)
    if weights not in ("ema", "raw"):
        raise PretrainedError(f"weights is {weights!r}; a single file has ema and raw")
    try:
        shapes, metadata = read_header(file)
        family, prefixes = _layout(file, shapes)
        ignored = _others(file, shapes, prefixes)
        said = _said(file, metadata)
        schedule = _schedule(file, shapes, family, said, hints) if "unet" in prefixes else None
        parts: dict[str, Any] = {"params": {}}
        for name, prefix in prefixes.items():
            if name not in components:
                continue
            own = {n[len(prefix) :]: s for n, s in shapes.items() if within(n, prefix)}
            own = {_without_head(name, n): s for n, s in own.items()}
            prediction = schedule[1] if schedule else ""
            config = _config(file, name, own, family, prediction, said, hints)
            averaged = name == "unet" and weights == "ema" and any(_EMA in n for n in shapes)
            params = _read_network(file, name, prefix, config, ignored, averaged=averaged)
            parts[name] = config
            parts["params"] |= {f"{name}.{path}": value for path, value in params.items()}
        encoders = [name for name in TOKENIZERS if name in parts]
        parts |= _tokenizers(file, family, encoders, parts, hints)
    except (ConfigError, WeightsError, TokenizerError) as error:
        text = str(error)
        raise PretrainedError(text if str(file) in text else f"{file}: {text}") from error
    if "unet" in parts:
        assert schedule
        parts["schedule"], parts["prediction_type"] = schedule
        parts |= _scheduler(file, family, said, hints)
    if encoders:
        # As in Stability's model_index.json of SDXL; that of the refiner says False.
        default = hints.like.zero_empty_prompt if hints.like else family == "sdxl"
        parts["zero_empty_prompt"] = said.get("zero_empty_prompt", default)
    return Pretrained(**parts, ignored=tuple(ignored))


def _said(file: paths.Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What sdjax wrote into the header, or nothing."""
    try:
        said = json.loads(metadata.get(METADATA, "{}"))
        if "schedule" in said:
            said["schedule"] = ScheduleConfig(**said["schedule"])
    except (ValueError, TypeError) as error:
        raise PretrainedError(
            f"{file}: the header has a part of sdjax's that this version cannot read ({error}); "
            "use the version that wrote it, or write it again"
        ) from error
    return said


def _layout(file: paths.Path, shapes: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """(family, {network: prefix}) of a file."""
    has = lambda prefix: any(name.startswith(prefix) for name in shapes)  # noqa: E731
    if "encoder.conv_in.weight" in shapes:
        return "", {"vae": ""}
    prefixes = {name: p for name, p in (("unet", UNET), ("vae", VAE)) if has(p)}
    for family, encoders in ENCODERS.items():
        found = {name: prefix for name, prefix in encoders.items() if has(prefix)}
        if len(found) == len(encoders):
            return family, prefixes | found
    if not prefixes:
        some = ", ".join(sorted(shapes)[:4]) or "nothing"
        raise PretrainedError(
            f"{file}: no Stable Diffusion checkpoint; expected names that begin with {UNET}, {VAE} "
            f"or encoder., found {some}"
        )
    context = shapes.get(f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight", (0, 0))[1]
    return {768: "sd1", 1024: "sd2", 1280: "refiner", 2048: "sdxl"}.get(context, ""), prefixes


def _others(file: paths.Path, shapes: Mapping[str, Any], prefixes: Mapping[str, str]) -> list[str]:
    """What is in the file besides the networks, as lines; an error for what may matter."""
    owners = prefixes.values()
    rest = [name for name in shapes if not any(within(name, prefix) for prefix in owners)]
    tops = sorted({name.split(".")[0] for name in rest})
    unknown = [top for top in tops if top not in _HARMLESS]
    if unknown:
        raise PretrainedError(
            f"{file}: sdjax does not know what is under {', '.join(unknown)}, which may belong to "
            "another kind of model; nothing was read. Remove these if they do not matter"
        )
    return [f"{top}: {sum(n.split('.')[0] == top for n in rest)} tensors" for top in tops]


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
    file: paths.Path, name: str, prefix: str, config: Any, ignored: list[str], *, averaged: bool
) -> dict[str, np.ndarray]:
    """float32 parameters of one network, without its name."""
    tensors = load_file(file, wanted=lambda key: within(key, prefix))
    tensors = {_without_head(name, key[len(prefix) :]): value for key, value in tensors.items()}
    if averaged:
        tensors |= _averages(file, tensors)
        ignored.append("the UNet's parameters: the file has their average, which was taken")
    open_clip = is_open_clip(prefix)
    if open_clip:
        # SD2's files hold the layer after the one that is used, and the head; diffusers drops both.
        extra = [f"transformer.resblocks.{config.num_hidden_layers}.", *_OPEN_CLIP_EXTRA]
        extra += ["text_projection"] if config.projection_dim is None else []
        dropped = [key for key in tensors if key.startswith(tuple(extra))]
        tensors = {key: value for key, value in tensors.items() if key not in dropped}
        if dropped:
            ignored.append(f"{name}: {', '.join(sorted(dropped)[:3])}, ... ({len(dropped)})")
    _, expected = abstract(NETWORKS[name][0], config, param_dtype=jnp.float32)
    names = dict.fromkeys(map(weight_name, expected))
    found = ldm_names.from_ldm(tensors, names, ldm_names.renamer(config, open_clip=open_clip))
    try:
        return from_diffusers(found, expected)
    except WeightsError as error:
        raise WeightsError(f"{file}: {name}: {error}") from error


def _averages(file: paths.Path, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """LDM's EMA, whose names are those of the parameters without dots (ldm/modules/ema.py)."""
    flat = {"diffusion_model" + key.replace(".", ""): key for key in tensors}
    averages = load_file(file, wanted=lambda key: key.startswith(_EMA + "diffusion_model"))
    return {flat[key[len(_EMA) :]]: v for key, v in averages.items() if key[len(_EMA) :] in flat}


def within(name: str, prefix: str) -> bool:
    """Whether a weight is of the network under a prefix; without one, of an autoencoder."""
    return name.startswith(prefix) if prefix else name.split(".")[0] in _VAE_PARTS


def is_open_clip(prefix: str) -> bool:
    """Whether the encoder under a prefix has the names of OpenCLIP."""
    return prefix.endswith(f".{_OPEN_CLIP}")


def _without_head(name: str, key: str) -> str:
    """CLIP-L is stored under the names of transformers 4, in some files of 5."""
    return key.removeprefix("text_model.") if name in TOKENIZERS else key


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
        table = table.astype(np.float64)
        for zero in (False, True):
            candidate = dataclasses.replace(schedule, zero_terminal_snr=zero)
            expected = make_schedule(candidate).alphas_cumprod
            # The precision of bfloat16. Ends of SD's table: 0.0047, or 0 for a zero terminal SNR.
            if table.shape == expected.shape and np.allclose(table, expected, 4e-3, 1e-3):
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
        if own.vocab_size > configs[encoder].vocab_size:
            raise PretrainedError(
                f"{file}: its {encoder} has {configs[encoder].vocab_size} tokens, the tokenizer "
                f"{own.vocab_size}: they do not belong together"
            )
        found[name] = own
    return found
