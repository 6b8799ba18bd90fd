"""Consistency: one step from a noisy state to the x0 at which its trajectory ends.

The parametrisation and the grid of latent consistency models (Luo et al. 2023, arXiv:2310.04378,
and diffusers, LCMScheduler and train_lcm_distill_sd_wds.py):

    f(xt, t) = c_skip(t) * xt + c_out(t) * x0(xt, t),   c_skip(0) = 1,  c_out(0) = 0.
"""

from __future__ import annotations

import numpy as np

from sdjax.errors import UserError

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


def boundary(timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return c_skip and c_out of timesteps, float64 of the same shape."""
    scaled = TIMESTEP_SCALING * np.asarray(timesteps, np.float64)
    skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    return skip, scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)


def solver_grid(points: int, num_train_timesteps: int) -> np.ndarray:
    """Return the timesteps of the teacher's solver, ascending int [points]: k n - 1, k = T // N.

    Raises:
        UserError: the schedule has fewer timesteps.
    """
    if not 1 <= points <= num_train_timesteps:
        raise UserError(
            f"original_steps is {points}; expected 1 to the {num_train_timesteps} timesteps of the "
            "schedule"
        )
    return np.arange(1, points + 1) * (num_train_timesteps // points) - 1


def sampling_grid(steps: int, points: int, num_train_timesteps: int) -> np.ndarray:
    """Return the timesteps that are drawn with, descending int [steps], of the solver's grid.

    Raises:
        UserError: the grid has fewer points.
    """
    grid = solver_grid(points, num_train_timesteps)[::-1]
    if steps > points:
        raise UserError(
            f"sampler.steps is {steps}; expected at most original_steps = {points}, the points of "
            "the grid that an LCM is distilled on"
        )
    return grid[np.floor(np.linspace(0, points, num=steps, endpoint=False)).astype(np.int64)]
