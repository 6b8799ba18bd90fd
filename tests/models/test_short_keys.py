"""Attention to few keys: the kernel, interpreted, against dense attention; its declared cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models.kernels import short_keys
from sdjax.models.kernels.dense import dense_attention

dense = functools.partial(dense_attention, causal=False)
kernel = functools.partial(short_keys.short_attention, interpret=True)

# Heads, their width and the number of keys. Heads of 40 and 80 straddle tiles of 128 lanes; 13 and
# 77 keys are padded; 192 queries are three blocks, over which the gradients of k and v add up.
SHAPES = {"40": (4, 40, 77), "64": (2, 64, 128), "80": (2, 80, 13), "160": (1, 160, 130)}


def inputs(reference, heads, width, keys, queries=192, dtype=jnp.float32):
    lengths = (queries, keys, keys, queries)
    return [
        jnp.asarray(reference.normal(i, 2, n, heads, width), dtype) for i, n in enumerate(lengths)
    ]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, q, k, v, cotangent):
    out, pullback = jax.vjp(function, q, k, v)
    return [out, *pullback(cotangent.astype(out.dtype))]


@pytest.mark.parametrize("name", SHAPES)
def test_equals_dense_attention_in_value_and_gradient(name, reference):
    arrays = inputs(reference, *SHAPES[name])
    ours, theirs = (value_and_gradients(f, *arrays) for f in (kernel, dense))
    for one, other in zip(ours, theirs, strict=True):
        # Both are float32 with sums in another order.
        assert reference.error(one, other) < 4e-6


def test_bfloat16_is_as_close_to_exact_as_dense(reference):
    arrays = inputs(reference, 4, 40, 77)
    exact = value_and_gradients(dense, *arrays)
    narrow = [x.astype(jnp.bfloat16) for x in arrays]
    ours, theirs = (value_and_gradients(f, *narrow) for f in (kernel, dense))
    assert [x.dtype for x in ours] == [jnp.bfloat16] * 4
    for one, other, want in zip(ours, theirs, exact, strict=True):
        error, bound = (reference.error(np.asarray(x, np.float32), want) for x in (one, other))
        assert error < 1.5 * bound + 2**-9 < 0.05  # the dense one's output is not rounded


def test_padded_keys_weigh_nothing_even_where_all_real_scores_are_far_below_zero(reference):
    q, k, v, _ = inputs(reference, 1, 8, 5, queries=64)
    q, k = jnp.abs(q), k - 20  # scores about -50: a padded key's 0 would take all the weight
    assert reference.error(kernel(q, k, v), dense(q, k, v)) < 1e-4


def test_declared_cost_is_that_of_the_products_and_as_much_again():
    q, k = (jax.ShapeDtypeStruct((2, n, 256), jnp.bfloat16) for n in (512, 128))
    forward = short_keys._cost(q, k, 2, 128, products=2)
    # Two products over 512 x 128 scores of two heads of 128, for two examples.
    assert forward.flops == 2 * (2 * 2 * 512 * 128 * 128) * 2 * (1 + 3 / 2)
    assert forward.bytes_accessed == 2 * 2 * 256 * (2 * 512 + 2 * 128)
    assert forward.transcendentals == 2 * 2 * 512 * 128
    backward = short_keys._cost(q, k, 2, 128, products=5)
    assert backward.flops == forward.flops * (5 + 5) / (2 + 3)
    # Heads of 40 side by side: two of eight lie across two tiles.
    q, k = (jax.ShapeDtypeStruct((1, n, 320), jnp.bfloat16) for n in (64, 128))
    assert short_keys._cost(q, k, 8, 40, products=2).flops == 2 * 64 * 128 * 128 * (2 * 10 + 3 * 8)


@pytest.mark.parametrize("chip", ["v5p:2x2x1", "v5e:2x2", "v6e:2x2"])
@pytest.mark.slow
def test_every_shape_of_stable_diffusion_fits_the_chip(chip):
    """Compiled by the chip's own compiler, which refuses what does not fit its vector memory."""
    pytest.importorskip("libtpu")
    from sdjax.planning import topologies

    place = jax.sharding.SingleDeviceSharding(topologies.devices(topologies.parse(chip))[0])
    gradients = jax.jit(
        jax.grad(lambda *x: short_keys.short_attention(*x).astype(jnp.float32).sum(), (0, 1, 2))
    )
    for queries, heads, width, keys, dtype in (
        (4096, 8, 40, 77, jnp.bfloat16),
        (1024, 8, 80, 77, jnp.bfloat16),
        (256, 8, 160, 256, jnp.bfloat16),
        (1024, 20, 64, 77, jnp.bfloat16),  # SDXL
        (9216, 5, 64, 77, jnp.float32),  # SD2 at 768 px, upcast
    ):
        q, k = (
            jax.ShapeDtypeStruct((2, n, heads, width), dtype, sharding=place)
            for n in (queries, keys)
        )
        assert short_keys.fits(q, k)
        with jax.default_matmul_precision("default"):
            text = gradients.lower(q, k, k).compile().as_text()
        assert "short_attention_backward" in text
