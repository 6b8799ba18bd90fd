"""Adam's moments in 8 bits: blockwise dynamic quantisation (Dettmers et al., arXiv:2110.02861).

A block is some 64 to 256 neighbours along one dimension. It keeps its largest magnitude in float32,
and a code of 8 bits for the ratio of each element to that magnitude. The codes cover the decades
from 1 down to 1e-7; a higher decade has more values. The moments have 8 bits between steps. Within
a step they are float32, so the arithmetic is optax's.

The second moment is kept as its root. The ratio of first moment to root is what moves a parameter,
and the root spans no more decades than the first moment does. The second moment itself spans twice
as many: what falls below its last decade would be 0 beside a first moment that is not.

Small arrays, and embeddings as the paper advises, stay in float32. No block crosses the dimension
that is split first over devices, so moments are split as their parameters are.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sdjax.models.stacked_paths import leading_axes
from sdjax.parallel.sharding import EMBEDDINGS, split_dim

MIN_SIZE = 4096  # elements, as in bitsandbytes (min_8bit_size)
BLOCKS = (32, 256)  # fewest and most elements of a block
_DECADES = 7


class Blockwise(NamedTuple):
    """An array in 8 bits.

    codes: uint8, of the array's shape. scales: float32 [blocks, n], see `Layout`.
    """

    codes: jax.Array
    scales: jax.Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """The division of an array into blocks.

    Attributes:
      along: the dimension that blocks lie in.
      block: elements of a block.
      kept: the dimension split over devices. It is last in the array of scales, so that they can be
        split too and that tiles of TPUs waste little.
    """

    along: int
    block: int
    kept: int


def layout(path: str, shape: tuple[int, ...]) -> Layout | None:
    """The blocks of a parameter's moments by its path and shape; None: they stay in float32."""
    first = leading_axes(path)
    own = shape[first:]
    if math.prod(own) < MIN_SIZE or len(own) < 2 or re.search(EMBEDDINGS, path):
        return None
    kept = split_dim(path, shape)
    along = max((d for d in range(first, len(shape)) if d != kept), key=lambda d: shape[d])
    block = min(shape[along] & -shape[along], BLOCKS[1])  # a power of two that divides it
    return Layout(along, block, kept) if block >= BLOCKS[0] else None


# ---- the dynamic map --------------------------------------------------------------------------


class _Decade(NamedTuple):
    """A range of ranks, in which magnitudes are evenly spaced.

    start: from this magnitude on the nearest value is in this decade. first, last: ranks.
    step, low: magnitude of rank k = low + step * k.
    """

    start: float
    first: int
    last: int
    step: float
    low: float


def _decades(signed: bool) -> list[_Decade]:
    """The decades of ranks: decade i has 2^i values, or twice that without signs.

    Rank 0 is 0 and the last rank 1. The values between are the means of neighbours of an even grid
    from 0.1 to 1 times 10^(i - 6), as in bitsandbytes' `create_dynamic_map`.
    """
    found: list[_Decade] = []
    first, below = 1, 0.0
    for i in range(_DECADES):
        count = 2**i if signed else 2 ** (i + 1)
        top = 10.0 ** (i + 1 - _DECADES)
        step = 0.9 * top / count
        lowest = 0.1 * top + step / 2
        found.append(_Decade((below + lowest) / 2, first, first + count - 1, step,
                             lowest - step * first))  # fmt: skip
        first, below = first + count, lowest + step * (count - 1)
    return [*found, _Decade((below + 1) / 2, first, first, 0.0, 1.0)]


def _rank(x: jax.Array, decades: list[_Decade]) -> jax.Array:
    """The ranks of the values nearest to magnitudes `x` in [0, 1], float32 of x's shape."""
    rank = jnp.zeros_like(x)
    for d in decades:
        inside = jnp.round((x - d.low) / d.step) if d.step else jnp.full_like(x, d.first)
        rank = jnp.where(x >= d.start, jnp.clip(inside, d.first, d.last), rank)
    return rank


