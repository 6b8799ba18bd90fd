"""Rotary position embedding over several axes (arXiv:2104.09864; diffusers `FluxPosEmbed`).

A head's channels are shared out among the axes of a position. Pair k of an axis with `dim` channels
turns by the angle p theta^(-2k/dim) at position p; the channels 2k and 2k + 1 are a pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Rotation = tuple[Array, Array]

THETA = 10_000.0


def axis(positions: Sequence[int], dim: int, *, theta: float = THETA) -> np.ndarray:
    """Return cosines and sines of one axis, float32 [2, positions, dim].

    Both channels of a pair have the angle of their pair. Angles are computed on the host in
    float64: in float32 an angle of 1,000 would be off by 6e-5.
    """
    frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    angles = np.outer(np.asarray(positions, np.float64), frequencies).repeat(2, axis=1)
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def grid(index: int, height: int, width: int, dims: Sequence[int]) -> Rotation:
    """Return cosines and sines of the tokens of a grid, in rows, each float32 [height*width, D].

    Args:
        index: of the picture, the first coordinate of all its positions (index, row, column).
        dims: channels of each of the three axes, of sum D.
    """
    # Broadcast in the program: the axes alone are small constants.
    first, rows, columns = map(axis, ([index], range(height), range(width)), dims)
    parts = [
        jnp.broadcast_to(part, (2, height, width, part.shape[-1]))
        for part in (first[:, :, None], rows[:, :, None], columns[:, None])
    ]
    cos, sin = jnp.concatenate(parts, axis=-1).reshape(2, height * width, -1)
    return cos, sin


def origin(count: int, dims: Sequence[int]) -> Rotation:
    """Return cosines and sines of `count` tokens at (0, 0, 0), which do not turn; [count, D]."""
    shape = (count, sum(dims))
    return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)


def joined(*rotations: Rotation) -> Rotation:
    """Return the cosines and sines of several runs of tokens, one run after the other."""
    cos, sin = zip(*rotations, strict=True)
    return jnp.concatenate(cos), jnp.concatenate(sin)


def rotate(x: Array, rotation: Rotation) -> Array:
    """Turn each pair of channels: (a, b) to (a cos - b sin, b cos + a sin), in float32.

    Args:
        x: [B, L, heads, D].
        rotation: cosines and sines, each [L, D].

    Returns:
        [B, L, heads, D] in the dtype of `x`.
    """
    cos, sin = (part[None, :, None] for part in rotation)  # [1, L, 1, D]
    wide = x.astype(jnp.float32)
    even = jnp.arange(x.shape[-1]) % 2 == 0
    # Rolls leave the channels in one axis; a last axis of 2 would be padded to 128 on TPUs.
    partner = jnp.where(even, -jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
    return (wide * cos + partner * sin).astype(x.dtype)
