"""Single files of Stable Diffusion 1, 2 and XL: prefixes, marks and left-overs.

Training scripts and converters leave tables, counters, losses and heads in such files, which no
network reads. Each is known here by its exact name or by a prefix that holds nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sdjax.diffusion.schedules import ScheduleConfig
from sdjax.families import ldm_names
from sdjax.families.single_file import FileNetwork, Shapes

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_VOCABULARY = 49408  # OpenAI CLIP, clip/simple_tokenizer.py
# Beginnings of an autoencoder's names in a file of its own.
VAE_NAMES = (
    *(
        f"{side}.{part}."
        for side in ("encoder", "decoder")
        for part in ("conv_in", "down", "mid", "up", "norm_out", "conv_out")
    ),
    "quant_conv.",
    "post_quant_conv.",
)
# Buffers of ldm/models/diffusion/ddpm.py, ldm/modules/ema.py and sgm's denoiser, counters of
# trainers, and the marks of ComfyUI. None is a weight.
_LEFTOVERS = frozenset((
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar", "denoiser.sigmas",
    "epoch", "global_step", "model_ema.decay", "model_ema.num_updates", "v_pred", "ztsnr",
))  # fmt: skip
_ENCODERS = r"(cond_stage_model|conditioner\.embedders\.\d)\."
# The head of CLIP-L, which ComfyUI once wrote in one of these places; a mask of OpenCLIP.
_HEADS = re.compile(
    rf"{_ENCODERS}((transformer\.)?text_projection(\.weight)?|model\.attn_mask)"
)  # fmt: skip
_CROSS_ATTENTION = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"


def leftover(name: str) -> str:
    """Return the label of a tensor that is of no network and does not matter, or ""."""
    if name in _LEFTOVERS or _HEADS.fullmatch(name):
        return name
    scale = name.split(".")[-1] == "logit_scale" and not name.startswith((UNET, VAE))
    return name if scale else ""


def _vae_leftover(name: str) -> str:
    """The label of losses of an autoencoder's training, and of its average within a pipeline."""
    return next((f"{start}*" for start in ("loss.", "model_ema.") if name.startswith(start)), "")


def text_tells(*prefixes: str, width: int) -> Callable[[Shapes], bool]:
    """Return what tells a release: its text encoders, or the width of its UNet's context.

    Args:
        prefixes: of its text encoders, which are all there.
        width: channels of the cross attention, in a file without any text encoder.
    """

    def tells(shapes: Shapes) -> bool:
        if all(any(name.startswith(prefix) for name in shapes) for prefix in prefixes):
            return True
        if any(name.startswith(("cond_stage_model.", "conditioner.")) for name in shapes):
            return False
        return (shapes.get(_CROSS_ATTENTION) or (0,))[-1] == width

    return tells


def objective(shapes: Shapes) -> tuple[ScheduleConfig, str]:
    """Return SD1's schedule and prediction type, with what marks of ComfyUI say in their place."""
    prediction = "v_prediction" if "v_pred" in shapes else "epsilon"
    return ScheduleConfig(zero_terminal_snr="ztsnr" in shapes), prediction


def marks(schedule: ScheduleConfig, prediction_type: str) -> tuple[str, ...]:
    """Return names of the marks that ComfyUI and A1111 look for (SDXL.model_type)."""
    said = {"v_pred": prediction_type == "v_prediction", "ztsnr": schedule.zero_terminal_snr}
    return tuple(name for name, holds in said.items() if holds)


def unet(configure: Callable[[Shapes, str], Any]) -> FileNetwork:
    """Return the UNet of a layout."""
    return FileNetwork(
        (UNET,), configure, ldm_names.unet_places,
        averages={UNET: "model_ema.diffusion_model"},
    )  # fmt: skip


def vae(
    configure: Callable[[Shapes, str], Any], prefixes: tuple[str, ...] = (VAE, "")
) -> FileNetwork:
    """Return the autoencoder of a layout."""
    return FileNetwork(
        prefixes, configure, ldm_names.vae_places,
        bare=VAE_NAMES, leftover=_vae_leftover, averages={"": "model_ema."},
    )  # fmt: skip


def clip(prefix: str, configure: Callable[[Shapes, str], Any]) -> FileNetwork:
    """Return a CLIP text encoder under the names of transformers."""
    return FileNetwork(
        (prefix,), configure, ldm_names.clip_places,
        spelling=ldm_names.clip_spelling, vocabulary=CLIP_VOCABULARY,
    )  # fmt: skip


def open_clip(prefix: str, configure: Callable[[Shapes, str], Any]) -> FileNetwork:
    """Return an encoder of OpenCLIP.

    Its tokenizer pads with zeros, and "!" is token 0 (open_clip/tokenizer.py).
    """
    return FileNetwork(
        (prefix,), configure, ldm_names.open_clip_places,
        surplus=ldm_names.open_clip_surplus, pad_token="!", vocabulary=CLIP_VOCABULARY,
    )  # fmt: skip