def _magnitude(rank: jax.Array, decades: list[_Decade]) -> jax.Array:
    """The magnitudes of ranks, float32 of rank's shape."""
    value = jnp.zeros_like(rank)
    for d in decades:
        value = jnp.where(rank >= d.first, d.low + d.step * rank, value)
    return value


def encode(x: jax.Array, *, signed: bool) -> jax.Array:
    """The codes of values in [-1, 1] if `signed`, else [0, 1], uint8 of x's shape.

    A code is a position in the rising list of the 256 values.
    """
    decades = _decades(signed)
    rank = _rank(jnp.abs(x), decades)
    if signed:  # code 127 is 0; no code is -1
        rank = 127 + jnp.where(x < 0, -jnp.minimum(rank, 127), rank)
    return rank.astype(jnp.uint8)


def decode(codes: jax.Array, *, signed: bool) -> jax.Array:
    """The values of codes, float32 of their shape."""
    rank = codes.astype(jnp.float32)
    if not signed:
        return _magnitude(rank, _decades(signed))
    rank = rank - 127
    return jnp.sign(rank) * _magnitude(jnp.abs(rank), _decades(signed))


# ---- arrays -----------------------------------------------------------------------------------


def quantise(x: jax.Array, blocks: Layout, *, signed: bool) -> Blockwise:
    """The codes and the scales of float32 `x`, of any shape that `blocks` fits."""
    cut = _cut(x, blocks)
    scales = jnp.max(jnp.abs(cut), blocks.along + 1, keepdims=True)
    codes = encode(cut / jnp.where(scales > 0, scales, 1), signed=signed)
    last = jnp.moveaxis(scales.squeeze(blocks.along + 1), blocks.kept, -1)
    return Blockwise(codes.reshape(x.shape), last.reshape(-1, last.shape[-1]))


def dequantise(q: Blockwise, blocks: Layout, *, signed: bool) -> jax.Array:
    """The float32 array of `quantise`'s result, up to rounding."""
    cut = _cut(decode(q.codes, signed=signed), blocks)
    each = [n for d, n in enumerate(cut.shape) if d != blocks.along + 1]
    kept = each.pop(blocks.kept)
    scales = jnp.moveaxis(q.scales.reshape(*each, kept), -1, blocks.kept)
    return (cut * jnp.expand_dims(scales, blocks.along + 1)).reshape(q.codes.shape)


def _cut(x: jax.Array, blocks: Layout) -> jax.Array:
    """Reshape [..., n, ...] to [..., n / block, block, ...]."""
    before, n, after = x.shape[: blocks.along], x.shape[blocks.along], x.shape[blocks.along + 1 :]
    return x.reshape(*before, n // blocks.block, blocks.block, *after)


def in_blocks(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return `optax.scale_by_adam` on a flat dict of parameters, with its state kept in 8 bits."""

    def pack(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        roots = jax.tree.map(jnp.sqrt, state.nu)
        return state._replace(mu=_packed(state.mu, signed=True), nu=_packed(roots, signed=False))

    def unpack(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        nu = {p: jnp.square(root) for p, root in _unpacked(state.nu, signed=False).items()}
        return state._replace(mu=_unpacked(state.mu, signed=True), nu=nu)

    def update(grads, state, params=None):
        updates, state = adam.update(grads, unpack(state), params)
        return updates, pack(state)

    return optax.GradientTransformation(lambda params: pack(adam.init(params)), update)


def _packed(moments: Mapping[str, jax.Array], *, signed: bool) -> dict[str, Blockwise | jax.Array]:
    found = {path: layout(path, x.shape) for path, x in moments.items()}
    return {
        path: quantise(x, blocks, signed=signed) if (blocks := found[path]) else x
        for path, x in moments.items()
    }


def _unpacked(
    moments: Mapping[str, Blockwise | jax.Array], *, signed: bool
) -> dict[str, jax.Array]:
    def whole(path: str, kept: Blockwise | jax.Array) -> jax.Array:
        if not isinstance(kept, Blockwise):
            return kept
        blocks = layout(path, kept.codes.shape)
        assert blocks is not None
        return dequantise(kept, blocks, signed=signed)

    return {path: whole(path, kept) for path, kept in moments.items()}
