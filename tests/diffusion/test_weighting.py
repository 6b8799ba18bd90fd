"""Loss weightings: known values, the two usual mistakes, and equality across prediction types."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

from sdjax.diffusion.prediction import PREDICTIONS, add_noise, convert, target
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.diffusion.weighting import WEIGHTINGS, loss_weight

SD = make_schedule(ScheduleConfig())
SNR = SD.alphas_cumprod / (1 - SD.alphas_cumprod)
ZERO_SNR = make_schedule(ScheduleConfig(zero_terminal_snr=True))


def weights(kind, prediction, schedule=SD, **settings):
    alpha, sigma = jnp.asarray(schedule.alpha), jnp.asarray(schedule.sigma)
    return np.asarray(loss_weight(kind, prediction, alpha, sigma, **settings))


def test_min_snr_weights_match_the_paper_for_each_prediction():
    clipped = np.minimum(SNR, 5.0)
    np.testing.assert_allclose(weights("min_snr", "epsilon"), clipped / SNR, rtol=1e-5)
    np.testing.assert_allclose(weights("min_snr", "v_prediction"), clipped / (SNR + 1), rtol=1e-5)
    np.testing.assert_allclose(weights("min_snr", "sample"), clipped, rtol=1e-5)


def test_min_snr_weights_have_their_known_values():
    eps, v = weights("min_snr", "epsilon"), weights("min_snr", "v_prediction")
    np.testing.assert_allclose(eps[0], 0.0042536, rtol=1e-4)
    assert eps[999] == 1.0
    np.testing.assert_allclose(eps.mean(), 0.91657, rtol=1e-4)
    np.testing.assert_allclose(v.mean(), 0.29433, rtol=1e-4)


def test_min_snr_is_neither_of_its_two_wrong_versions():
    eps, v = weights("min_snr", "epsilon"), weights("min_snr", "v_prediction")
    shifted_twice = np.minimum(SNR + 1, 5.0) / (SNR + 1)  # SNR + 1 on both sides
    assert np.abs(v - shifted_twice).max() > 0.5
    assert np.abs(v - (np.minimum(SNR, 5.0) / SNR + 1)).max() > 0.5  # weights + 1
    assert np.abs(eps - shifted_twice).max() > 0.1


def test_snr_matches_diffusers():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    np.testing.assert_allclose(compute_snr(scheduler, torch.arange(1000)), SNR, rtol=2e-4)


@pytest.mark.parametrize("kind", [k for k in WEIGHTINGS if k != "cosmap"])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "flow"])
def test_weights_are_finite_at_zero_snr(kind, prediction):
    values = weights(kind, prediction, ZERO_SNR)
    assert np.isfinite(values).all() and (values >= 0).all()


def test_min_snr_of_epsilon_at_zero_snr_is_its_limit():
    assert weights("min_snr", "epsilon", ZERO_SNR)[999] == 1.0


@pytest.mark.parametrize("kind", ["min_snr", "p2", "debiased", "edm"])
def test_weighting_means_the_same_for_every_prediction(kind):
    """The weighted error of one and the same guess does not depend on how it is expressed."""
    rng = np.random.default_rng(0)
    x0, eps, guess = jnp.asarray(rng.normal(size=(3, 5, 2, 2, 4)), jnp.float32)
    t = np.array([50, 200, 400, 600, 900])
    alpha, sigma = jnp.asarray(SD.alpha[t]), jnp.asarray(SD.sigma[t])
    xt = add_noise(x0, eps, alpha, sigma)
    losses = []
    for prediction in PREDICTIONS:
        out = convert("v_prediction", prediction, guess, xt, alpha, sigma)
        error = (out - target(prediction, x0, eps, alpha, sigma)) ** 2
        losses.append(loss_weight(kind, prediction, alpha, sigma) * error.mean((1, 2, 3)))
    np.testing.assert_allclose(np.stack(losses[1:]), np.stack(losses[:-1]), rtol=1e-3)


def test_p2_debiased_and_edm_match_their_formulas():
    np.testing.assert_allclose(
        weights("p2", "epsilon", p2_k=2.0, p2_gamma=0.5), (2 + SNR) ** -0.5, rtol=1e-5
    )
    np.testing.assert_allclose(weights("debiased", "epsilon"), SNR**-0.5, rtol=1e-5)
    k = SNR**-0.5  # the sigma of EDM
    np.testing.assert_allclose(
        weights("edm", "sample", sigma_data=0.5), (k**2 + 0.25) / (k * 0.5) ** 2, rtol=1e-5
    )
    np.testing.assert_allclose(weights("edm", "v_prediction", sigma_data=1.0), 1.0, rtol=1e-5)


def test_cosmap_matches_diffusers():
    flow = make_schedule(ScheduleConfig(kind="flow"))
    expected = compute_loss_weighting_for_sd3("cosmap", torch.from_numpy(flow.sigma))
    np.testing.assert_allclose(weights("cosmap", "flow", flow), expected, rtol=1e-5)


def test_unknown_weighting_is_an_error():
    with pytest.raises(ValueError, match="weighting is 'snr'; expected one of uniform"):
        loss_weight("snr", "epsilon", jnp.ones(1), jnp.ones(1))
