"""The head that tells real latents from drawn ones by the middle of a UNet.

Yin et al. 2024 (DMD2), arXiv:2405.14867; tianweiy/DMD2, main/sd_guidance.py, `cls_pred_branch`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from sdjax.models.layers import Array, Dtype, GroupNorm, conv, pointwise, silu

_KERNEL = 4  # of each convolution


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The shape of a head.

    channels: of the middle.
    side: height and width of the middle.
    norm_num_groups: of its norms, 32 as published.
    """

    channels: int
    side: int
    norm_num_groups: int = 32


class MiddleHead(nnx.Module):
    """Convolutions that halve the middle of a UNet until one position is left, and a number.

    At 8 x 8 it is the published one of SD 1.5, at 32 x 32 that of SDXL.

    Args: see `UNet`.
    """

    def __init__(
        self, config: HeadConfig, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs, **kw: Any
    ):
        kw |= {"dtype": dtype, "rngs": rngs}
        width, side = config.channels, config.side
        convs = []
        while side > _KERNEL:
            convs.append(conv(width, width, _KERNEL, stride=2, padding=((1, 1), (1, 1)), **kw))
            side //= 2
        convs.append(conv(width, width, side, stride=side, padding=((0, 0), (0, 0)), **kw))
        self.convs = nnx.List(convs)
        self.norms = nnx.List(
            GroupNorm(width, config.norm_num_groups, eps=1e-5, **kw) for _ in convs
        )
        self.out = pointwise(width, 1, **kw)
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """Return logits [B] float32, above 0 for real, of the middle x [B, side, side, C]."""
        x = x.astype(self.dtype)
        for one, norm in zip(self.convs, self.norms, strict=True):
            x = silu(norm(one(x)))
        return self.out(x).astype(jnp.float32).mean(axis=(1, 2, 3))  # [B, 1, 1, 1] -> [B]
