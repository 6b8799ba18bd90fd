"""Dense layers and convolutions: products in `dtype`, gradients of the parameters in float32.

Differentiating `x @ kernel.astype(bfloat16)` gives the gradient of the kernel in bfloat16: each
device rounds its part, and the sum over devices is taken in bfloat16 too. Here that product
leaves the matrix unit in float32, the dtype of its accumulation. Gradients are summed over devices
and micro-batches in float32. The forward pass does not change.

A frozen kernel may be kept in int8, with a scale for each output (`sdjax.models.int8`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from sdjax.models.placement import summed

Array = jax.Array
Dtype = Any
Padding = tuple[tuple[int, int], tuple[int, int]]


class Adapter(Protocol):
    """Stands in for a layer's product; see `sdjax.models.adapters.factors`."""

    def __call__(self, layer: Linear | Conv, x: Array) -> Array:
        """Return what the layer makes of x, in its dtype, with its bias."""


class Linear(nnx.Module):
    """A dense layer: x [..., in] @ kernel [in, out] + bias [out]."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        bias: bool = True,
        kernel_init: Callable[..., Array],
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape, zeros = (features_in, features_out), nnx.initializers.zeros
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        # Zeros take a key like any other draw, so that layers draw the same values as flax's own.
        self.bias = nnx.Param(zeros(rngs.params(), shape[1:], param_dtype)) if bias else None
        self.dtype = dtype
        self.kernel_scale: Any = nnx.data(None)  # of a kernel in int8
        self.adapter: Any = nnx.data(None)

    def __call__(self, x: Array) -> Array:
        """Map x [..., in] to [..., out] in `dtype`."""
        (y,) = self.parts(x, 1)
        return y

    def product(self, x: Array, kernel: Array) -> Array:
        """Return x [..., in] times a kernel [in, any], as the layer multiplies by its own."""
        return dense(x, kernel)

    def own_product(self, x: Array) -> Array:
        """Return x [..., in] times the layer's own kernel."""
        return _times(x, self.kernel[...], _array(self.kernel_scale))

    def biased(self, y: Array) -> Array:
        """Return y [..., out] with the layer's bias, if it has one."""
        return y if self.bias is None else _add_bias(y, self.bias[...])

    def parts(self, x: Array, count: int) -> list[Array]:
        """Return `jnp.split(self(x), count, axis=-1)`, computed by `count` products.

        The backward pass then does not join the gradients of the parts into one large array.
        """
        x = x.astype(self.dtype)
        if self.adapter is not None:
            return jnp.split(self.adapter(self, x), count, axis=-1)
        kernels, scale = jnp.split(self.kernel[...], count, axis=1), _array(self.kernel_scale)
        scales = [None] * count if scale is None else jnp.split(scale, count)
        ys = [_times(x, *pair) for pair in zip(kernels, scales, strict=True)]
        if self.bias is None:
            return ys
        biases = jnp.split(self.bias[...], count)
        return [_add_bias(y, bias) for y, bias in zip(ys, biases, strict=True)]

    def joined(self, *xs: Array) -> Array:
        """Return `self(jnp.concatenate(xs, axis=-1))`, computed by a product for each x [..., n].

        Each is split over devices in its own way, and none is copied into one large array.
        """
        if self.adapter is not None:
            return self(jnp.concatenate(xs, axis=-1))
        widths = np.cumsum([x.shape[-1] for x in xs])[:-1]
        kernels = jnp.split(self.kernel[...], widths, axis=0)
        first, *others = (
            _times(x.astype(self.dtype), kernel, _array(self.kernel_scale))
            for x, kernel in zip(xs, kernels, strict=True)
        )
        return self.biased(sum(others, start=first))


