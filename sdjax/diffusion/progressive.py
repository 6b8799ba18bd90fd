"""Progressive distillation: one step of DDIM for two.

Salimans & Ho 2022, arXiv:2202.00512, algorithm 2 and appendix G; and Meng et al. 2023,
arXiv:2210.03142, for guided teachers. With two steps of a teacher from zt at t to z'' at t'', the
student learns the x0 whose one step of DDIM ends there too:

    x~ = (z'' - (sigma'' / sigma) zt) / (alpha'' - (sigma'' / sigma) alpha).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.grids import SamplerConfig, make_grid
from sdjax.diffusion.prediction import add_noise, to_eps, to_x0
from sdjax.diffusion.schedules import Schedule

WEIGHTINGS = ("truncated_snr", "snr_plus_one")

Levels = tuple[jax.Array, jax.Array]  # alpha and sigma, [B] each


@dataclasses.dataclass(frozen=True, eq=False)
class Halving:
    """The points of a student's steps, noisiest first, and those of the teacher's within them.

    timesteps, middles: [n] float64, where the student begins a step, and the teacher's second.
    begin, middle, end: float64 [n, 2], alpha and sigma at the beginning of a step, between the
        teacher's two and at the end.
    """

    timesteps: np.ndarray
    middles: np.ndarray
    begin: np.ndarray
    middle: np.ndarray
    end: np.ndarray


def halving(schedule: Schedule, sampler: SamplerConfig, steps: int) -> Halving:
    """Return the points of a student of so many steps, of those that `sampler` visits.

    Raises:
        UserError: the schedule has fewer than twice as many timesteps.
    """
    own, twice = (
        make_grid(schedule, dataclasses.replace(sampler, steps=count))
        for count in (steps, 2 * steps)
    )
    # Where 2 n does not divide the timesteps, rounding may put the teacher's first points beside.
    levels, between = (np.stack([grid.alpha, grid.sigma], axis=-1) for grid in (own, twice))
    return Halving(own.timesteps, twice.timesteps[1::2], levels[:-1], between[1::2], levels[1:])


def ddim(
    prediction_type: str, out: jax.Array, xt: jax.Array, here: Levels, there: Levels
) -> jax.Array:
    """Return the state after a step of DDIM between two levels, by a network's output at xt."""
    x0, eps = (convert(prediction_type, out, xt, *here) for convert in (to_x0, to_eps))
    return add_noise(x0, eps, *there)


def target(xt: jax.Array, end: jax.Array, here: Levels, there: Levels) -> jax.Array:
    """Return the x0 with which one step of DDIM leads from xt to `end`; sigma > 0 at xt."""
    (alpha, sigma), (alpha_end, sigma_end) = (
        tuple(level.reshape(-1, *[1] * (xt.ndim - 1)) for level in levels)
        for levels in (here, there)
    )
    ratio = sigma_end / sigma
    return (end - ratio * xt) / (alpha_end - ratio * alpha)


def weight(kind: str, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """Return the weight of the squared error of x0; sigma > 0.

    "truncated_snr": max(SNR, 1), so that it counts where nothing but noise is seen;
    "snr_plus_one": SNR + 1, which is the squared error of v.

    Args:
        kind: one of WEIGHTINGS.
    """
    snr = jnp.square(alpha / sigma)
    return jnp.maximum(snr, 1.0) if kind == "truncated_snr" else snr + 1.0
