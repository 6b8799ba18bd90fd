"""The consistency function and the grids of latent consistency models, by published numbers."""

import diffusers
import numpy as np
import pytest

from sdjax.diffusion.consistency import boundary, sampling_grid, solver_grid
from sdjax.errors import UserError


def test_the_boundary_is_that_of_the_scheduler():
    """At 0 the function is the identity; elsewhere it is the x0 of the network, nearly."""
    skip, out = boundary(np.array([0, 1, 19, 999]))
    np.testing.assert_allclose(skip, [1, 0.0024938, 6.925e-6, 2.505e-9], rtol=1e-4)
    np.testing.assert_allclose(out, [0, 0.9987523, 0.9999965, 1 - 1.25e-9], rtol=1e-7)
    scheduler = diffusers.LCMScheduler()
    every = np.arange(1000)
    theirs = [scheduler.get_scalings_for_boundary_condition_discrete(int(t)) for t in every]
    np.testing.assert_allclose(np.stack(boundary(every), axis=1), theirs, rtol=1e-12)


def test_the_solver_goes_to_the_last_timestep():
    grid = solver_grid(50, 1000)
    assert (grid[0], grid[1], grid[-1], len(grid)) == (19, 39, 999, 50)
    np.testing.assert_array_equal(sampling_grid(4, 50, 1000), [999, 759, 499, 259])
    np.testing.assert_array_equal(
        sampling_grid(8, 50, 1000), [999, 879, 759, 639, 499, 379, 259, 139]
    )
    np.testing.assert_array_equal(sampling_grid(4, 100, 1000), [999, 749, 499, 249])


@pytest.mark.parametrize("points", [0, 1001])
def test_a_grid_of_more_points_than_timesteps_is_refused(points):
    with pytest.raises(UserError, match=f"original_steps is {points}; expected 1 to the 1000"):
        solver_grid(points, 1000)
