"""Muon: the momentum of each matrix, made orthogonal (Jordan et al. 2024; Liu et al. 2025).

The numbers are those of `optax.contrib.muon`. Matrices of one shape are handled together, and long
ones by their Gram matrix, so that the update has few and small products.
"""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdjax.models.stacked_paths import leading_axes

# Jordan's coefficients of the iteration x <- a x + b (x x^T) x + c (x x^T)^2 x. Five iterations
# bring singular values from far below 1 to between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# The Gram matrix has the squares of the singular values, so what float32 rounds off the small ones
# grows as their squares do. It is formed again before that shows: five steps from one Gram matrix
# are wrong by 7e-4 at a condition number of 1e3, these runs by 6e-6, as whole products are.
_RUNS = (3, 2)
# The ratio of sides from which the Gram matrix pays. With it, these runs have 14 products of the
# Gram matrix's size and 4 with the whole matrix; without it, 5 of that size and 10 with the whole.
_LONG = 1.5


class MuonState(NamedTuple):
    """The number of updates, and the decaying mean of the gradients."""

    count: jax.Array  # type: ignore[assignment]  # hides the method of tuples, as optax does
    mu: Any


def scale_by_muon(
    *, momentum: float, eps: float, rms: float, mu_dtype: Any = None
) -> optax.GradientTransformation:
    """Nesterov's momentum with its singular values near 1, scaled to the RMS that Adam's has.

    Parameters are a dict by path. Each is a matrix [inputs, outputs]; inputs are all of its axes
    but the last, and the first one of stacked blocks, which are so many matrices.

    Args:
      momentum: decay of the mean of the gradients.
      eps: added to the norm that a matrix is divided by before the iteration.
      rms: the RMS of the update's elements, for a square matrix with all singular values 1.
      mu_dtype: dtype of the mean between updates; None is that of the parameters.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=mu_dtype))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        mu = optax.tree.update_moment(grads, state.mu, momentum, 1)
        count = optax.safe_increment(state.count)
        ahead = optax.tree.bias_correction(mu, momentum, optax.safe_increment(count))
        now = optax.tree.bias_correction(grads, momentum, count)
        nesterov = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, ahead, now)
        updates = jax.tree_util.tree_map_with_path(
            lambda at, m: m * (rms * math.sqrt(max(_sides(at, m)))),
            orthogonalized(nesterov, eps, count),
        )
        return updates, MuonState(count, optax.tree.cast(mu, mu_dtype))

    return optax.GradientTransformation(init, update)


def orthogonalized(matrices: Any, eps: float, count: jax.typing.ArrayLike) -> Any:
    """The matrices of parameters by path, with their singular values brought to about 1.

    Args:
      count: any number from 0 on that XLA does not know while it compiles.
    """
    paired, tree = jax.tree_util.tree_flatten_with_path(matrices)
    leaves = [leaf for _, leaf in paired]
    sides = [_sides(at, leaf) for at, leaf in paired]
    alike = collections.defaultdict(list)
    for index, pair in enumerate(sides):
        alike[tuple(sorted(pair))].append(index)
    for indices in alike.values():
        # [k, rows, columns] of each parameter, k being 1 but for stacked blocks
        wide = [_transposed(leaves[i].reshape(-1, *sides[i]), sides[i]) for i in indices]
        lengths = [len(matrix) for matrix in wide]
        places = _unknown((0, *np.cumsum(lengths)[:-1]), count)
        stack = _iterated(jnp.concatenate(wide), eps)
        for i, place, length in zip(indices, places, lengths, strict=True):
            part = jax.lax.dynamic_slice_in_dim(stack, place, length)
            leaves[i] = _transposed(part, sides[i]).reshape(leaves[i].shape)
    return jax.tree.unflatten(tree, leaves)


def _unknown(numbers: tuple[int, ...], count: jax.typing.ArrayLike) -> tuple[jax.Array, ...]:
    """Return numbers such that XLA does not know them while it compiles.

    XLA compiles what reads a matrix out of a stack once for each place that it knows, but once
    for all places that it does not know.
    """
    known = jnp.asarray(numbers, jnp.int32)
    zeros = jnp.zeros_like(known)
    return jax.lax.cond(jnp.asarray(count) < 0, lambda: tuple(zeros), lambda: tuple(known))


def _sides(at: tuple[Any, ...], parameter: jax.Array) -> tuple[int, int]:
    """The rows and the columns of a parameter as a matrix, or as one for each block.

    at: the parameter's place in the tree; its last key is the path.
    """
    first = leading_axes(str(getattr(at[-1], "key", "")) if at else "")
    return math.prod(parameter.shape[first:-1]), parameter.shape[-1]


def _transposed(matrices: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """Return [k, rows, columns], transposed if a parameter has more rows than columns."""
    rows, columns = sides
    return matrices.mT if rows > columns else matrices


def _iterated(x: jax.Array, eps: float) -> jax.Array:
    """The result of five iterations on [k, rows, columns], rows being at most columns."""
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + eps)
    a, b, c = _COEFFICIENTS
    rows, columns = x.shape[1:]
    if columns < _LONG * rows:
        for _ in range(sum(_RUNS)):
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return x
    # All factors are polynomials in the Gram matrix g and commute. With p = a + b g + c g^2,
    # x <- p x makes g <- p g p, and x needs the product of all p of a run alone.
    first = a * jnp.eye(rows, dtype=x.dtype)
    for steps in _RUNS:
        gram = x @ x.mT
        product = p = first + b * gram + c * (gram @ gram)
        for _ in range(steps - 1):
            gram = p @ gram @ p
            p = first + b * gram + c * (gram @ gram)
            product = p @ product
        x = product @ x
    return x
