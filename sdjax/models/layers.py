"""The layers of the networks: arrays in, arrays out, channels last.

Precision: parameters in `param_dtype`; matrix products and convolutions in `dtype`; statistics of
the norms, softmax and timestep phases in float32. Every constructor takes the keyword arguments
`dtype, param_dtype, rngs` (`**kw` below); `rngs` serves for drawing parameters and is not kept.

Dropout and rematerialisation are functions: dropout takes an explicit key, because an `nnx.Rngs`
that passes through `jax.checkpoint` would give every block the same mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdjax.models import capture
from sdjax.models.kernels.flash import RESIDUALS
from sdjax.models.products import Conv, Linear

Array = jax.Array
Dtype = Any


def fan_in_uniform(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """Draw U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of torch.nn.Linear and Conv2d.

    That is kaiming_uniform(a=sqrt(5)), of variance 1 / (3 fan_in).
    """
    size = math.prod(shape)
    bound = (shape[-1] / size) ** 0.5
    # A draw in one dimension has the same values as one in `shape`, and compiles 3 times as fast.
    return jax.random.uniform(key, (size,), dtype, -bound, bound).reshape(shape)


def normal_init(std: float) -> Callable:
    """An initialiser N(0, std^2), which draws in one dimension as above."""

    def draw(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
        return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)

    return draw


def linear(
    features_in: int, features_out: int, *, bias: bool = True, zero: bool = False, **kw: Any
) -> Linear:
    """A dense layer; `zero` starts it at zero (LDM `zero_module`, util.py)."""
    init = nnx.initializers.zeros if zero else fan_in_uniform
    return Linear(features_in, features_out, bias=bias, kernel_init=init, **kw)


def conv(
    channels_in: int,
    channels_out: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    padding: Any = None,
    zero: bool = False,
    **kw: Any,
) -> Conv:
    """A 2-D convolution, channels last, padded to keep the size unless `padding` is given."""
    init = nnx.initializers.zeros if zero else fan_in_uniform
    pad = (kernel - 1) // 2
    return Conv(
        channels_in,
        channels_out,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)) if padding is None else padding,
        kernel_init=init,
        **kw,
    )


def pointwise(channels_in: int, channels_out: int, *, zero: bool = False, **kw: Any) -> Conv:
    """A 1x1 convolution."""
    return conv(channels_in, channels_out, 1, zero=zero, **kw)


class GroupNorm(nnx.Module):
    """Group normalisation over [B, ..., C] with two-pass float32 statistics (LDM `GroupNorm32`)."""

    def __init__(
        self,
        channels: int,
        groups: int,
        *,
        eps: float,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if channels % groups:
            raise ValueError(f"norm_num_groups = {groups}: expected a divisor of {channels}")
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))
        self.groups, self.eps, self.dtype = groups, eps, dtype

    def __call__(self, x: Array) -> Array:
        """Normalise x [B, ..., C]; the result has its shape, in `dtype`."""
        shape, channels = x.shape, x.shape[-1]
        x = x.astype(jnp.float32).reshape(shape[0], -1, channels)  # [B, N, C]

        # Reducing over positions first, and then over the channels of a group, keeps the large
        # array in one layout. A [.., G, C/G] view would have a short innermost dimension.
        def group_mean(per_channel: Array) -> Array:  # [B, C] -> [B, 1, C]
            grouped = per_channel.reshape(-1, self.groups, channels // self.groups).mean(-1)
            return jnp.repeat(grouped, channels // self.groups, axis=-1)[:, None]

        x = x - group_mean(x.mean(1))
        variance = group_mean(jnp.square(x).mean(1))
        scale = jax.lax.rsqrt(variance + self.eps) * self.scale[...].astype(jnp.float32)
        y = x * scale + self.bias[...].astype(jnp.float32)
        return y.astype(self.dtype).reshape(shape)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis with two-pass float32 statistics."""

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Array) -> Array:
        """Normalise x [..., C]; the result has its shape, in `dtype`."""
        y = normalised(x, self.eps) * self.scale[...].astype(jnp.float32)
        return (y + self.bias[...].astype(jnp.float32)).astype(self.dtype)


