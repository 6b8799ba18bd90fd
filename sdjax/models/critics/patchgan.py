"""The PatchGAN critic of latent diffusion: real or made, for each patch of a picture.

taming-transformers modules/discriminator/model.py, NLayerDiscriminator, whose names it has; with
three layers a patch is 70 pixels wide. Batch norm takes its statistics from the batch at hand, as
the reference does in training, and under `jit` that is the global batch on any mesh.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdjax.models.config import check
from sdjax.models.layers import Array, Dtype, normal_init
from sdjax.models.placement import activation
from sdjax.models.products import Conv

_STD = 0.02  # of drawn kernels and scales (util.py, weights_init)
_KERNEL = 4
_MOST_WIDER = 8  # the widest layer has 8 times `width` channels
_EPS = 1e-5  # torch.nn.BatchNorm2d


@dataclasses.dataclass(frozen=True)
class PatchGANConfig:
    """The shape of a critic; the defaults are latent diffusion's.

    width: channels of the first layer (ndf).
    layers: those that halve the picture (n_layers).
    """

    in_channels: int = 3
    width: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        check(1 <= self.in_channels <= 4096, "in_channels", self.in_channels, "1 to 4096")
        check(1 <= self.width <= 4096, "width", self.width, "1 to 4096")
        check(1 <= self.layers <= 8, "layers", self.layers, "1 to 8")

    @property
    def least_side(self) -> int:
        """The side of the smallest picture that has a patch, in pixels."""
        return 3 * 2**self.layers  # the two last layers take one row each from 3


class LeakyReLU(nnx.Module):
    """The activation max(x, 0.2 x)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.leaky_relu(x, 0.2)


class BatchNorm(nnx.Module):
    """Normalisation of [B, H, W, C] by the batch's own mean and variance, in float32."""

    def __init__(self, channels: int, *, dtype: Dtype, param_dtype: Dtype, rngs: Any):
        drawn = normal_init(_STD)(rngs.params(), (channels,), param_dtype)
        self.scale = nnx.Param(1.0 + drawn)
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """Map x [B, H, W, C] to the same shape, in `dtype`."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=(0, 1, 2))
        variance = jnp.mean(jnp.square(x), axis=(0, 1, 2))
        y = x * (jax.lax.rsqrt(variance + _EPS) * self.scale[...]) + self.bias[...]
        return y.astype(self.dtype)


class PatchGAN(nnx.Module):
    """The critic.

    Args:
        config: the shape.
        dtype: of convolutions and activations.
        param_dtype: of the parameters.
        remat: takes no effect: its activations are few beside those of an autoencoder.
        rngs: draws the parameters; not kept.
    """

    def __init__(
        self,
        config: PatchGANConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        main: list[nnx.Module] = [
            _conv(config.in_channels, config.width, stride=2, **kw), LeakyReLU(),
        ]  # fmt: skip
        channels = config.width
        for i in range(1, config.layers + 1):
            width = config.width * min(2**i, _MOST_WIDER)
            stride = 2 if i < config.layers else 1
            main += [
                _conv(channels, width, stride=stride, bias=False, **kw),
                BatchNorm(width, **kw), LeakyReLU(),
            ]  # fmt: skip
            channels = width
        self.main = nnx.List([*main, _conv(channels, 1, stride=1, **kw)])
        self.config, self.dtype = config, dtype

    def __call__(self, images: Array) -> Array:
        """Map images [B, H, W, 3] in [-1, 1] to logits [B, h, w], float32: above 0 is real."""
        x = images.astype(self.dtype)
        for layer in self.main:
            x = activation(layer(x))
        return x[..., 0].astype(jnp.float32)


def _conv(
    channels_in: int, channels_out: int, *, stride: int, bias: bool = True, **kw: Any
) -> Conv:
    """A convolution of 4 x 4, whose kernel is drawn from N(0, 0.02^2)."""
    made = Conv(
        channels_in,
        channels_out,
        (_KERNEL, _KERNEL),
        strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        bias=bias,
        kernel_init=normal_init(_STD),
        **kw,
    )
    if bias:  # torch.nn.Conv2d's own, which weights_init leaves
        bound = 1 / math.sqrt(_KERNEL * _KERNEL * channels_in)
        key, shape, dtype = kw["rngs"].params(), (channels_out,), kw["param_dtype"]
        made.bias = nnx.Param(jax.random.uniform(key, shape, dtype, -bound, bound))
    return made
