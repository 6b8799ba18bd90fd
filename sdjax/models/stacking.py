"""Equal blocks of a network, stacked: one array [N, ...] for each parameter, run by `lax.scan`.

They are traced and compiled once, whatever their number. A path says which blocks an array holds:

    encoder.layers.0-11.mlp.fc1.kernel [12, in, out]

is `encoder.layers.0.mlp.fc1.kernel` to `encoder.layers.11.mlp.fc1.kernel` (`stacked_paths.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sdjax.models import capture, weights
from sdjax.models.layers import rematerialised

Make = Callable[[Any], nnx.Module]
Step = Callable[[Any, Any, Any], tuple[Any, Any]]


class Blocks(nnx.Module):
    """The numbered blocks of a network, in runs of equal ones; the run "0-11" holds 0 to 11.

    New parameters have the values that separate blocks would draw, one after the other.
    """

    def __init__(self, *runs: tuple[Make, int], rngs: Any):
        """Make the blocks.

        Args:
            runs: of each run a function rngs -> block, and the number of blocks, at least 1.
            rngs: gives a key for each draw by `rngs.params()`.
        """
        names, first = [], 0
        for make, count in runs:
            names.append(f"{first}-{first + count - 1}")
            setattr(self, names[-1], _stacked(make, count, rngs))
            first += count
        self.runs = tuple(names)

    def scan(
        self, step: Step, carry: Any, each: Any = None, *, run: int = 0, remat: str = "none"
    ) -> tuple[Any, Any]:
        """Run the blocks of a run, one after the other.

        Args:
            step: (block, carry, its part of `each`) -> (carry, output). It may close over arrays
                that all blocks share.
            each: a pytree of arrays [N, ...], or None.
            run: its place among the runs.
            remat: see `rematerialised`; one block is the largest unit.

        Returns:
            The last carry, and the outputs stacked to [N, ...].
        """
        stack = getattr(self, self.runs[run])
        graph, params = weights.split(stack)

        def body(carry: Any, own: Any) -> tuple[Any, Any]:
            params, part = own
            block = weights.merge(graph, params)
            with capture.within(stack, block) as found:
                carry, out = step(block, carry, part)
            return carry, (out, found.take() if found else {})

        body = rematerialised(body, remat, level="stage" if remat == "full" else "block")
        carry, (outputs, captured) = lax.scan(body, carry, (params, each))
        capture.keep(stack, captured)
        return carry, outputs


class _Drawn:
    """Keys drawn beforehand, in the place of an `nnx.Rngs`; counts those that were asked for."""

    def __init__(self, keys: jax.Array | None = None):
        self._keys, self.count = keys, 0

    def params(self) -> jax.Array:
        self.count += 1
        return jax.random.key(0) if self._keys is None else self._keys[self.count - 1]


def _stacked(make: Make, count: int, rngs: Any) -> nnx.Module:
    """Return one block whose parameters have a leading axis [count]."""
    counted = _Drawn()
    graph, _ = weights.split(nnx.eval_shape(lambda: make(counted)))
    keys = [[rngs.params() for _ in range(counted.count)] for _ in range(count)]
    draw = lambda own: weights.split(make(_Drawn(own)))[1]  # noqa: E731
    return weights.merge(graph, jax.vmap(draw)(jnp.stack([jnp.stack(own) for own in keys])))
