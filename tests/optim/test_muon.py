"""Muon against optax's, at the shapes of a network; what it makes orthogonal."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from sdjax.optim.muon import orthogonalized, scale_by_muon

SHAPES = {
    "square": (24, 24),
    "alike": (24, 24),
    "wide": (16, 128),  # its Gram matrix is iterated on
    "tall": (128, 16),
    "nearly square": (24, 32),
    "convolution": (3, 3, 16, 24),
    "vector-like": (1, 1, 8, 1),
}


def matrices(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in SHAPES.items()}


def dimensions(shape: tuple[int, ...]) -> contrib.MuonDimensionNumbers:
    return contrib.MuonDimensionNumbers(tuple(range(len(shape) - 1)), len(shape) - 1)


def test_update_of_every_shape_is_that_of_optax():
    theirs = optax.chain(
        contrib.scale_by_muon(
            beta=0.9,
            eps=1e-7,
            weight_dimension_numbers={p: dimensions(s) for p, s in SHAPES.items()},
        ),
        # Liu et al. 2025: 0.2 sqrt(max(inputs, outputs)).
        optax.stateless(
            lambda updates, _: {
                p: u * 0.2 * max(u.size // u.shape[-1], u.shape[-1]) ** 0.5
                for p, u in updates.items()
            }
        ),
    )
    ours = scale_by_muon(momentum=0.9, eps=1e-7, rms=0.2)
    params = matrices(0)
    ours_state, theirs_state = ours.init(params), theirs.init(params)
    for step in range(4):
        grads = matrices(1 + step)
        actual, ours_state = jax.jit(ours.update)(grads, ours_state)
        expected, theirs_state = jax.jit(theirs.update)(grads, theirs_state)
        for path in SHAPES:
            # Sums of at most 144 products in another order, over five steps.
            bound = 3e-5 * float(jnp.abs(expected[path]).max())
            np.testing.assert_allclose(actual[path], expected[path], atol=bound, err_msg=path)


@pytest.mark.parametrize("condition", [1.0, 1e3])
@pytest.mark.parametrize("shape", [(24, 24), (16, 128)])
def test_singular_values_are_near_one_and_vectors_are_kept(shape, condition):
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    s = np.geomspace(1, 1 / condition, min(shape))
    result = np.asarray(orthogonalized({"x": jnp.asarray(u * s @ vt, jnp.float32)}, 0.0, 0)["x"])
    found = u.T @ result @ vt.T
    values = np.diag(found)
    # Jordan's coefficients let them end between 0.68 and 1.21, once five steps have lifted them.
    assert values[0] < 1.21
    assert values.min() > (0.68 if condition == 1.0 else 0.1)
    # Float32 rounds 6e-8 of the largest value, and the steps of a run lift that as they lift the
    # smallest value: by 3.4 each, squared in the Gram matrix, which is formed again after three.
    np.testing.assert_allclose(found, np.diag(values), atol=2e-5)


def test_zero_gradient_gives_no_update():
    zeros = {"x": jnp.zeros((4, 8))}
    np.testing.assert_array_equal(orthogonalized(zeros, 1e-8, 0)["x"], zeros["x"])


def test_matrices_of_one_shape_share_the_kernel_that_reads_them_out_of_the_stack():
    tx = scale_by_muon(momentum=0.9, eps=1e-7, rms=0.2)
    grads = {str(i): jnp.ones((24, 24)) for i in range(6)}
    text = jax.jit(tx.update).lower(grads, tx.init(grads)).compile().as_text()
    # A slice at a place that XLA knows would be a kernel of its own for each matrix.
    assert not re.search(r"f32\[1,24,24\]\S* slice\(", text)
    assert len(re.findall(r"f32\[1,24,24\]\S* dynamic-slice\(", text)) == 6
