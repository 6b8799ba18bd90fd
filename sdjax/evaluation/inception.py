"""InceptionV3 for the Frechet Inception distance: pytorch-fid's port of the TF-slim network.

It differs from torchvision's Inception3 (arXiv:1512.00567) in two ways. Its average pools do not
count padding, and its last block has a max pool where the paper has an average pool (pytorch-fid,
inception.py, `FIDInceptionA`, `C`, `E_1`, `E_2`). Attribute names are those of its state dict. The
classifier after the features (`fc`) is left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from sdjax.models.config import check
from sdjax.models.layers import Array, fan_in_uniform
from sdjax.models.products import Conv

SIZE = 299  # side of the square pictures
DIMS = (64, 192, 768, 2048)
_EPS = 1e-3  # of the batch norms (torchvision, BasicConv2d)
_WINDOW = (1, 3, 3, 1)


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """The width of the features, which selects their layer; they are averaged over positions.

    dims: 2048 (pool3), or 768 (before the auxiliary head), 192 or 64 (the first two max pools).
    """

    dims: int = 2048

    def __post_init__(self) -> None:
        check(self.dims in DIMS, "dims", self.dims, ", ".join(map(str, DIMS)))


class InceptionV3(nnx.Module):
    """The network from pictures [B, 299, 299, 3] in [-1, 1] to features [B, dims].

    It has all parameters, also where `dims` needs only the first of them.
    """

    def __init__(self, config: InceptionConfig, **kw: Any):
        self.config = config
        self.Conv2d_1a_3x3 = BasicConv(3, 32, 3, stride=2, **kw)
        self.Conv2d_2a_3x3 = BasicConv(32, 32, 3, **kw)
        self.Conv2d_2b_3x3 = BasicConv(32, 64, 3, padding=1, **kw)
        self.Conv2d_3b_1x1 = BasicConv(64, 80, 1, **kw)
        self.Conv2d_4a_3x3 = BasicConv(80, 192, 3, **kw)
        self.Mixed_5b = BlockA(192, 32, **kw)
        self.Mixed_5c = BlockA(256, 64, **kw)
        self.Mixed_5d = BlockA(288, 64, **kw)
        self.Mixed_6a = BlockB(288, **kw)
        self.Mixed_6b = BlockC(768, 128, **kw)
        self.Mixed_6c = BlockC(768, 160, **kw)
        self.Mixed_6d = BlockC(768, 160, **kw)
        self.Mixed_6e = BlockC(768, 192, **kw)
        self.Mixed_7a = BlockD(768, **kw)
        self.Mixed_7b = BlockE(1280, max_pool=False, **kw)
        self.Mixed_7c = BlockE(2048, max_pool=True, **kw)

    def __call__(self, x: Array) -> Array:
        """Map x [B, 299, 299, 3] float32 to [B, dims] float32."""
        stages = (
            (self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3, max_pool),
            (self.Conv2d_3b_1x1, self.Conv2d_4a_3x3, max_pool),
            (
                *(self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a),
                *(self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e),
            ),
            (self.Mixed_7a, self.Mixed_7b, self.Mixed_7c),
        )
        for stage in stages[: DIMS.index(self.config.dims) + 1]:
            for layer in stage:
                x = layer(x)
        return x.mean((1, 2))


class BasicConv(nnx.Module):
    """Convolution without bias, batch norm, ReLU: [B, H, W, C] to [B, H', W', features]."""

    def __init__(
        self,
        channels: int,
        features: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        **kw: Any,
    ):
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = (padding, padding) if isinstance(padding, int) else padding
        self.conv = Conv(
            channels,
            features,
            size,
            strides=(stride, stride),
            padding=((pad[0], pad[0]), (pad[1], pad[1])),
            bias=False,
            kernel_init=fan_in_uniform,
            **kw,
        )
        self.bn = BatchNorm(features)

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(self.bn(self.conv(x)))


class BatchNorm(nnx.Module):
    """Batch norm with the statistics of the weights file, never of the batch."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))
        self.running_mean = nnx.Param(jnp.zeros((channels,)))
        self.running_var = nnx.Param(jnp.ones((channels,)))

    def __call__(self, x: Array) -> Array:
        scale = self.scale[...] * lax.rsqrt(self.running_var[...] + _EPS)
        return (x - self.running_mean[...]) * scale + self.bias[...]


class BlockA(nnx.Module):
    """The block at 35x35: [B, H, W, C] to [B, H, W, 224 + pool_features]."""

    def __init__(self, channels: int, pool_features: int, **kw: Any):
        self.branch1x1 = BasicConv(channels, 64, 1, **kw)
        self.branch5x5_1 = BasicConv(channels, 48, 1, **kw)
        self.branch5x5_2 = BasicConv(48, 64, 5, padding=2, **kw)
        self.branch3x3dbl_1 = BasicConv(channels, 64, 1, **kw)
        self.branch3x3dbl_2 = BasicConv(64, 96, 3, padding=1, **kw)
        self.branch3x3dbl_3 = BasicConv(96, 96, 3, padding=1, **kw)
        self.branch_pool = BasicConv(channels, pool_features, 1, **kw)

    def __call__(self, x: Array) -> Array:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return _concat(self.branch1x1(x), five, double, self.branch_pool(average_pool(x)))


