"""Gradients of dense layers and convolutions: those of the plain products, and wide sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdjax.models.clip import CLIPTextConfig, Embeddings
from sdjax.models.products import Conv, Embed, Linear


def gradients(call, *args):
    """Of the sum of squares, with respect to all arguments."""
    total = lambda *args: jnp.square(call(*args).astype(jnp.float32)).sum()  # noqa: E731
    return jax.grad(total, argnums=tuple(range(len(args))))(*args)


def module_function(module):
    graph, params = nnx.split(module)
    return (lambda params, x: nnx.merge(graph, params)(x)), params


@pytest.mark.parametrize("stride,padding", [(1, ((1, 1), (1, 1))), (2, ((1, 1), (1, 1))),
                                            (2, ((0, 1), (0, 1)))])  # fmt: skip
@pytest.mark.parametrize("height,width", [(8, 8), (7, 5)])
def test_convolution_gradients_are_those_jax_derives(stride, padding, height, width, reference):
    init = nnx.initializers.normal(0.3)
    conv = Conv(3, 4, (3, 3), strides=(stride,) * 2, padding=padding, kernel_init=init,
                rngs=nnx.Rngs(0))  # fmt: skip
    conv.bias[...] = jnp.arange(4.0)
    call, params = module_function(conv)

    def plain(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["kernel"][...], (stride,) * 2, padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y + params["bias"][...]

    x = jnp.asarray(reference.normal(0, 2, height, width, 3))
    np.testing.assert_array_equal(call(params, x), plain(params, x))
    ours, theirs = gradients(call, params, x), gradients(plain, params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("make", [
    lambda kw: Linear(64, 32, kernel_init=nnx.initializers.normal(0.1), **kw),
    lambda kw: Conv(64, 32, (3, 3), strides=(1, 1), padding=((1, 1), (1, 1)),
                    kernel_init=nnx.initializers.normal(0.1), **kw),
])  # fmt: skip
def test_parameter_gradients_keep_more_than_bfloat16(make, reference):
    """Of the same bfloat16 inputs and cotangents, the gradient is exact to float32 sums."""
    call, params = module_function(make({"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}))
    x = jnp.asarray(reference.normal(0, 4, 8, 8, 64), jnp.bfloat16)
    y, pullback = jax.vjp(call, params, x)
    dy = jnp.asarray(reference.normal(1, *y.shape), jnp.bfloat16)
    dparams, dx = pullback(dy)
    assert y.dtype == dx.dtype == jnp.bfloat16

    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (x, dy))
    exact_call, _ = module_function(make({"dtype": jnp.float32, "rngs": nnx.Rngs(0)}))
    _, pullback = jax.vjp(exact_call, params, wide[0])
    exact = pullback(wide[1])[0]
    for name in ("kernel", "bias"):
        ours, want = dparams[name][...], exact[name][...]
        assert ours.dtype == jnp.float32
        # A gradient rounded to bfloat16 would be off by up to 2^-9 = 2e-3 of its own size.
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-4)


def test_rows_that_are_used_often_add_up_in_float32():
    embed = Embed(3, 2, embedding_init=nnx.initializers.ones, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    call, params = module_function(embed)
    index = jnp.zeros((1000,), jnp.int32)
    gradient = jax.grad(lambda p: call(p, index).astype(jnp.float32).sum())(params)
    # In bfloat16 a sum of ones stops at 256.
    np.testing.assert_array_equal(gradient["embedding"][...], [[1000, 1000], [0, 0], [0, 0]])


def test_policies_of_rematerialisation_see_the_products():
    layer = Linear(8, 8, kernel_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))

    def products(**policy):
        def loss(x):
            run = jax.checkpoint(lambda x: jnp.tanh(layer(x)), **policy) if policy else layer
            return run(x).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 8)))).count("dot_general[")

    forward_and_back = products()
    assert products(policy=jax.checkpoint_policies.dots_saveable) == forward_and_back
    assert products(policy=jax.checkpoint_policies.nothing_saveable) == forward_and_back + 1


def test_gradients_of_positions_add_up_in_float32_over_the_captions():
    config = CLIPTextConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=4,
    )  # fmt: skip
    module = Embeddings(config, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    call, params = module_function(module)
    tokens = jnp.zeros((301, 3), jnp.int32)
    gradient = jax.grad(lambda p: call(p, tokens).astype(jnp.float32).sum())(params)
    # bfloat16 has no 301; the last position is not used.
    expected = np.repeat([[301], [301], [301], [0]], 8, axis=1)
    np.testing.assert_array_equal(gradient["position_embedding"]["embedding"][...], expected)


def test_parts_of_a_product_are_those_of_the_whole():
    """By as many products, with the gradients of the one."""
    layer = Linear(5, 12, kernel_init=nnx.initializers.normal(), rngs=nnx.Rngs(1))
    layer.bias[...] = jnp.linspace(-1, 1, 12)
    graph, params = nnx.split(layer)
    x, dy = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in ((0, (2, 3, 5)), (1, (2, 3, 12)))
    )

    def whole(params, x):
        return nnx.merge(graph, params)(x)

    def parts(params, x):
        return jnp.concatenate(nnx.merge(graph, params).parts(x, 3), axis=-1)

    one, pull_one = jax.vjp(whole, params, x)
    three, pull_three = jax.vjp(parts, params, x)
    np.testing.assert_allclose(three, one, rtol=1e-6, atol=1e-6)  # sums in another order
    for a, b in zip(jax.tree.leaves(pull_three(dy)), jax.tree.leaves(pull_one(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    bare = Linear(5, 12, bias=False, kernel_init=nnx.initializers.normal(), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(jnp.concatenate(bare.parts(x, 2), -1), bare(x), rtol=1e-6, atol=1e-6)


def test_a_product_of_several_arrays_is_that_of_their_concatenation():
    dense = Linear(12, 5, kernel_init=nnx.initializers.normal(0.3), rngs=nnx.Rngs(0))
    dense.bias[...] = jnp.arange(5.0)
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.normal(size=(2, 3, n)), jnp.float32) for n in (4, 7, 1)]
    graph, params = nnx.split(dense)
    joined = lambda params, *xs: nnx.merge(graph, params).joined(*xs)  # noqa: E731
    whole = lambda params, *xs: nnx.merge(graph, params)(jnp.concatenate(xs, axis=-1))  # noqa: E731
    np.testing.assert_allclose(joined(params, *xs), whole(params, *xs), atol=1e-6)
    ours, theirs = gradients(joined, params, *xs), gradients(whole, params, *xs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)
