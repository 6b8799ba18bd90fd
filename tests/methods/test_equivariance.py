"""EQ-VAE: how pictures and latents are changed, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.methods.autoencoding.equivariance import (
    Variant,
    drawn,
    resized,
    scaled_sizes,
    turned,
    variants,
)

SCALES = (0.25, 0.5, 0.75)


def test_scaling_and_turning_equal_torch():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2))
    for scale in (8 / 32, 0.5, 0.75, 0.6875):
        want = torch.nn.functional.interpolate(
            theirs, scale_factor=scale, mode="bilinear", align_corners=False
        )
        size, _ = scaled_sizes((16, 16), scale, 8)
        assert size == tuple(want.shape[2:])
        ours = resized(jnp.asarray(x), size)
        np.testing.assert_allclose(ours, want.numpy().transpose(0, 2, 3, 1), atol=1e-6)
    for k in (1, 2, 3):
        want = torch.rot90(theirs, k=k, dims=[-1, -2]).numpy().transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(turned(jnp.asarray(x), jnp.asarray(k)), want)
    square = jnp.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(turned(square, jnp.asarray(1))[0, ..., 0], [[2, 0], [3, 1]])


def test_a_picture_that_is_no_square_is_turned_by_half():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    for k in (1, 2, 3):
        np.testing.assert_array_equal(turned(x, jnp.asarray(k)), x[:, ::-1, ::-1])


def test_an_encoder_of_means_is_equivariant():
    """Means over squares commute with halving and turning; so the two changes agree."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 64, 3)), jnp.float32)
    encode = lambda x: x.reshape(1, x.shape[1] // 8, 8, -1, 8, 3).mean((2, 4))  # noqa: E731
    for k in (1, 2, 3):
        ours = turned(resized(encode(x), (4, 4)), jnp.asarray(k))
        np.testing.assert_allclose(
            ours, encode(turned(resized(x, (32, 32)), jnp.asarray(k))), atol=1e-6
        )


def test_sizes_are_whole_latents():
    assert scaled_sizes((32, 32), 0.5, 8) == ((16, 16), (128, 128))
    assert scaled_sizes((9, 5), 0.25, 8) == ((2, 1), (16, 8))
    assert scaled_sizes((1, 1), 0.25, 8) == ((1, 1), (8, 8))


def test_shares_of_the_variants_are_those_of_the_authors():
    ways = variants(0.5, 0.25, SCALES)
    assert ways[0] == Variant() and len(ways) == 7
    keys = jax.random.split(jax.random.key(0), 20_000)
    index, turns = jax.jit(jax.vmap(lambda key: drawn(key, 0.5, 0.25, 3)))(keys)
    counts = np.bincount(index, minlength=7) / len(keys)
    np.testing.assert_allclose(counts, [0.375, *[0.5 / 3] * 3, *[0.125 / 3] * 3], atol=0.01)
    np.testing.assert_allclose(np.bincount(turns)[1:] / len(keys), 1 / 3, atol=0.01)


@pytest.mark.parametrize("share, smaller", [(0.0, 0.5), (1.0, 0.5), (0.5, 0.0), (0.0, 0.0)])
def test_variants_that_are_never_drawn_are_not_compiled(share, smaller):
    ways = variants(share, smaller, SCALES)
    keys = jax.random.split(jax.random.key(1), 500)
    index, _ = jax.jit(jax.vmap(lambda key: drawn(key, share, smaller, 3)))(keys)
    seen = set(np.asarray(index).tolist())
    assert seen == set(range(len(ways))) - ({0} if share == 1 else set())
