"""Captions that are encoded before the first step, by text encoders that then leave the devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.families.conditioning import Conditioner
from sdjax.models.params import Params
from sdjax.parallel.sharding import to_host

ROWS = 16  # captions that are encoded at a time


class Encode(Protocol):
    """Turns the tokens of captions into features. All hosts call it, with the same tokens."""

    def __call__(self, tokens: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return {name: float32 [N, ...]} on every host, of tokens {field: [N, L]}."""


def caption_encoder(conditioner: Conditioner, params: Params, mesh: Mesh) -> Encode:
    """Return what encodes captions, on every device the same.

    Args:
        params: of the text encoders, on the mesh.
    """
    whole = NamedSharding(mesh, P())
    run = jax.jit(conditioner.embed, out_shardings=whole)

    def encode(tokens: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        total = len(next(iter(tokens.values())))
        size = min(ROWS, total)
        parts = []
        for start in range(0, total, size):
            # The last ones are filled up with the last caption, which is then dropped.
            rows = np.minimum(np.arange(start, start + size), total - 1)
            given = {
                field: jax.make_array_from_callback(
                    (size, *own.shape[1:]), whole, own[rows].__getitem__
                )
                for field, own in tokens.items()
            }
            made = run(params, given)
            parts.append({name: to_host(x)[: total - start] for name, x in made.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return encode
