"""The sampling loop: one `lax.scan` over the coefficient rows of any sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.grids import SAMPLERS, SPACINGS, SamplerConfig
from sdjax.diffusion.prediction import check_prediction, to_x0
from sdjax.diffusion.schedules import Schedule
from sdjax.diffusion.solvers import make_plan
from sdjax.errors import UserError

__all__ = ["SAMPLERS", "SPACINGS", "SamplerConfig", "sample"]


def keep(state: Any, i: jax.Array, x0: jax.Array) -> Any:
    """The callback that sees nothing."""
    return state


def leave(x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """The constraint that leaves a state as it is."""
    return x


def sample(
    denoise_fn: Callable[[jax.Array, jax.Array], jax.Array],
    latents: jax.Array,
    *,
    schedule: Schedule,
    prediction_type: str,
    sampler: SamplerConfig,
    keys: jax.Array | None = None,
    noise_fn: Callable[[jax.Array], jax.Array] | None = None,
    callback: Callable[[Any, jax.Array, jax.Array], Any] = keep,
    state: Any = (),
    window: tuple[int, int] | None = None,
    begun: bool = False,
    constrain: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = leave,
) -> tuple[jax.Array, Any]:
    """Turn standard normal latents [B,h,w,c] into x0 [B,h,w,c], float32. Jittable.

    denoise_fn: (xt [B,h,w,c] float32, timesteps [B] float32) -> prediction; traced once.
    keys: [B], one per example, for the samplers that add noise (ddpm, euler_ancestral, ddim with
    eta > 0). noise_fn(i), instead of keys, gives the standard normal noise [B,h,w,c] of step i.
    callback(state, i, x0) -> state: called after evaluation i (int32 scalar) of the network with
    the x0 [B,h,w,c] that it estimates; traced once, right after denoise_fn and in the same trace.
    state: any pytree of arrays, as it is before the first evaluation.
    window: the steps first <= i < last to take alone, see `make_plan`; the result is then the state
    at the end of them.
    begun: whether latents are the state xt at the first evaluation, and not noise.
    constrain(x, alpha, sigma) -> x: changes each state after a step, which has these levels.
    Returns (x0 [B,h,w,c], the last state).
    Raises ValueError when sampler, schedule and prediction_type do not go together, and when noise
    is needed but neither keys nor noise_fn is given.
    """
    check_prediction(prediction_type)
    if prediction_type == "epsilon" and (schedule.continuous or schedule.alpha64[-1] == 0.0):
        raise UserError(
            "prediction_type is 'epsilon', but the schedule ends in pure noise, where eps says "
            "nothing of x0; expected 'v_prediction', 'sample' or 'flow'"
        )
    plan = make_plan(schedule, sampler, sampler.flow.tokens(*latents.shape[1:3]), window)
    if plan.stochastic and keys is None and noise_fn is None:
        raise UserError(
            f"sampler {sampler.name!r} adds noise, but keys is None; pass one key per example"
        )
    x = jnp.asarray(latents, jnp.float32) * jnp.float32(1.0 if begun else plan.init_scale)
    nothing = jnp.zeros_like(x)
    outputs_kept = max(plan.mix.shape[1] - 1, 0)

    def fresh_noise(i: jax.Array) -> jax.Array:
        if not plan.stochastic:
            return nothing
        if noise_fn is not None:
            return noise_fn(i)
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:])  # noqa: E731
        return jax.vmap(draw)(keys)

    def step(carry, row):
        (x, base, m1, m2), outputs, seen = carry
        i, at_base, t, alpha, sigma, to_x, to_base, mix, *after = row
        out = denoise_fn(x, jnp.broadcast_to(t, x.shape[:1])).astype(jnp.float32)
        xt = x
        if outputs_kept:
            outputs = (out, *outputs)
            out, xt = _combine(mix, outputs), jnp.where(at_base, base, x)
        unclipped = to_x0(prediction_type, out, xt, alpha, sigma)
        m0, more = unclipped, ()
        if np.isfinite(plan.clip):
            m0, more = jnp.clip(unclipped, -plan.clip, plan.clip), (unclipped,)
        terms = (x, base, m0, m1, m2, fresh_noise(i), *more)
        following = constrain(_combine(to_x, terms), *after)
        solver = (following, _combine(to_base, terms), m0, m1)
        return (solver, outputs[:outputs_kept], callback(seen, i, m0)), None

    tables: tuple[np.ndarray, ...] = (
        plan.timesteps,
        plan.alpha,
        plan.sigma,
        plan.to_x,
        plan.to_base,
        plan.mix,
    )
    tables += (plan.next_alpha, plan.next_sigma)
    evaluations, at_base = jnp.arange(len(plan.timesteps)), jnp.asarray(plan.at_base)
    rows = (evaluations, at_base, *(jnp.asarray(table, jnp.float32) for table in tables))
    before = ((x, nothing, nothing, nothing), (nothing,) * outputs_kept, state)
    (solver, _, seen), _ = jax.lax.scan(step, before, rows)
    return solver[0], seen


def _combine(coefficients: jax.Array, terms: tuple[jax.Array, ...]) -> jax.Array:
    """sum_k coefficients[k] * terms[k]; coefficients [K], terms K arrays of one shape."""
    total = coefficients[0] * terms[0]
    for k in range(1, len(terms)):
        total = total + coefficients[k] * terms[k]
    return total
