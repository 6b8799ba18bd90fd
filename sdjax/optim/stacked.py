"""An optimizer whose arithmetic depends on whole parameters, applied to each of stacked blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from sdjax.models.stacked_paths import leading_axes


def each_block(
    tx: optax.GradientTransformation, params: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Return `tx` that treats every block of a stacked parameter as a parameter.

    Args:
        tx: computes each parameter's update from that parameter alone, and takes `params`.
        params: {path: array or shape}, as `init` and `update` will take them.
    """
    count = {p: leaf.shape[0] if leading_axes(p) else 0 for p, leaf in params.items()}
    if not any(count.values()):
        return tx
    mapped = optax.GradientTransformation(
        jax.vmap(tx.init), lambda grads, state, own: jax.vmap(tx.update)(grads, state, own)
    )
    parts = {str(n): mapped if n else tx for n in set(count.values())}
    return optax.partition(parts, {path: str(n) for path, n in count.items()})
