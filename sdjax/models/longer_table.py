"""A token table with rows of its own after those of its files, for words that are learnt.

The rows are a parameter apart: their gradient is all that is computed, and nothing that trains them
can move the table (rows that are restored after each step move within it; diffusers#507, #1009).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sdjax.models.products import Embed

ROWS = "rows"  # the parameter's name, beside the table's "embedding"


class LongerEmbed(Embed):
    """A table [count, features] and `rows` [n, features], which have the indices from count on."""

    def __init__(self, table: Embed, count: int, *, rngs: nnx.Rngs):
        """Lengthen a table by `count` rows, which begin at 0."""
        self.embedding, self.dtype = table.embedding, table.dtype
        width = self.embedding.shape[-1]
        zeros = nnx.initializers.zeros(rngs.params(), (count, width), jnp.float32)
        self.rows = nnx.Param(zeros)

    def __call__(self, index: jax.Array) -> jax.Array:
        """Map integers [...] to rows [..., features] in `dtype`, as a table of both would."""
        # Two look-ups: joining the arrays would copy a table of 150 MB at every step.
        size, count = self.embedding.shape[0], self.rows.shape[0]
        old = super().__call__(jnp.clip(index, 0, size - 1))
        place = jnp.clip(index - size, 0, count - 1)
        new = jnp.take(self.rows[...], place, axis=0).astype(self.dtype)
        return jnp.where((index < size)[..., None], old, new)
