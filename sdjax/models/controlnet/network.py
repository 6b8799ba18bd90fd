"""ControlNet (Zhang et al. 2023) for Stable Diffusion 1, 2 and XL (diffusers `ControlNetModel`).

A copy of a UNet's way down reads a condition picture besides the noisy latents. Convolutions that
start at zero carry its maps to the UNet, which stays as it is: at the start nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdjax.models.controlnet.config import ControlNetConfig
from sdjax.models.layers import Array, Dtype, conv, pointwise, silu
from sdjax.models.placement import activation
from sdjax.models.unet import Descent, Residuals


class ConditionEmbedding(nnx.Module):
    """Convolutions that bring a condition picture to the size of the latents; the last is zero."""

    def __init__(self, config: ControlNetConfig, **kw: Any):
        widths = config.conditioning_embedding_out_channels
        self.conv_in = conv(config.conditioning_channels, widths[0], **kw)
        blocks = []
        for width, wider in zip(widths, widths[1:], strict=False):
            blocks += [conv(width, width, **kw), conv(width, wider, stride=2, **kw)]
        self.blocks = nnx.List(blocks)
        self.conv_out = conv(widths[-1], config.block_out_channels[0], zero=True, **kw)

    def __call__(self, condition: Array) -> Array:
        """Map a picture [B, H, W, 3] to [B, h, w, C], h = H / 8 for Stable Diffusion."""
        x = silu(self.conv_in(condition))
        for block in self.blocks:
            x = silu(block(x))
        return activation(self.conv_out(x))


class ControlNet(Descent):
    """Says what a condition picture adds to the maps of a UNet.

    Args: see `UNet`.
    """

    def __init__(
        self,
        config: ControlNetConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(config.unet, remat=remat, **kw)
        widths, layers = config.block_out_channels, config.layers_per_block
        carried = [widths[0]]  # of the maps on the way down, the first being that of conv_in
        for width in widths:
            carried += [width] * (layers + 1)
        carried.pop()  # the last level is not halved
        self.controlnet_cond_embedding = ConditionEmbedding(config, **kw)
        self.controlnet_down_blocks = nnx.List(pointwise(c, c, zero=True, **kw) for c in carried)
        self.controlnet_mid_block = pointwise(widths[-1], widths[-1], zero=True, **kw)
        self.control = config

    def __call__(
        self,
        xt: Array,
        timesteps: Array,
        context: Array | Mapping[str, Array],
        condition: Array,
        *,
        key: Array | None = None,
    ) -> Residuals:
        """Runs the network.

        Args:
            xt, timesteps, context, key: as the UNet gets them.
            condition: the picture, [B, H, W, 3] in [0, 1], of the size that is drawn.
        """
        factor, size = self.control.downscale, (xt.shape[1], xt.shape[2])
        if condition.shape[1:3] != (factor * size[0], factor * size[1]):
            raise ValueError(
                f"the condition has {list(condition.shape)} for latents {list(xt.shape)}; expected "
                f"{factor} times their height and width"
            )
        if self.control.controlnet_conditioning_channel_order == "bgr":
            condition = condition[..., ::-1]
        temb, context = self.conditioning(timesteps, context)
        x = activation(self.conv_in(xt.astype(self.dtype)))
        x = x + self.controlnet_cond_embedding(condition.astype(self.dtype))
        contexts = [context] * (len(self.down_blocks) + 1)
        x, skips = self.descend(x, temb, contexts, key)
        down = [carry(s) for carry, s in zip(self.controlnet_down_blocks, skips, strict=True)]
        made = Residuals(tuple(map(activation, down)), activation(self.controlnet_mid_block(x)))
        return _pooled(made) if self.control.global_pool_conditions else made


def _pooled(residuals: Residuals) -> Residuals:
    """The mean over height and width, [B, 1, 1, C]."""
    down, mid = residuals
    mean = lambda x: jnp.mean(x, axis=(1, 2), keepdims=True)  # noqa: E731
    return Residuals(tuple(map(mean, down)), mean(mid))


def guess_scales(count: int) -> np.ndarray:
    """Return the factors of guess mode, from 0.1 for the first map to 1 for the middle.

    diffusers controlnet.py, "6. scaling".

    Args:
        count: of the maps on the way down and the middle together.
    """
    return np.logspace(-1, 0, count, dtype=np.float32)


def scaled(residuals: Residuals, weight: float | Array, *, guess: bool = False) -> Residuals:
    """Return residuals times a weight.

    Args:
        weight: one for all, or [B, 1, 1, 1].
        guess: weaken those of the finer maps; see `guess_scales`.
    """
    down, mid = residuals
    factors = guess_scales(len(down) + 1) if guess else np.ones(len(down) + 1, np.float32)
    *made, middle = [
        (x * (weight * factor)).astype(x.dtype)
        for x, factor in zip((*down, mid), factors, strict=True)
    ]
    return Residuals(tuple(made), middle)


def total(each: list[Residuals]) -> Residuals:
    """Return the sum of what several ControlNets add; [B, 1, 1, C] is added everywhere."""
    down, mid = each[0]
    for more in each[1:]:
        down = tuple(a + b for a, b in zip(down, more.down, strict=True))
        mid = mid + more.mid
    return Residuals(down, mid)
