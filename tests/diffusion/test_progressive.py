"""Progressive distillation of what is known exactly: Gaussian data, a single point."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion import progressive
from sdjax.diffusion.grids import SamplerConfig, make_grid
from sdjax.diffusion.prediction import target
from sdjax.diffusion.samplers import sample
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.errors import UserError

SPREAD = 0.4  # of the Gaussian data, around MEAN
MEAN = 0.3


def setting(*, to_one, zero):
    schedule = make_schedule(ScheduleConfig(zero_terminal_snr=zero))
    return schedule, SamplerConfig(spacing="trailing", set_alpha_to_one=to_one, steps=1)


def at(levels):
    """alpha and sigma, float32 [1] each."""
    return tuple(jnp.asarray(level, jnp.float32)[None] for level in levels)


def gaussian_v(x, alpha, sigma):
    """The exact v of N(MEAN, SPREAD^2) at states x."""
    x0 = MEAN + alpha * SPREAD**2 * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)
    return target("v_prediction", x0, (x - alpha * x0) / sigma, alpha, sigma)


def test_points_are_those_of_the_sampler_and_of_diffusers():
    """The student's timesteps are every second one of its teacher's."""
    schedule, sampler = setting(to_one=False, zero=False)
    for steps in (1, 2, 4):
        points = progressive.halving(schedule, sampler, steps)
        theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
        theirs.set_timesteps(steps)
        np.testing.assert_array_equal(points.timesteps, theirs.timesteps)
        theirs.set_timesteps(2 * steps)
        both = np.stack([points.timesteps, points.middles], axis=1)
        np.testing.assert_array_equal(both.reshape(-1), theirs.timesteps)
        assert points.end[-1, 0] == schedule.alpha64[0]
        np.testing.assert_array_equal(points.end[:-1], points.begin[1:])
    for steps in (3, 5, 16, 32):  # of which some divide no 1000 timesteps
        points = progressive.halving(schedule, sampler, steps)
        assert (np.diff(points.timesteps) < 0).all() and (points.middles < points.timesteps).all()
    with pytest.raises(UserError, match="expected at most 1000"):
        progressive.halving(schedule, sampler, 600)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("zero", [True, False])
def test_a_student_draws_in_half_of_the_steps_what_its_teacher_draws(to_one, zero):
    """Down to a single step, each student made of the one before by the target alone."""
    schedule, sampler = setting(to_one=to_one, zero=zero)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 1)), jnp.float32)

    def drawn(denoise, steps):
        own = SamplerConfig(spacing="trailing", set_alpha_to_one=to_one, steps=steps)
        found, _ = sample(
            denoise, noise, schedule=schedule, prediction_type="v_prediction", sampler=own
        )
        return found

    def teacher(x, t):
        alpha, sigma = (
            jnp.asarray(table, jnp.float32)[t.astype(jnp.int32)].reshape(-1, 1, 1, 1)
            for table in (schedule.alpha, schedule.sigma)
        )
        return gaussian_v(x, alpha, sigma)

    def student_of(teacher, steps):
        points = progressive.halving(schedule, sampler, steps)

        def student(x, t):
            i = jnp.argmin(jnp.abs(jnp.asarray(points.timesteps) - t[0]))
            begin, middle, end = (
                tuple(jnp.full(len(x), jnp.asarray(table, jnp.float32)[i, k]) for k in (0, 1))
                for table in (points.begin, points.middle, points.end)
            )
            second = jnp.full(len(x), jnp.asarray(points.middles, jnp.float32)[i])
            between = progressive.ddim("v_prediction", teacher(x, t), x, begin, middle)
            last = progressive.ddim("v_prediction", teacher(between, second), between, middle, end)
            x0 = progressive.target(x, last, begin, end)
            alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in begin)
            return target("v_prediction", x0, (x - alpha * x0) / sigma, alpha, sigma)

        return student

    wanted, one = drawn(teacher, 8), teacher
    for steps in (4, 2, 1):
        one = student_of(one, steps)
        np.testing.assert_allclose(drawn(one, steps), wanted, rtol=0, atol=2e-5)


def test_the_target_of_gaussian_data_is_the_closed_form():
    """With MEAN = 0, a step of DDIM multiplies by (a' a s^2 + b' b) / (a^2 s^2 + b^2)."""
    schedule, sampler = setting(to_one=True, zero=True)
    points = progressive.halving(schedule, sampler, 4)
    z = jnp.array([[1.3]], jnp.float32)
    for begin, middle, end in zip(points.begin, points.middle, points.end, strict=True):
        factor = 1.0
        for (a, b), (c, d) in ((begin, middle), (middle, end)):
            factor *= (c * a * SPREAD**2 + d * b) / (a**2 * SPREAD**2 + b**2)
        ratio = end[1] / begin[1]
        exact = 1.3 * (factor - ratio) / (end[0] - ratio * begin[0])

        def step(x, here, there):
            a, b = at(here)
            x0 = a * SPREAD**2 * x / (a**2 * SPREAD**2 + b**2)
            return progressive.ddim("sample", x0, x, at(here), at(there))

        found = progressive.target(z, step(step(z, begin, middle), middle, end), at(begin), at(end))
        np.testing.assert_allclose(found, [[exact]], rtol=2e-5, atol=2e-6)


def test_the_target_of_a_single_point_is_the_point():
    """Its trajectories are straight, so that a step and two are the same."""
    schedule, sampler = setting(to_one=False, zero=False)
    points = progressive.halving(schedule, sampler, 8)
    z = jax.random.normal(jax.random.key(0), (1, 5))
    x0 = jnp.full((1, 5), 0.7)
    for begin, middle, end in zip(points.begin, points.middle, points.end, strict=True):
        between = progressive.ddim("sample", x0, z, at(begin), at(middle))
        last = progressive.ddim("sample", x0, between, at(middle), at(end))
        found = progressive.target(z, last, at(begin), at(end))
        np.testing.assert_allclose(found, x0, rtol=1e-4)


def test_the_weights_are_those_of_the_paper():
    schedule, _ = setting(to_one=True, zero=True)
    alpha, sigma = (jnp.asarray(table)[jnp.array([999, 900, 100])]
                    for table in (schedule.alpha, schedule.sigma))  # fmt: skip
    snr = (schedule.alpha64 / schedule.sigma64)[[999, 900, 100]] ** 2
    assert snr[0] == 0 and snr[1] < 1 < snr[2]
    found = progressive.weight("truncated_snr", alpha, sigma)
    np.testing.assert_allclose(found, [1, 1, snr[2]], rtol=1e-5)
    # SNR + 1 of the error of x0 is the squared error of v.
    error = jnp.array([0.3, -0.2, 0.1])
    eps = jnp.array([0.5, 1.0, -2.0])
    xt = alpha * 0.4 + sigma * eps

    def v(x0):
        return target("v_prediction", x0, (xt - alpha * x0) / sigma, alpha, sigma)

    found = progressive.weight("snr_plus_one", alpha, sigma) * error**2
    np.testing.assert_allclose(found, (v(0.4 + error) - v(jnp.full(3, 0.4))) ** 2, rtol=1e-3)


def test_the_students_points_are_the_samplers_for_any_number_of_steps():
    """Whether or not it divides the timesteps."""
    schedule, sampler = setting(to_one=True, zero=True)
    for steps in range(1, 60):
        points = progressive.halving(schedule, sampler, steps)
        own = make_grid(schedule, SamplerConfig(spacing="trailing", steps=steps))
        np.testing.assert_array_equal(points.timesteps, own.timesteps)