class BlockB(nnx.Module):
    """The block from 35x35 to 17x17: [B, H, W, C] to [B, H', W', 480 + C]."""

    def __init__(self, channels: int, **kw: Any):
        self.branch3x3 = BasicConv(channels, 384, 3, stride=2, **kw)
        self.branch3x3dbl_1 = BasicConv(channels, 64, 1, **kw)
        self.branch3x3dbl_2 = BasicConv(64, 96, 3, padding=1, **kw)
        self.branch3x3dbl_3 = BasicConv(96, 96, 3, stride=2, **kw)

    def __call__(self, x: Array) -> Array:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return _concat(self.branch3x3(x), double, max_pool(x))


class BlockC(nnx.Module):
    """The block at 17x17, [B, H, W, C] to 768 channels.

    Its 7x7 convolutions are in two parts, with `inner` channels between.
    """

    def __init__(self, channels: int, inner: int, **kw: Any):
        row = {"kernel": (1, 7), "padding": (0, 3), **kw}
        column = {"kernel": (7, 1), "padding": (3, 0), **kw}
        self.branch1x1 = BasicConv(channels, 192, 1, **kw)
        self.branch7x7_1 = BasicConv(channels, inner, 1, **kw)
        self.branch7x7_2 = BasicConv(inner, inner, **row)
        self.branch7x7_3 = BasicConv(inner, 192, **column)
        self.branch7x7dbl_1 = BasicConv(channels, inner, 1, **kw)
        self.branch7x7dbl_2 = BasicConv(inner, inner, **column)
        self.branch7x7dbl_3 = BasicConv(inner, inner, **row)
        self.branch7x7dbl_4 = BasicConv(inner, inner, **column)
        self.branch7x7dbl_5 = BasicConv(inner, 192, **row)
        self.branch_pool = BasicConv(channels, 192, 1, **kw)

    def __call__(self, x: Array) -> Array:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return _concat(self.branch1x1(x), seven, double, self.branch_pool(average_pool(x)))


class BlockD(nnx.Module):
    """The block from 17x17 to 8x8: [B, H, W, C] to [B, H', W', 512 + C]."""

    def __init__(self, channels: int, **kw: Any):
        self.branch3x3_1 = BasicConv(channels, 192, 1, **kw)
        self.branch3x3_2 = BasicConv(192, 320, 3, stride=2, **kw)
        self.branch7x7x3_1 = BasicConv(channels, 192, 1, **kw)
        self.branch7x7x3_2 = BasicConv(192, 192, (1, 7), padding=(0, 3), **kw)
        self.branch7x7x3_3 = BasicConv(192, 192, (7, 1), padding=(3, 0), **kw)
        self.branch7x7x3_4 = BasicConv(192, 192, 3, stride=2, **kw)

    def __call__(self, x: Array) -> Array:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return _concat(three, self.branch7x7x3_4(seven), max_pool(x))


class BlockE(nnx.Module):
    """The block at 8x8, [B, H, W, C] to 2048 channels.

    Its 3x3 convolutions split into rows and columns.
    max_pool: whether the pool of the last branch takes the maximum; else the average.
    """

    def __init__(self, channels: int, *, max_pool: bool, **kw: Any):
        row = {"kernel": (1, 3), "padding": (0, 1), **kw}
        column = {"kernel": (3, 1), "padding": (1, 0), **kw}
        self.branch1x1 = BasicConv(channels, 320, 1, **kw)
        self.branch3x3_1 = BasicConv(channels, 384, 1, **kw)
        self.branch3x3_2a = BasicConv(384, 384, **row)
        self.branch3x3_2b = BasicConv(384, 384, **column)
        self.branch3x3dbl_1 = BasicConv(channels, 448, 1, **kw)
        self.branch3x3dbl_2 = BasicConv(448, 384, 3, padding=1, **kw)
        self.branch3x3dbl_3a = BasicConv(384, 384, **row)
        self.branch3x3dbl_3b = BasicConv(384, 384, **column)
        self.branch_pool = BasicConv(channels, 192, 1, **kw)
        self.max_pool = max_pool

    def __call__(self, x: Array) -> Array:
        three = self.branch3x3_1(x)
        three = _concat(self.branch3x3_2a(three), self.branch3x3_2b(three))
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        double = _concat(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double))
        pooled = max_pool(x, stride=1, padding=1) if self.max_pool else average_pool(x)
        return _concat(self.branch1x1(x), three, double, self.branch_pool(pooled))


def max_pool(x: Array, *, stride: int = 2, padding: int = 0) -> Array:
    """The maximum over 3x3 positions of [B, H, W, C]."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, _WINDOW, (1, stride, stride, 1), pads)


def average_pool(x: Array) -> Array:
    """The mean over 3x3 positions of [B, H, W, C], without those outside; the same shape."""
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    total = lax.reduce_window(x, 0.0, lax.add, _WINDOW, (1, 1, 1, 1), pads)
    inside = [np.full(size, 3.0, np.float32) for size in x.shape[1:3]]
    for counts in inside:
        counts[0] -= 1
        counts[-1] -= 1
    return total / np.outer(*inside)[None, :, :, None]


def _concat(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)
