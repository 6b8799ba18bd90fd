"""Identities between the prediction types."""

from __future__ import annotations

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.diffusion import prediction
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule

_random = np.random.default_rng(0)
X0, EPS = _random.normal(size=(2, 6, 4, 4, 4)).astype(np.float32)
T = np.array([1, 100, 300, 500, 800, 990])
VP = make_schedule(ScheduleConfig())
FLOW = make_schedule(ScheduleConfig(kind="flow"))


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("source", prediction.PREDICTIONS)
@pytest.mark.parametrize("destination", prediction.PREDICTIONS)
def test_any_prediction_converts_to_any_other(source, destination, schedule):
    alpha, sigma = jnp.asarray(schedule.alpha[T]), jnp.asarray(schedule.sigma[T])
    xt = prediction.add_noise(X0, EPS, alpha, sigma)
    out = prediction.target(source, X0, EPS, alpha, sigma)
    got = prediction.convert(source, destination, out, xt, alpha, sigma)
    wanted = prediction.target(destination, X0, EPS, alpha, sigma)
    # x0 from eps loses a factor sigma/alpha of precision, eps from x0 alpha/sigma: up to 100 here
    amplified = {source, destination} - {"v_prediction", "flow"} != set() and source != destination
    np.testing.assert_allclose(got, wanted, atol=5e-4 if amplified else 5e-6)


@pytest.mark.parametrize("source", prediction.PREDICTIONS)
def test_conversions_round_trip_to_1e_6(source):
    t = np.array([300, 400, 500, 550, 600, 650])
    alpha, sigma = jnp.asarray(VP.alpha[t]), jnp.asarray(VP.sigma[t])
    xt = prediction.add_noise(X0, EPS, alpha, sigma)
    out = prediction.target(source, X0, EPS, alpha, sigma)
    for other in prediction.PREDICTIONS:
        there = prediction.convert(source, other, out, xt, alpha, sigma)
        back = prediction.convert(other, source, there, xt, alpha, sigma)
        assert np.sqrt(np.mean((back - out) ** 2)) < 1e-6


def test_velocity_and_noising_match_diffusers():
    reference = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    x0, eps, t = torch.from_numpy(X0), torch.from_numpy(EPS), torch.from_numpy(T)
    alpha, sigma = VP.alpha[T], VP.sigma[T]
    np.testing.assert_allclose(
        prediction.target("v_prediction", X0, EPS, alpha, sigma),
        reference.get_velocity(x0, eps, t),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        prediction.add_noise(X0, EPS, alpha, sigma), reference.add_noise(x0, eps, t), atol=1e-5
    )


def test_v_target_is_alpha_eps_minus_sigma_x0():
    v = prediction.target("v_prediction", X0, EPS, VP.alpha[T], VP.sigma[T])
    a, s = VP.alpha[T][:, None, None, None], VP.sigma[T][:, None, None, None]
    np.testing.assert_allclose(v, a * EPS - s * X0, atol=1e-6)


def test_flow_target_is_noise_minus_data():
    """The sign of SD3 and FLUX: stepping by it from noise to data lowers sigma."""
    flow = prediction.target("flow", X0, EPS, FLOW.alpha[T], FLOW.sigma[T])
    np.testing.assert_array_equal(flow, EPS - X0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    x = torch.from_numpy(EPS)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.from_numpy(np.array(flow)), t, x).prev_sample
    np.testing.assert_allclose(x, X0, atol=1e-5)


@pytest.mark.parametrize("kind", prediction.PREDICTIONS)
@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_output_slopes_are_the_derivatives_of_x0_and_eps(kind, schedule):
    alpha, sigma = jnp.float32(schedule.alpha[400]), jnp.float32(schedule.sigma[400])
    xt, out, step = jnp.float32(0.3), jnp.float32(0.7), jnp.float32(0.5)
    for convert, slope in zip(
        (prediction.to_x0, prediction.to_eps),
        prediction.output_slopes(kind, alpha, sigma),
        strict=True,
    ):
        change = convert(kind, out + step, xt, alpha, sigma) - convert(kind, out, xt, alpha, sigma)
        np.testing.assert_allclose(jnp.abs(change), slope * step, rtol=1e-5, atol=1e-6)


def test_unknown_prediction_type_is_an_error():
    with pytest.raises(ValueError, match="prediction_type is 'x0'; expected one of epsilon"):
        prediction.target("x0", X0, EPS, VP.alpha[T], VP.sigma[T])
