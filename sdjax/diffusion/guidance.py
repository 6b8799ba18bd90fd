"""Classifier-free guidance (Ho & Salimans 2022), with rescaling and an interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def guided(
    denoise_fn: Callable[[jax.Array, jax.Array, Any], jax.Array],
    context: Any,
    null_context: Any,
    *,
    scale: float | jax.Array,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    num_train_timesteps: int = 1000,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return a guided fn(xt, timesteps) of denoise_fn(xt, timesteps, context).

    context: array or pytree of arrays [B, ...]; null_context: the same with leading size B or 1.
    scale: out = null + scale * (cond - null). The Python number 1 evaluates `context` alone; any
      other scale, or a traced one, evaluates both in one call of 2B examples [cond | null].
    rescale: 0 to 1, how far to bring the output's standard deviation back to that of the
      conditional output (Lin et al. 2023, section 3.4).
    interval: guide only where interval[0] <= t/num_train_timesteps <= interval[1]
      (Kynkaanniemi et al. 2024).

    Raises ValueError where rescale or interval is out of its range.
    """
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"guidance interval is {interval}; expected 0 <= low <= high <= 1")
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"guidance rescale is {rescale}; expected 0 to 1")
    if not isinstance(scale, jax.Array) and scale == 1:
        return lambda xt, t: denoise_fn(xt, t, context)

    both_contexts = jax.tree.map(
        lambda c, n: jnp.concatenate([c, jnp.broadcast_to(n, c.shape).astype(c.dtype)]),
        context,
        null_context,
    )  # [2B, ...]

    def fn(xt: jax.Array, t: jax.Array) -> jax.Array:
        out = denoise_fn(jnp.concatenate([xt, xt]), jnp.concatenate([t, t]), both_contexts)
        # In half precision cond - null would lose most of its digits.
        cond, null = jnp.split(out.astype(jnp.float32), 2)
        level = t / num_train_timesteps
        inside = (level >= low) & (level <= high)
        inside = inside.reshape(inside.shape + (1,) * (cond.ndim - 1))  # [B, 1, 1, 1]
        combined = null + scale * (cond - null)
        if rescale:
            axes = tuple(range(1, cond.ndim))
            ratio = cond.std(axes, keepdims=True) / combined.std(axes, keepdims=True)
            combined = combined * (rescale * ratio + 1.0 - rescale)
        return jnp.where(inside, combined, cond)

    return fn
