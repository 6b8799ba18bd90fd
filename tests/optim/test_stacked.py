"""Every optimizer treats stacked blocks as it treats the same blocks apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models.stacked_paths import blocks_apart, joined
from sdjax.optim.optimizers import MOMENTS, OPTIMIZERS, OptimConfig, make_optimizer

STACKED = {
    "net.layers.0-2.q.kernel": (3, 128, 160),
    "net.layers.0-2.q.bias": (3, 160),
    "net.layers.3-4.q.kernel": (2, 160, 128),
    "net.layers.3-4.conv.kernel": (2, 3, 3, 8, 32),
    "net.head.kernel": (160, 24),
    "net.token_embedding.embedding": (20, 128),
}


def draw(seed: int) -> dict[str, jax.Array]:
    """Return values of each block that are 0.001 to 10 times a normal draw."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for path, shape in STACKED.items():
        scale = 10.0 ** rng.integers(-3, 2, (shape[0], *[1] * (len(shape) - 1)))
        drawn[path] = jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)
    return drawn


CASES = [(name, moments) for moments, names in MOMENTS.items() for name in names]


@pytest.mark.parametrize("name, moments", CASES)
def test_updates_of_stacked_blocks_are_those_of_separate_ones(name, moments):
    config = OptimConfig(
        name=name, learning_rate=0.1, weight_decay=0.01, moments=moments, clip_norm=0.0,
        groups=((r"head", 0.5),),
    )  # fmt: skip
    params = draw(0)
    apart = dict(blocks_apart(params))
    tx, own = (make_optimizer(config, 10, tree) for tree in (params, apart))
    states = [tx.init(params), own.init(apart)]
    for step in range(3):
        grads = draw(step + 1)
        updates, states[0] = jax.jit(tx.update)(grads, states[0], params)
        expected, states[1] = jax.jit(own.update)(dict(blocks_apart(grads)), states[1], apart)
        for path, update in updates.items():
            whole = joined({p: np.asarray(v) for p, v in expected.items()}, path)
            # Products sum in another order. So would the norm of the clip, which is off.
            np.testing.assert_allclose(
                update, whole, rtol=2e-5, atol=2e-5 * np.abs(whole).max(), err_msg=path
            )
        params = jax.tree.map(jnp.add, params, updates)
        apart = dict(blocks_apart(params))


def test_every_optimizer_is_tested():
    assert {name for name, _ in CASES} == set(OPTIMIZERS)
