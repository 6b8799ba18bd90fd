"""Noise schedules against known constants, identities and diffusers."""

from __future__ import annotations

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion.flow_levels import FlowConfig
from sdjax.diffusion.schedules import (
    ScheduleConfig,
    make_schedule,
    schedule_at,
    shift_noise_level,
    token_shift,
)

SD = make_schedule(ScheduleConfig())
ZERO_SNR = make_schedule(ScheduleConfig(zero_terminal_snr=True))


def test_stable_diffusion_schedule_has_its_known_values():
    ab = SD.alphas_cumprod
    snr = ab / (1 - ab)
    np.testing.assert_allclose(ab[[0, 999]], [0.99915, 0.0046600985], rtol=1e-8)
    np.testing.assert_allclose(SD.alpha64[999], 0.0682649, rtol=1e-6)
    np.testing.assert_allclose(snr[[0, 999]], [1175.4706, 0.00468192], rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(1 / snr[[0, 999]]), [0.0291672, 14.6146412], rtol=2e-6)
    assert np.abs(snr - 5).argmin() == 146


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_schedule_matches_diffusers(kind, zero_terminal_snr):
    reference = diffusers.DDPMScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule=kind,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    schedule = make_schedule(
        ScheduleConfig(
            kind=kind, beta_start=0.0001, beta_end=0.02, zero_terminal_snr=zero_terminal_snr
        )
    )
    expected = reference.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=2e-5, atol=2e-6)


def test_tables_are_float64_on_the_host_and_float32_on_the_device():
    """A cumulative product in bfloat16 would end 35 % off."""
    assert SD.alpha64.dtype == SD.sigma64.dtype == np.float64
    assert SD.alpha.dtype == SD.sigma.dtype == np.float32
    alpha, sigma = schedule_at(SD, jnp.arange(1000, dtype=jnp.bfloat16))
    assert alpha.dtype == sigma.dtype == jnp.float32
    alpha, sigma = schedule_at(SD, jnp.arange(1000))
    np.testing.assert_allclose(alpha, SD.alpha64, rtol=6e-8)
    np.testing.assert_allclose(sigma, SD.sigma64, rtol=6e-8)
    assert len(np.unique(np.asarray(sigma))) == 1000


@pytest.mark.parametrize("schedule", [SD, ZERO_SNR])
def test_table_schedules_preserve_variance_and_lose_signal(schedule):
    np.testing.assert_allclose(schedule.alpha64**2 + schedule.sigma64**2, 1, rtol=1e-14)
    assert np.all(np.diff(schedule.alpha64) < 0)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_its_start():
    ab = ZERO_SNR.alphas_cumprod
    assert ab[999] == 0.0 and ZERO_SNR.sigma[999] == 1.0 and ZERO_SNR.alpha[999] == 0.0
    np.testing.assert_allclose(ab[0], 0.99915, rtol=1e-8)
    np.testing.assert_allclose(ab[998], 1.9679e-7, rtol=1e-4)
    assert 1 - ab[999] / ab[998] == 1.0  # the last beta


def test_snr_scale_shifts_the_snr_and_diffusers_reproduces_it_from_the_betas():
    schedule = make_schedule(ScheduleConfig(snr_scale=(64 / 32) ** 2))
    ab, base = schedule.alphas_cumprod, SD.alphas_cumprod
    np.testing.assert_allclose(ab / (1 - ab), 4 * base / (1 - base), rtol=1e-10)
    betas = 1 - ab / np.append(1.0, ab[:-1])
    reference = diffusers.DDPMScheduler(trained_betas=list(betas))
    np.testing.assert_allclose(reference.alphas_cumprod, ab, rtol=1e-4, atol=2e-6)


def test_flow_schedule_is_a_straight_line():
    flow = make_schedule(ScheduleConfig(kind="flow", num_train_timesteps=500))
    alpha, sigma = schedule_at(flow, jnp.array([0.0, 125.0, 333.3, 500.0]))
    np.testing.assert_allclose(sigma, [0, 0.25, 0.6666, 1], atol=1e-7)
    np.testing.assert_allclose(alpha + sigma, 1, atol=1e-7)
    np.testing.assert_allclose(schedule_at(flow, jnp.arange(500))[0], flow.alpha, atol=1e-7)


def test_timestep_outside_the_table_is_not_silently_clamped():
    alpha, sigma = schedule_at(SD, jnp.array([-1, 0, 999, 1000]))
    assert np.isnan(alpha[0]) and np.isnan(sigma[3])
    assert np.isfinite(np.asarray(alpha[1:3])).all()


@pytest.mark.parametrize(
    "height, width, mu",
    [(256, 256, 0.5), (512, 512, 0.63), (832, 1216, 1.125625), (1024, 1024, 1.15),
     (2048, 2048, 3.23)],
)  # fmt: skip
def test_shift_counts_tokens_not_latent_pixels(height, width, mu):
    """As diffusers' calculate_shift, for the latents of an f8 VAE."""
    flow = FlowConfig(dynamic="exponential")
    tokens = flow.tokens(height // 8, width // 8)
    assert tokens == height * width // 256
    np.testing.assert_allclose(token_shift(tokens), mu, rtol=1e-12)
    np.testing.assert_allclose(flow.shift(tokens), np.exp(mu), rtol=1e-12)


def test_shift_keeps_the_ends():
    np.testing.assert_allclose(shift_noise_level(np.array([0, 0.5, 1]), 3.0), [0, 0.75, 1])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "cosine"}, "schedule.kind is 'cosine'; expected one of linear"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start is 0.5"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1"),
        ({"shift": 3.0}, "only kind 'flow'"),
        ({"kind": "flow", "shift": 0.0}, "schedule.shift is 0.0"),
        ({"kind": "flow", "zero_terminal_snr": True}, "set zero_terminal_snr to False"),
        ({"kind": "flow", "snr_scale": 2.0}, "use schedule.shift"),
        ({"snr_scale": -1.0}, "snr_scale is -1.0"),
        ({"snr_scale": 2.0, "zero_terminal_snr": True}, "choose one"),
    ],
)
def test_bad_schedule_config_names_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**fields)