class Conv(nnx.Module):
    """A convolution of [B, H, W, in] with kernel [kH, kW, in, out], plus bias [out]."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: tuple[int, int],
        *,
        strides: tuple[int, int],
        padding: Padding,
        bias: bool = True,
        kernel_init: Callable[..., Array],
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape, zeros = (*kernel_size, channels_in, channels_out), nnx.initializers.zeros
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(zeros(rngs.params(), shape[3:], param_dtype)) if bias else None
        self.strides, self.padding, self.dtype = strides, padding, dtype
        self.kernel_scale: Any = nnx.data(None)  # of a kernel in int8
        self.adapter: Any = nnx.data(None)

    def __call__(self, x: Array) -> Array:
        """Map x [B, H, W, in] to [B, H', W', out] in `dtype`."""
        x = x.astype(self.dtype)
        if self.adapter is not None:
            return self.adapter(self, x)
        return self.biased(self.own_product(x))

    def product(self, x: Array, kernel: Array) -> Array:
        """Return the convolution of x with a kernel [kH, kW, in, any], as with the layer's own."""
        return _conv(x, kernel, self.strides, self.padding)

    def own_product(self, x: Array) -> Array:
        """Return the convolution of x with the layer's own kernel."""
        if self.kernel_scale is None:
            return self.product(x, self.kernel[...])
        codes, scale = self.kernel[...], self.kernel_scale[...]
        return conv_int8(x, codes, scale, self.strides, self.padding)

    def biased(self, y: Array) -> Array:
        """Return y [..., out] with the layer's bias, if it has one."""
        return y if self.bias is None else _add_bias(y, self.bias[...])


