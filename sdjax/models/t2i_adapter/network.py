"""T2I-Adapter (Mou et al. 2023, arXiv:2302.08453) for Stable Diffusion 1, 2 and XL.

A small network of convolutions reads a condition picture, and its maps are added to those of a
UNet's way down. It sees neither the noisy latents nor the timestep: one run serves all steps of
drawing. Attribute names are those of diffusers (models/adapter.py, `T2IAdapter`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdjax.models import capture
from sdjax.models.layers import Array, Dtype, check_remat, conv, pointwise, rematerialised
from sdjax.models.placement import activation
from sdjax.models.t2i_adapter.config import LIGHT, T2IAdapterConfig

_LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as PIL's convert("L")


class ResidualBlock(nnx.Module):
    """x + conv(relu(conv(x))); the second convolution is 3 x 3 in light adapters, else 1 x 1."""

    def __init__(self, width: int, *, light: bool, **kw: Any):
        self.block1 = conv(width, width, **kw)
        self.block2 = conv(width, width, 3 if light else 1, **kw)

    def __call__(self, x: Array) -> Array:
        return activation(self.block2(nnx.relu(self.block1(x))) + x)


class Block(nnx.Module):
    """The residual blocks of one map, perhaps at half of the size; light ones are narrower inside.

    Args:
        widths: of what comes in, and of the map.
    """

    def __init__(
        self, widths: tuple[int, int], count: int, *, halves: bool, light: bool, **kw: Any
    ):
        width_in, width = widths
        inner = width // 4 if light else width
        self.in_conv = pointwise(width_in, inner, **kw) if light or width_in != width else None
        self.resnets = nnx.List(ResidualBlock(inner, light=light, **kw) for _ in range(count))
        self.out_conv = pointwise(inner, width, **kw) if light else None
        self.halves = halves

    def __call__(self, x: Array) -> Array:
        """x [B, H, W, C] -> [B, H', W', C']; a half of an odd size is rounded up."""
        if self.halves:
            x = halved(x)
        if self.in_conv is not None:
            x = self.in_conv(x)
        for block in self.resnets:
            x = block(x)
        if self.out_conv is not None:
            x = self.out_conv(x)
        return capture.output(self, activation(x))


class Maps(nnx.Module):
    """The convolutions of a T2I-Adapter, under the name that diffusers' class has for them."""

    def __init__(self, config: T2IAdapterConfig, **kw: Any):
        light = config.adapter_type == LIGHT
        pixels = config.in_channels * config.downscale_factor**2
        made = config.maps
        self.conv_in = None if light else conv(pixels, made[0][0], **kw)
        before = [(pixels if light else made[0][0], config.downscale_factor), *made]
        self.body = nnx.List(
            Block(
                (width_in, width),
                config.num_res_blocks,
                halves=factor != factor_in,
                light=light,
                **kw,
            )
            for (width_in, factor_in), (width, factor) in zip(before, made, strict=False)
        )


class T2IAdapter(nnx.Module):
    """Says what a condition picture adds to the maps of a UNet's way down.

    Nothing starts at zero: unlike a ControlNet it changes what the UNet says from the start on.

    Args: see `UNet`; remat applies to the blocks of each map.
    """

    def __init__(
        self,
        config: T2IAdapterConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        check_remat(remat)
        self.adapter = Maps(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config, self.dtype, self.remat = config, dtype, remat

    def __call__(self, condition: Array) -> tuple[Array, ...]:
        """Return the maps [B, h, w, C] of a picture [B, H, W, 3] in [0, 1]; see `config.maps`.

        Raises:
            ValueError: H or W is no multiple of `downscale_factor`.
        """
        factor, size = self.config.downscale_factor, condition.shape[1:3]
        if any(side % factor for side in size):
            raise ValueError(
                f"the condition has {list(condition.shape)}; expected height and width to be "
                f"multiples of {factor}, the T2I-Adapter's downscale_factor"
            )
        if self.config.in_channels == 1:
            condition = (condition * _LUMA).sum(-1, keepdims=True)
        x = patches(condition, factor).astype(self.dtype)
        if self.adapter.conv_in is not None:
            x = activation(self.adapter.conv_in(x))
        made = []
        for block in self.adapter.body:
            x = rematerialised(block, self.remat, level="block")(x)
            made.append(x)
        return tuple(made)


def patches(x: Array, side: int) -> Array:
    """Pixels [B, H, W, C] -> [B, H / side, W / side, C side^2], as torch's PixelUnshuffle."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // side, side, w // side, side, c)
    # [B, H/s, W/s, C, s, s]
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // side, w // side, c * side * side)


def halved(x: Array) -> Array:
    """Return the mean of each 2 x 2 of [B, H, W, C], at an odd edge of what is there.

    torch's AvgPool2d(2, ceil_mode=True).
    """
    b, h, w, c = x.shape
    # A repeated edge does not change the mean of what is there.
    x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    return x.reshape(b, -(-h // 2), 2, -(-w // 2), 2, c).mean((2, 4))


def total_maps(each: Sequence[Sequence[Array]]) -> tuple[Array, ...]:
    """Return the sum of what several T2I-Adapters say, map by map."""
    most = max(map(len, each))
    columns = [[maps[i] for maps in each if i < len(maps)] for i in range(most)]
    return tuple(sum(column[1:], column[0]) for column in columns)