def normalised(x: Array, eps: float) -> Array:
    """Return x [..., C] with mean 0 and variance 1 along its last axis, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + eps)


class RMSNorm(nnx.Module):
    """Division of the last axis by its root mean square, in float32, and a learned scale.

    No mean is subtracted and there is no bias (arXiv:1910.07467).
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Array) -> Array:
        """Normalise x [..., C]; the result has its shape, in `dtype`."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (x * self.scale[...].astype(jnp.float32)).astype(self.dtype)


def silu(x: Array) -> Array:
    """The activation x sigmoid(x)."""
    return jax.nn.silu(x)


def gelu(x: Array) -> Array:
    """The exact, erf-based GELU of UNets; see `gelu_tanh` for the approximation."""
    # torch's formula, x (1 + erf(x / sqrt 2)) / 2: jax.nn.gelu's erfc takes twice the time on CPUs.
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of the GELU, which diffusion transformers and T5 v1.1 have."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def quick_gelu(x: Array) -> Array:
    """The activation x sigmoid(1.702 x) of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Apply inverted dropout; the identity when `key` is None or `rate` is 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x)).astype(x.dtype)


def fold_key(key: Array | None, index: int) -> Array | None:
    """The dropout key of block `index` within the module that holds `key`; None stays None."""
    return None if key is None else jax.random.fold_in(key, index)


def timestep_embedding(
    timesteps: Array, channels: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0
) -> Array:
    """The sinusoidal embedding of timesteps [B], float32 [B, channels] (diffusers embeddings.py).

    `flip_sin_to_cos` puts the cosines first. bfloat16 would distinguish only 507 of 1000 timesteps.
    """
    half = channels // 2
    # On the host: at t = 999 the error of an accelerator's exp would be visible in the phases.
    # Rounded once, which torch's exp does for all but 1 in 50 of them and numpy's for half.
    exponent = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32)
    exponent = (exponent / np.float32(half - freq_shift)).astype(np.float64)
    frequencies = np.exp(exponent).astype(np.float32)
    phases = timesteps.astype(jnp.float32)[:, None] * frequencies  # [B, half]
    waves = (jnp.cos(phases), jnp.sin(phases))
    return jnp.concatenate(waves if flip_sin_to_cos else waves[::-1], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two dense layers with SiLU between, over a sinusoidal embedding or a pooled caption.

    Args:
        condition: width of what is added to the embedding through a dense layer that starts at
            zero; None for nothing.
    """

    def __init__(
        self, channels: int, time_channels: int, *, condition: int | None = None, **kw: Any
    ):
        self.cond_proj = (
            None if condition is None else linear(condition, channels, bias=False, zero=True, **kw)
        )
        self.linear_1 = linear(channels, time_channels, **kw)
        self.linear_2 = linear(time_channels, time_channels, **kw)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """x [B, channels], condition [B, width] -> [B, time_channels]."""
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(silu(self.linear_1(x)))


def upsample_nearest(x: Array, height: int, width: int) -> Array:
    """Repeat each pixel of [B, H, W, C] to [B, height, width, C], twice the size or one less.

    Equals torch's interpolate(size=..., mode="nearest") at these sizes.
    Raises ValueError for other sizes.
    """
    b, h, w, c = x.shape
    if height not in (2 * h, 2 * h - 1) or width not in (2 * w, 2 * w - 1):
        raise ValueError(f"cannot upsample ({h}, {w}) to ({height}, {width}): not double the size")
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return x[:, :height, :width]


def check_remat(remat: str) -> None:
    """Raise a ValueError unless `remat` is a value that `rematerialised` takes."""
    if remat not in ("none", "block", "attention", "full") and remat not in _policies():
        raise ValueError(
            f"remat = {remat!r}: expected 'none', 'block', 'attention', 'full' or the name of a "
            f"jax.checkpoint policy ({', '.join(_policies())})"
        )


def rematerialised(function: Callable, remat: str, *, level: str) -> Callable:
    """Return `function`, recomputed in the backward pass if `remat` applies at its level.

    Args:
        function: a module or function of arrays (and None); it may close over parameters.
        remat: "none" stores all activations. "block" recomputes each residual or transformer block.
            "attention" does so too, but keeps the outputs of its flash kernels (of long sequences,
            on TPUs), so that they need not run again. "full" recomputes each stage of the network
            at once, and nothing within it is stored beyond the needs of its backward pass. The name
            of a policy works at blocks and stores the arrays that the policy allows.
        level: "block" or "stage", the size of `function`.
    """
    if remat == "none" or level != ("stage" if remat == "full" else "block"):
        return function
    capture.refuse_remat(remat)
    policy = None
    if remat == "attention":
        policy = jax.checkpoint_policies.save_only_these_names(RESIDUALS)
    elif remat not in ("block", "full"):
        policy = getattr(jax.checkpoint_policies, remat)
    return jax.checkpoint(lambda *args: function(*args), policy=policy)


def _policies() -> tuple[str, ...]:
    """The policies that are used by name alone; jax's other policies need arguments."""
    return (
        "everything_saveable",
        "nothing_saveable",
        "dots_saveable",
        "checkpoint_dots",
        "dots_with_no_batch_dims_saveable",
        "checkpoint_dots_with_no_batch_dims",
    )