class Embed(nnx.Module):
    """A table [count, features] of which rows are looked up."""

    def __init__(
        self,
        count: int,
        features: int,
        *,
        embedding_init: Callable[..., Array],
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.embedding = nnx.Param(embedding_init(rngs.params(), (count, features), param_dtype))
        self.dtype = dtype

    def __call__(self, index: Array) -> Array:
        """Map integers [...] to rows [..., features] in `dtype`.

        The cast follows the look-up, so that gradients of a row that is used twice are summed in
        the table's own dtype.
        """
        return jnp.take(self.embedding[...], index, axis=0).astype(self.dtype)


def whole_kernel(layer: Linear | Conv) -> Array:
    """Return the kernel of a layer, float32 if the layer has it in int8."""
    if layer.kernel_scale is None:
        return layer.kernel[...]
    return layer.kernel[...].astype(jnp.float32) * layer.kernel_scale[...]


def _array(variable: Any) -> Array | None:
    return None if variable is None else variable[...]


def cast_first(network: nnx.Module) -> dict[str, Any]:
    """Return {path: dtype} of the parameters that a network casts to a dtype before any other use.

    Kept in that dtype they give the same numbers. The others, of norms, are used in float32.
    """
    found: dict[str, Any] = {}
    for path, module in nnx.iter_graph(network):
        if isinstance(module, Linear | Conv | Embed):
            own = [name for name in ("kernel", "bias", "embedding") if hasattr(module, name)]
            if getattr(module, "kernel_scale", None) is not None:
                own.remove("kernel")
            found |= {".".join(map(str, (*path, name))): module.dtype for name in own}
    return found


# ---- the products and their gradients ----------------------------------------------------------
# Forward rules compute the product themselves instead of calling the function that they belong to:
# a policy of jax.checkpoint such as "dots_saveable" does not see into such a function.


@jax.custom_vjp
def dense(x: Array, kernel: Array) -> Array:
    """Return x [..., in] @ kernel [in, out] in the dtype of x; see above for the gradients."""
    return x @ kernel.astype(x.dtype)


def _dense_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel.astype(x.dtype), (x, kernel)


def _dense_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    batch = tuple(range(x.ndim - 1))
    dkernel = lax.dot_general(x, dy, ((batch, batch), ((), ())), preferred_element_type=jnp.float32)
    return dy @ kernel.astype(dy.dtype).T, dkernel.astype(kernel.dtype)


dense.defvjp(_dense_forward, _dense_backward)


def _times(x: Array, kernel: Array, scale: Array | None) -> Array:
    """Return x times a kernel; a scale is that of one in int8."""
    return dense(x, kernel) if scale is None else dense_int8(x, kernel, scale)


@jax.custom_vjp
def dense_int8(x: Array, codes: Array, scale: Array) -> Array:
    """Return x [..., in] @ (codes int8 [in, out] * scale [out]) in the dtype of x.

    Codes and scales are frozen: they have no gradients, and are what the backward pass keeps.
    """
    return _scaled(x @ codes.astype(x.dtype), scale)


def _scaled(y: Array, scale: Array) -> Array:
    """Return y [..., out] times the scale, which is rounded with the result alone."""
    return (y.astype(jnp.float32) * scale).astype(y.dtype)


def _dense_int8_forward(x: Array, codes: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return _scaled(x @ codes.astype(x.dtype), scale), (codes, scale)


def _dense_int8_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    codes, scale = saved
    return _scaled(dy, scale) @ codes.astype(dy.dtype).T, None, None


dense_int8.defvjp(_dense_int8_forward, _dense_int8_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def conv_int8(
    x: Array, codes: Array, scale: Array, strides: tuple[int, int], padding: Padding
) -> Array:
    """Return the convolution of x [B, H, W, in] with (codes int8 [kH, kW, in, out] * scale [out]).

    See `dense_int8`.
    """
    return _scaled(_convolve(x, codes.astype(x.dtype), strides, padding), scale)


def _conv_int8_forward(
    x: Array, codes: Array, scale: Array, strides: tuple[int, int], padding: Padding
) -> tuple[Array, tuple[Any, Array, Array]]:
    y = _scaled(_convolve(x, codes.astype(x.dtype), strides, padding), scale)
    return y, (jnp.zeros((0, *x.shape[1:]), x.dtype), codes, scale)


def _conv_int8_backward(
    strides: tuple[int, int], padding: Padding, saved: tuple[Any, Array, Array], dy: Array
) -> tuple[Array, None, None]:
    like, codes, scale = saved  # of x the backward pass needs the shape alone
    x = jax.ShapeDtypeStruct((len(dy), *like.shape[1:]), dy.dtype)
    wide = codes.astype(dy.dtype)
    back = jax.linear_transpose(lambda x: _convolve(x, wide, strides, padding), x)
    return back(_scaled(dy, scale))[0], None, None


conv_int8.defvjp(_conv_int8_forward, _conv_int8_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Array:
    return _convolve(x, kernel.astype(x.dtype), strides, padding)


def _convolve(x: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


def _conv_forward(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel.astype(x.dtype), strides, padding), (x, kernel)


def _conv_backward(
    strides: tuple[int, int], padding: Padding, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    narrow = kernel.astype(x.dtype)
    dx = jax.linear_transpose(lambda x: _convolve(x, narrow, strides, padding), x)(dy)[0]
    return dx, _conv_dkernel(x, dy, kernel.shape, strides, padding).astype(kernel.dtype)


_conv.defvjp(_conv_forward, _conv_backward)


def _conv_dkernel(
    x: Array, dy: Array, shape: tuple[int, ...], strides: tuple[int, int], padding: Padding
) -> Array:
    """The gradient of the kernel, [kH, kW, in, out] float32: x convolved with dy."""
    pads = [
        (low, shape[i] + (dy.shape[i + 1] - 1) * strides[i] - x.shape[i + 1] - low)
        for i, (low, _) in enumerate(padding)
    ]
    correlate = partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding=pads,
        rhs_dilation=strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )

    def ordered(x: Array, dy: Array) -> Array:
        # cuDNN gives [out, kH, kW, in]. Here the array is half as large as in float32, and the
        # optimizer reads arrays of one layout.
        return with_layout_constraint(correlate(x, dy), Layout((0, 1, 2, 3)))

    # cuDNN has no such convolution from 16 bits to 32: it accumulates in 32 bits and rounds the
    # result of each device.
    rounded = partial(summed, ordered)
    wide = partial(correlate, preferred_element_type=jnp.float32)
    return lax.platform_dependent(x, dy, cuda=rounded, rocm=rounded, default=wide)


@jax.custom_vjp
def _add_bias(y: Array, bias: Array) -> Array:
    return y + bias.astype(y.dtype)


def _add_bias_forward(y: Array, bias: Array) -> tuple[Array, Array]:
    return y + bias.astype(y.dtype), bias


def _add_bias_backward(bias: Array, dy: Array) -> tuple[Array, Array]:
    return dy, dy.astype(jnp.float32).sum(range(dy.ndim - 1)).astype(bias.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)
