"""Residual blocks and changes of resolution, shared by the UNet and the VAE.

Attribute names are those of diffusers (models/resnet.py, downsampling.py, upsampling.py).
"""

from __future__ import annotations

from typing import Any

from flax import nnx

from sdjax.models import capture
from sdjax.models.layers import (
    Array,
    GroupNorm,
    conv,
    dropout,
    linear,
    pointwise,
    silu,
    upsample_nearest,
)
from sdjax.models.placement import activation


class ResnetBlock(nnx.Module):
    """A residual block: norm, silu, conv; the time embedding; norm, silu, dropout, conv; the input.

    Args:
        channels_in, channels_out: widths; a 1x1 convolution carries the input where they differ.
        time_channels: width of the time embedding, None for networks without (the VAE).
        groups, eps: of both norms.
        dropout: rate before the second convolution.
        zero: start the second convolution at zero, so that the block starts as the identity
            (LDM openaimodel.py, ResBlock).
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        time_channels: int | None,
        groups: int,
        eps: float,
        dropout: float = 0.0,
        zero: bool = False,
        **kw: Any,
    ):
        self.norm1 = GroupNorm(channels_in, groups, eps=eps, **kw)
        self.conv1 = conv(channels_in, channels_out, **kw)
        self.time_emb_proj = linear(time_channels, channels_out, **kw) if time_channels else None
        self.norm2 = GroupNorm(channels_out, groups, eps=eps, **kw)
        self.conv2 = conv(channels_out, channels_out, zero=zero, **kw)
        same = channels_in == channels_out
        self.conv_shortcut = None if same else pointwise(channels_in, channels_out, **kw)
        self.dropout = dropout

    def __call__(self, x: Array, temb: Array | None = None, key: Array | None = None) -> Array:
        """Map x [B, H, W, C_in], temb [B, T] or None, dropout key or None to [B, H, W, C_out]."""
        hidden = self.conv1(silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(silu(temb))[:, None, None]  # type: ignore[arg-type]
        hidden = dropout(silu(self.norm2(hidden)), self.dropout, key)
        hidden = self.conv2(hidden)
        carried = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return capture.output(self, activation(hidden + carried))


class Downsample(nnx.Module):
    """A strided convolution that halves the sizes, rounded up if symmetric and down if not.

    The UNet pads by 1 on all sides; the VAE below and to the right only (diffusers
    downsampling.py, `padding == 0`).
    """

    def __init__(self, channels: int, *, symmetric: bool, **kw: Any):
        padding = ((1, 1), (1, 1)) if symmetric else ((0, 1), (0, 1))
        self.conv = conv(channels, channels, stride=2, padding=padding, **kw)

    def __call__(self, x: Array) -> Array:
        return capture.output(self, activation(self.conv(x)))


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling to `size`, twice the input's or one less, and a convolution."""

    def __init__(self, channels: int, **kw: Any):
        self.conv = conv(channels, channels, **kw)

    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        return capture.output(self, activation(self.conv(upsample_nearest(x, height, width))))


def with_added(x: Array, added: Array | None) -> Array:
    """Return x [B, H, W, C] plus the map of a T2I-Adapter, if there is one.

    Raises:
        ValueError: they differ in size.
    """
    if added is None:
        return x
    if added.shape != x.shape:
        raise ValueError(
            f"a T2I-Adapter's map has {list(added.shape)}, the UNet's {list(x.shape)}; expected a "
            "condition of the size that is drawn"
        )
    return x + added.astype(x.dtype)
