"""Kernels in int8: how far they are from what was loaded, and what layers make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdjax.models import int8, weights
from sdjax.models.products import Conv, Linear, cast_first, whole_kernel

pytestmark = pytest.mark.unit
RNG = np.random.default_rng(0)


def drawn(*shape):
    return (0.03 * RNG.normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize(
    "path, shape, scales",
    [
        ("unet.a.kernel", (40, 24), (24,)),
        ("unet.conv.kernel", (3, 3, 8, 5), (5,)),
        ("transformer.blocks.0-2.ff.kernel", (3, 16, 6), (3, 6)),
    ],
)
def test_no_weight_is_further_than_half_a_scale(path, shape, scales):
    kernel = drawn(*shape)
    kernel[..., 0] = 0
    kernel[..., 1] *= 1000
    codes, scale = int8.quantised(path, kernel)
    assert codes.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == scales
    wide = scale.astype(np.float64)
    wide = wide[:, None] if len(shape) == 3 else wide
    error = np.abs(kernel - codes * wide)
    assert np.all(error <= wide / 2) and np.all(codes[..., 0] == 0)
    assert np.all(np.abs(codes).max(axis=tuple(range(len(shape) - 3 + 1, len(shape) - 1))) <= 127)
    largest = np.abs(codes.reshape(-1, shape[-1])[:, 1:]).max(axis=0)
    np.testing.assert_array_equal(largest, 127)
    again = int8.quantised(path, kernel)
    np.testing.assert_array_equal(codes, again[0])


def test_the_error_of_normal_weights_is_the_known_one():
    """0.79 % of N(0, 0.03^2), 1024 x 1024, by output."""
    kernel = drawn(1024, 1024)
    codes, scale = int8.quantised("a.kernel", kernel)
    error = np.linalg.norm(kernel - codes * scale) / np.linalg.norm(kernel)
    assert error == pytest.approx(0.0079, rel=0.02)


def layer(kind, dtype):
    options = {"kernel_init": lambda _, shape, d: jnp.asarray(drawn(*shape)), "dtype": dtype}
    rngs = weights.Keys(jax.random.key(0))
    if kind == "linear":
        return Linear(12, 8, rngs=rngs, **options), drawn(2, 5, 12)
    strides, padding = (2, 2), ((1, 1), (1, 1))
    conv = Conv(6, 8, (3, 3), strides=strides, padding=padding, rngs=rngs, **options)
    return conv, drawn(2, 7, 9, 6)


def narrowed(plain):
    """The same layer with its kernel in int8, and the one with what that stands for."""
    codes, scale = int8.quantised("a.kernel", np.asarray(plain.kernel[...]))
    holder = nnx.Dict(layer=plain)
    int8.Int8(("unet",))("unet", holder, None)
    plain.kernel[...], plain.kernel_scale[...] = jnp.asarray(codes), jnp.asarray(scale)
    return plain, codes * scale


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 0.02)])
def test_a_layer_and_its_gradient_are_those_of_the_kernel_it_stands_for(kind, dtype, tolerance):
    whole, x = layer(kind, dtype)
    own, kernel = narrowed(layer(kind, dtype)[0])
    np.testing.assert_array_equal(whole_kernel(own), kernel)
    whole.kernel[...] = jnp.asarray(kernel)
    cotangent = drawn(*whole(x).shape)

    def run(one):
        return jax.value_and_grad(lambda x: jnp.sum(one(x).astype(jnp.float32) * cotangent))(x)

    np.testing.assert_allclose(own(x), whole(x), atol=tolerance * np.abs(whole(x)).max())
    (_, found), (_, expected) = run(own), run(whole)
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
    assert own(x).dtype == dtype


def test_parts_and_joined_inputs_have_their_scales():
    own, kernel = narrowed(layer("linear", jnp.float32)[0])
    x = drawn(3, 12)
    first, second = own.parts(x, 2)
    np.testing.assert_allclose(jnp.concatenate([first, second], -1), x @ kernel, atol=1e-6)
    np.testing.assert_allclose(own.joined(x[:, :4], x[:, 4:]), x @ kernel, atol=1e-6)


def test_codes_are_what_the_backward_pass_keeps():
    """No kernel of the width of the products is kept from the forward pass."""
    own, x = narrowed(layer("linear", jnp.bfloat16)[0])[0], drawn(2, 5, 12)
    _, backward = jax.vjp(own, x)
    kept = [v for v in jax.tree.leaves(backward) if getattr(v, "shape", ()) == (12, 8)]
    assert [v.dtype for v in kept] == [jnp.int8]


def test_only_named_networks_change_and_their_codes_are_cast_by_nobody():
    holder = nnx.Dict(layer=layer("linear", jnp.bfloat16)[0])
    int8.Int8(("unet",))("vae", holder, None)
    assert holder.layer.kernel_scale is None
    assert set(cast_first(holder)) == {"layer.kernel", "layer.bias"}
    int8.Int8(("unet",))("unet", holder, None)
    assert set(cast_first(holder)) == {"layer.bias"}
    params = weights.split(holder)[1]
    assert params["layer.kernel"].dtype == jnp.int8
    assert set(int8.in_files(params)) == {"layer.kernel", "layer.bias"}
