"""Classifier-free guidance (Ho & Salimans 2022), with rescaling and an interval; skipped layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SkipLayers:
    """Skip-layer guidance: away from what the network says without some of its blocks.

    layers: numbers of the blocks; () for none. SD3.5-medium takes (7, 8, 9).
    scale: of the difference, 2.8 in diffusers.
    start, stop: shares of the steps, between which it guides; neither end is included.

    Raises ValueError where a field is out of its range.
    """

    layers: tuple[int, ...] = ()
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def __post_init__(self) -> None:
        if any(layer < 0 for layer in self.layers):
            raise ValueError(f"skip.layers is {self.layers}; expected numbers from 0 on")
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ValueError(
                f"skip.start is {self.start} and skip.stop {self.stop}; expected 0 <= start <= "
                "stop <= 1"
            )


def guided(
    denoise_fn: Callable[[jax.Array, jax.Array, Any], jax.Array],
    context: Any,
    null_context: Any,
    *,
    scale: float | jax.Array,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    num_train_timesteps: int = 1000,
    middle: Any = None,
    middle_scale: float = 1.0,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return a guided fn(xt, timesteps) of denoise_fn(xt, timesteps, context).

    context: array or pytree of arrays [B, ...]; null_context: the same with leading size B or 1.
    scale: out = null + scale * (cond - null). The Python number 1 evaluates `context` alone; any
      other scale, or a traced one, evaluates both in one call of 2B examples [cond | null].
    rescale: 0 to 1, how far to bring the output's standard deviation back to that of the
      conditional output (Lin et al. 2023, section 3.4).
    interval: guide only where interval[0] <= t/num_train_timesteps <= interval[1]
      (Kynkaanniemi et al. 2024).
    middle: a third context, with a part of the condition; the output is then (InstructPix2Pix,
      arXiv 2211.09800, eq. 3)

          null + middle_scale * (middle - null) + scale * (cond - middle),

      evaluated in one call of 3B examples [cond | middle | null].

    Raises ValueError where rescale or interval is out of its range.
    """
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"guidance interval is {interval}; expected 0 <= low <= high <= 1")
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"guidance rescale is {rescale}; expected 0 to 1")
    if not isinstance(scale, jax.Array) and scale == middle_scale == 1:
        return lambda xt, t: denoise_fn(xt, t, context)

    others = [null_context] if middle is None else [middle, null_context]
    contexts, count = _together(context, others), 1 + len(others)  # [count * B, ...]

    def fn(xt: jax.Array, t: jax.Array) -> jax.Array:
        out = denoise_fn(jnp.concatenate([xt] * count), jnp.concatenate([t] * count), contexts)
        # In half precision cond - null would lose most of its digits.
        cond, *between, null = jnp.split(out.astype(jnp.float32), count)
        level = t / num_train_timesteps
        inside = (level >= low) & (level <= high)
        inside = inside.reshape(inside.shape + (1,) * (cond.ndim - 1))  # [B, 1, 1, 1]
        combined = null + scale * (cond - null)
        for half in between:
            combined = null + middle_scale * (half - null) + scale * (cond - half)
        if rescale:
            axes = tuple(range(1, cond.ndim))
            ratio = cond.std(axes, keepdims=True) / combined.std(axes, keepdims=True)
            combined = combined * (rescale * ratio + 1.0 - rescale)
        return jnp.where(inside, combined, cond)

    return fn


def _together(context: Any, others: Iterable[Any]) -> Any:
    """Contexts after one another, each array as many times as long as the first's."""
    return jax.tree.map(
        lambda c, *rest: jnp.concatenate(
            [c, *(jnp.broadcast_to(n, c.shape).astype(c.dtype) for n in rest)]
        ),
        context,
        *others,
    )


def with_skipped_layers(
    denoise_fn: Callable[[jax.Array, jax.Array], jax.Array],
    cond_fn: Callable[[jax.Array, jax.Array], jax.Array],
    skipped_fn: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    scale: float,
    timesteps: tuple[float, float],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return fn(xt, t) = denoise_fn + scale * (cond_fn - skipped_fn), within a range of timesteps.

    Skip-layer guidance leads away from what the network says without some of its blocks (diffusers
    pipeline_stable_diffusion_3.py, skip_guidance_layers). Outside the range neither of the other
    two functions is evaluated.

    Args:
        denoise_fn: (xt, t [B]) -> output, guided or not.
        cond_fn, skipped_fn: the same with the context alone, by all blocks and without some.
        timesteps: lowest and highest t, both within the range. All of a batch have the same t.
    """
    low, high = timesteps

    def fn(xt: jax.Array, t: jax.Array) -> jax.Array:
        def led(out: jax.Array) -> jax.Array:
            away = cond_fn(xt, t).astype(jnp.float32) - skipped_fn(xt, t).astype(jnp.float32)
            return out + scale * away

        inside = (t[0] >= low) & (t[0] <= high)
        return jax.lax.cond(inside, led, lambda out: out, denoise_fn(xt, t).astype(jnp.float32))

    return fn


def skipped_timesteps(
    timesteps: Iterable[float], start: float, stop: float
) -> tuple[float, float] | None:
    """Return the lowest and the highest timestep of the steps start * n < i < stop * n.

    Args:
        timesteps: of the n steps, falling.

    Returns:
        None if no step lies there.
    """
    values = [float(t) for t in timesteps]
    count = len(values)
    inside = [t for i, t in enumerate(values) if start * count < i < stop * count]
    return (min(inside), max(inside)) if inside else None
