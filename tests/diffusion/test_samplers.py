"""Samplers on their own: grids, exactness on a Gaussian, noise keys, tracing, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion.grids import SAMPLERS, SamplerConfig, make_grid
from sdjax.diffusion.prediction import convert
from sdjax.diffusion.samplers import sample
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule, schedule_at
from sdjax.diffusion.solvers import M0, NOISE, X, make_plan

SD = make_schedule(ScheduleConfig())
FLOW = make_schedule(ScheduleConfig(kind="flow"))
# The Stable Diffusion schedule in steps so fine that rounding a timestep does not matter
FINE = make_schedule(
    ScheduleConfig(beta_start=0.00085 / 20, beta_end=0.012 / 20, num_train_timesteps=20_000)
)
LATENTS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 4)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 2)
MEAN, STD = 0.8, 0.5


def schedule_for(name):
    return FLOW if name == "flow_euler" else SD


def gaussian_denoiser(schedule, prediction, mean=MEAN, std=STD):
    """The exact network for pixels drawn from N(mean, std**2)."""

    def denoise_fn(xt, t):
        alpha, sigma = (s[:, None, None, None] for s in schedule_at(schedule, t))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x0 = mean + gain * (xt - alpha * mean)
        return convert("sample", prediction, x0, xt, alpha, sigma)

    return denoise_fn


def _x0(*args, **options):
    return sample(*args, **options)[0]


def run(name, steps, denoise_fn, schedule=None, prediction="sample", latents=LATENTS, **fields):
    schedule = schedule or schedule_for(name)
    config = SamplerConfig(name=name, steps=steps, **fields)
    return _x0(
        denoise_fn,
        latents,
        schedule=schedule,
        prediction_type=prediction,
        sampler=config,
        noise_fn=lambda i: jnp.sin(100 * latents + i),
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_single_point_is_found_exactly(name, prediction):
    """Data that is one point: every sampler must end on it, in any number of steps."""
    if name == "flow_euler" and prediction == "epsilon":
        prediction = "sample"
    if name == "pndm" and prediction == "v_prediction":
        prediction = "epsilon"  # it adds up outputs of several points, and v differs between them
    schedule = schedule_for(name)
    denoise_fn = gaussian_denoiser(schedule, prediction, std=0.0)
    x0 = run(name, 4, denoise_fn, prediction=prediction, set_alpha_to_one=True)
    np.testing.assert_allclose(x0, MEAN, atol=2e-4 if prediction == "epsilon" else 2e-5)


def ode_error(name, steps):
    """Largest distance from the exact solution of the probability-flow ODE on a Gaussian.

    All these samplers end by taking the x0 estimate of the last point for the answer, so the exact
    solution is followed to that point and finished in the same way.
    """
    schedule = FLOW if name == "flow_euler" else FINE
    fields = {"set_alpha_to_one": True, "karras": name in ("heun", "dpmpp_2m", "unipc")}
    plan = make_plan(schedule, SamplerConfig(name=name, steps=steps, **fields))
    np.testing.assert_allclose(plan.to_x[-1], [0, 0, 1, 0, 0, 0, 0], atol=1e-12)
    # The ODE keeps (xt - alpha*mean) / std(xt)
    spread = np.hypot(plan.alpha * STD, plan.sigma)
    start = np.asarray(LATENTS, np.float64) * plan.init_scale
    standardised = (start - plan.alpha[0] * MEAN) / spread[0]
    exact = MEAN + plan.alpha[-1] * STD**2 / spread[-1] * standardised
    denoise_fn = gaussian_denoiser(schedule, "sample")
    return np.abs(run(name, steps, denoise_fn, schedule=schedule, **fields) - exact).max()


@pytest.mark.parametrize(
    "name, order",
    [("ddim", 1), ("euler", 1), ("flow_euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)],
)
def test_deterministic_samplers_converge_on_a_gaussian_at_their_order(name, order):
    """Four times the steps, 4**order times less error. (UniPC-2 is of order 3 by its corrector.)"""
    coarse, fine = ode_error(name, 20), ode_error(name, 80)
    assert coarse < 0.2
    assert coarse / fine > 0.7 * 4**order, (coarse, fine)


@pytest.mark.parametrize(
    "name, eta", [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5), ("euler_ancestral", 0.0)]
)
def test_stochastic_samplers_converge_to_the_gaussian(name, eta):
    """Mean and variance, carried exactly through the linear steps."""
    errors = []
    for steps in (50, 200, 1000):
        config = SamplerConfig(name=name, steps=steps, eta=eta, set_alpha_to_one=True)
        plan = make_plan(SD, config)
        mean = plan.alpha[0] * MEAN
        variance = (plan.alpha[0] * STD) ** 2 + plan.sigma[0] ** 2
        for alpha, sigma, row in zip(plan.alpha, plan.sigma, plan.to_x, strict=True):
            gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
            slope = row[X] + row[M0] * gain
            mean = slope * mean + row[M0] * (1 - gain * alpha) * MEAN
            variance = slope**2 * variance + row[NOISE] ** 2
        np.testing.assert_allclose(mean, MEAN, atol=1e-9)
        errors.append(abs(np.sqrt(variance) - STD))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.01


def test_ddim_with_full_noise_is_ddpm():
    ddim = make_plan(SD, SamplerConfig(name="ddim", steps=20, eta=1.0, set_alpha_to_one=True))
    ddpm = make_plan(SD, SamplerConfig(name="ddpm", steps=20))
    np.testing.assert_allclose(ddim.to_x, ddpm.to_x, atol=1e-12)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [7, 30])
def test_ddim_steps_along_its_grid_when_the_steps_do_not_divide_the_table(steps, spacing):
    """DDIM and Euler are one method; on the same points they must agree."""
    denoise_fn = gaussian_denoiser(SD, "v_prediction")
    fields = {"prediction": "v_prediction", "spacing": spacing}
    ddim = run("ddim", steps, denoise_fn, set_alpha_to_one=True, **fields)
    scale = make_plan(SD, SamplerConfig(name="euler", steps=steps, spacing=spacing)).init_scale
    euler = run("euler", steps, denoise_fn, latents=LATENTS / scale, **fields)
    np.testing.assert_allclose(ddim, euler, atol=1e-5)


def timesteps(steps=50, **fields):
    return make_grid(SD, SamplerConfig(steps=steps, **fields)).timesteps


def test_grids_of_fifty_steps():
    np.testing.assert_array_equal(timesteps(steps_offset=0), np.arange(980, -1, -20))
    np.testing.assert_array_equal(timesteps(), np.arange(981, 0, -20))
    np.testing.assert_array_equal(timesteps(spacing="trailing"), np.arange(999, 18, -20))
    linspace = timesteps(spacing="linspace")
    assert linspace[0] == 999 and linspace[-1] == 0 and len(linspace) == 50


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "heun"])
def test_as_many_steps_as_timesteps_stay_inside_the_table(name, spacing):
    grid = timesteps(1000, name=name, spacing=spacing, steps_offset=1)
    np.testing.assert_allclose(grid, np.arange(999, -1, -1), atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_few_steps_start_noisy_and_are_finite(name, spacing):
    for steps in (1, 2, 3):
        plan = make_plan(schedule_for(name), SamplerConfig(name=name, steps=steps, spacing=spacing))
        assert np.isfinite(plan.to_x).all() and np.isfinite(plan.to_base).all()
        evaluations = {"heun": 2 * steps - 1, "pndm": steps + (steps > 1)}
        assert len(plan.timesteps) == evaluations.get(name, steps)
        assert spacing == "leading" or plan.timesteps[0] >= 999


def test_first_step_from_zero_snr_is_finite():
    schedule = make_schedule(ScheduleConfig(zero_terminal_snr=True))
    for name in SAMPLERS[:-1]:
        plan = make_plan(schedule, SamplerConfig(name=name, steps=10, spacing="trailing"))
        assert plan.timesteps[0] == 999 and np.isfinite(plan.to_x).all()
        of_table = name in ("ddpm", "ddim", "pndm", "lcm")
        assert plan.alpha[0] == 0.0 if of_table else 0 < plan.alpha[0] < 3e-4


def test_ddim_ends_at_the_first_alpha_of_the_table_unless_told_otherwise():
    assert make_grid(SD, SamplerConfig()).alpha[-1] == SD.alpha64[0]
    assert make_grid(SD, SamplerConfig(set_alpha_to_one=True)).alpha[-1] == 1.0


@pytest.mark.parametrize("name", SAMPLERS)
def test_network_is_traced_once_and_jit_changes_nothing(name):
    calls = []
    denoiser = gaussian_denoiser(schedule_for(name), "sample")

    def denoise_fn(xt, t):
        assert xt.shape == LATENTS.shape and t.shape == (2,) and t.dtype == jnp.float32
        calls.append(1)
        return denoiser(xt, t).astype(jnp.bfloat16).astype(jnp.float32)

    jitted = jax.jit(lambda latents: run(name, 6, denoise_fn, latents=latents))(LATENTS)
    assert len(calls) == 1
    assert jitted.dtype == jnp.float32 and jitted.shape == LATENTS.shape
    np.testing.assert_allclose(jitted, run(name, 6, denoise_fn), atol=1e-5)


def test_noise_of_an_example_depends_on_its_key_alone():
    @jax.jit
    def draw(latents, keys):
        return _x0(
            gaussian_denoiser(SD, "sample"),
            latents,
            schedule=SD,
            prediction_type="sample",
            sampler=SamplerConfig(name="ddpm", steps=3),
            keys=keys,
        )

    both = draw(LATENTS, KEYS)
    np.testing.assert_allclose(both[1:], draw(LATENTS[1:], KEYS[1:]), atol=1e-6)
    other = draw(LATENTS, jnp.stack([KEYS[0], KEYS[0]]))
    np.testing.assert_array_equal(both[0], other[0])
    assert np.abs(both[1] - other[1]).max() > 0.01


def test_sampler_that_needs_noise_asks_for_keys():
    for config in (SamplerConfig(name="ddpm"), SamplerConfig(name="ddim", eta=0.5)):
        with pytest.raises(ValueError, match="adds noise, but keys is None"):
            sample(
                gaussian_denoiser(SD, "sample"),
                LATENTS,
                schedule=SD,
                prediction_type="sample",
                sampler=config,
            )


@pytest.mark.parametrize(
    "schedule, name, prediction, message",
    [
        (SD, "flow_euler", "flow", "expected any sampler but 'flow_euler'"),
        (FLOW, "ddim", "flow", "expected 'flow_euler'"),
        (FLOW, "flow_euler", "epsilon", "the schedule ends in pure noise"),
        (make_schedule(ScheduleConfig(zero_terminal_snr=True)), "euler", "epsilon", "pure noise"),
        (SD, "ddim", "x0", "prediction_type is 'x0'"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(schedule, name, prediction, message):
    with pytest.raises(ValueError, match=message):
        run(name, 4, lambda xt, t: xt, schedule=schedule, prediction=prediction)


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_a_callback_sees_every_evaluation_and_changes_nothing(name):
    denoise_fn, config = gaussian_denoiser(SD, "epsilon"), SamplerConfig(name=name, steps=4)
    options = dict(schedule=SD, prediction_type="epsilon", sampler=config)
    count = len(make_plan(SD, config).timesteps)
    blank = (jnp.zeros((count, *LATENTS.shape)), jnp.zeros((count, *LATENTS.shape[:1])))
    inputs = []

    def noting(xt, t):
        inputs.append((xt, t))
        return denoise_fn(xt, t)

    def see(state, i, x0):
        xt, t = inputs.pop()  # of the same trace
        alpha, sigma = (s[:, None, None, None] for s in schedule_at(SD, t))
        own = (xt - sigma * denoise_fn(xt, t)) / alpha
        return state[0].at[i].set(jnp.abs(x0 - own)), state[1].at[i].set(t)

    x0, (errors, timesteps) = sample(noting, LATENTS, **options, callback=see, state=blank)
    assert np.array_equal(x0, sample(denoise_fn, LATENTS, **options)[0])
    assert np.array_equal(timesteps[:, 0], np.float32(make_plan(SD, config).timesteps))
    assert errors.max() < 1e-4  # alpha is 0.07 at first


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "plms"}, "sampler.name is 'plms'; expected one of ddpm"),
        ({"spacing": "karras"}, "sampler.spacing is 'karras'"),
        ({"steps": 0}, "sampler.steps is 0"),
        ({"steps_offset": -1}, "sampler.steps_offset is -1"),
        ({"eta": 2.0}, "sampler.eta is 2.0"),
        ({"name": "euler", "eta": 0.5}, "only 'ddim' has eta"),
        ({"name": "ddim", "karras": True}, "sampler.karras is True"),
    ],
)
def test_bad_sampler_config_names_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**fields)


@pytest.mark.parametrize("name, steps", [("ddim", 1001), ("dpmpp_2m", 1000)])
def test_more_steps_than_timesteps_are_refused(name, steps):
    with pytest.raises(ValueError, match=f"sampler.steps is {steps}; expected at most"):
        make_plan(SD, SamplerConfig(name=name, steps=steps))
