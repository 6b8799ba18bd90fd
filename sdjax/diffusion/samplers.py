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
from sdjax.diffusion.solvers import SolverPlan, make_plan
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
    check_schedule(schedule, prediction_type)
    plan = make_plan(schedule, sampler, sampler.flow.tokens(*latents.shape[1:3]), window)
    if plan.stochastic and keys is None and noise_fn is None:
        raise UserError(
            f"sampler {sampler.name!r} adds noise, but keys is None; pass one key per example"
        )

    def noise(i: jax.Array) -> jax.Array:
        return noise_fn(i) if noise_fn is not None else noise_of(keys, i, latents.shape[1:])

    step = make_step(
        denoise_fn, plan, prediction_type=prediction_type, noise=noise, constrain=constrain
    )

    def seeing(carry, row):
        (before, seen), i = carry, row[0]
        after = step(before, row)
        return (after, callback(seen, i, estimate(after))), None

    rows = tuple(jnp.asarray(table) for table in step_rows(plan))
    before = first_carry(plan, latents, begun=begun), state
    (after, seen), _ = jax.lax.scan(seeing, before, rows)
    return after[0][0], seen


def check_schedule(schedule: Schedule, prediction_type: str) -> None:
    """Raise ValueError where x0 does not follow from a prediction at every level of a schedule."""
    check_prediction(prediction_type)
    if prediction_type == "epsilon" and (schedule.continuous or schedule.alpha64[-1] == 0.0):
        raise UserError(
            "prediction_type is 'epsilon', but the schedule ends in pure noise, where eps says "
            "nothing of x0; expected 'v_prediction', 'sample' or 'flow'"
        )


Carry = tuple[tuple[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]
Row = tuple[Any, ...]


def step_rows(plan: SolverPlan) -> tuple[np.ndarray, ...]:
    """Return what each evaluation of a plan takes, arrays [n, ...]; one row goes to a step."""
    tables = (
        plan.timesteps, plan.alpha, plan.sigma, plan.to_x, plan.to_base, plan.mix, plan.next_alpha,
        plan.next_sigma,
    )  # fmt: skip
    numbers = np.arange(len(plan.timesteps), dtype=np.int32)
    return numbers, np.asarray(plan.at_base), *(np.asarray(t, np.float32) for t in tables)


def first_carry(plan: SolverPlan, latents: jax.Array, *, begun: bool = False) -> Carry:
    """Return what the first step takes; see `sample`."""
    x = jnp.asarray(latents, jnp.float32) * jnp.float32(1.0 if begun else plan.init_scale)
    nothing = jnp.zeros_like(x)
    return (x, nothing, nothing, nothing), (nothing,) * _outputs_kept(plan)


def estimate(carry: Carry) -> jax.Array:
    """Return the x0 [B,h,w,c] that the last step estimated."""
    return carry[0][2]


def noise_of(keys: jax.Array | None, i: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the standard normal noise [B, *shape] of step i; keys: [B], one per example."""
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, i), shape)  # noqa: E731
    return jax.vmap(draw)(keys)


def make_step(
    denoise_fn: Callable[[jax.Array, jax.Array], jax.Array],
    plan: SolverPlan,
    *,
    prediction_type: str,
    noise: Callable[[jax.Array], jax.Array],
    constrain: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = leave,
) -> Callable[[Carry, Row], Carry]:
    """Return (carry, row) -> carry after one evaluation of the network.

    The function is the same for all plans of one `kind_of_step`; the rows tell them apart.

    Args:
        denoise_fn, constrain: see `sample`.
        noise: i -> the noise [B,h,w,c] of step i; not called where the sampler adds none.
    """
    outputs_kept, stochastic, clip = kind_of_step(plan)

    def step(carry: Carry, row: Row) -> Carry:
        (x, base, m1, m2), outputs = carry
        i, at_base, t, alpha, sigma, to_x, to_base, mix, *after = row
        out = denoise_fn(x, jnp.broadcast_to(t, x.shape[:1])).astype(jnp.float32)
        xt = x
        if outputs_kept:
            outputs = (out, *outputs)
            out, xt = _combine(mix, outputs), jnp.where(at_base, base, x)
        unclipped = to_x0(prediction_type, out, xt, alpha, sigma)
        m0, more = unclipped, tuple[jax.Array, ...]()
        if np.isfinite(clip):
            m0, more = jnp.clip(unclipped, -clip, clip), (unclipped,)
        terms = (x, base, m0, m1, m2, noise(i) if stochastic else jnp.zeros_like(x), *more)
        following = constrain(_combine(to_x, terms), *after)
        return (following, _combine(to_base, terms), m0, m1), outputs[:outputs_kept]

    return step


def kind_of_step(plan: SolverPlan) -> tuple[int, bool, float]:
    """Return what of a plan is built into a step: outputs kept, noise added, limit of x0."""
    return _outputs_kept(plan), plan.stochastic, float(plan.clip)


def _outputs_kept(plan: SolverPlan) -> int:
    return max(plan.mix.shape[1] - 1, 0)


def _combine(coefficients: jax.Array, terms: tuple[jax.Array, ...]) -> jax.Array:
    """sum_k coefficients[k] * terms[k]; coefficients [K], terms K arrays of one shape."""
    total = coefficients[0] * terms[0]
    for k in range(1, len(terms)):
        total = total + coefficients[k] * terms[k]
    return total
