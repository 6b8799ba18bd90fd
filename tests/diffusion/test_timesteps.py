"""The distributions of training timesteps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from sdjax.diffusion.losses import ObjectiveConfig, example_keys, sample_timesteps
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule, shift_noise_level

SD = make_schedule(ScheduleConfig())
FLOW = make_schedule(ScheduleConfig(kind="flow"))
COUNT = 20_000


def draw(objective, schedule=SD, count=COUNT, seed=0):
    key = jax.random.key(seed)
    positions = jnp.arange(count)
    t = sample_timesteps(example_keys(key, positions), positions, count, schedule, objective, key)
    return np.asarray(t)


def test_uniform_timesteps_are_integers_over_the_whole_table():
    t = draw(ObjectiveConfig())
    assert t.dtype == np.float32 and np.all(t == np.round(t))
    assert t.min() == 0 and t.max() == 999
    counts = np.bincount(t.astype(int), minlength=1000)
    assert len(counts) == 1000
    assert scipy.stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
@pytest.mark.parametrize("schedule", [SD, FLOW], ids=["table", "flow"])
def test_timestep_range_is_kept(kind, schedule):
    objective = ObjectiveConfig(timestep_sampling=kind, timestep_min=200, timestep_max=300)
    t = draw(objective, schedule)
    assert t.min() >= 200 and t.max() <= (299 if schedule is SD else 300)
    assert t.min() < 205 or kind == "logit_normal"


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("schedule", [SD, FLOW], ids=["table", "flow"])
def test_the_timesteps_of_an_expert_are_uniform_within_its_interval(schedule, stratified):
    objective = ObjectiveConfig(stratified=stratified, timestep_min=500, timestep_max=750)
    t = draw(objective, schedule, count=4000)
    assert t.min() >= 500 and t.max() < 750
    inside = (t + 0.5 * (schedule is SD) - 500) / 250
    assert scipy.stats.kstest(inside, "uniform").pvalue > 0.001
    if stratified:
        assert np.abs(np.sort(inside) - (np.arange(4000) + 0.5) / 4000).max() < 0.003


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stratified_timesteps_cover_the_table_evenly(seed):
    t = draw(ObjectiveConfig(stratified=True), count=500, seed=seed)
    np.testing.assert_array_equal(np.bincount(t.astype(int) // 2, minlength=500), 1)


def test_each_stratified_timestep_is_uniform_on_its_own():
    """One position of the batch over many steps."""
    objective = ObjectiveConfig(stratified=True)

    @jax.jit
    @jax.vmap
    def third(seed):
        key = jax.random.key(seed)
        positions = jnp.array([3])
        return sample_timesteps(example_keys(key, positions), positions, 8, SD, objective, key)[0]

    t = np.asarray(third(jnp.arange(COUNT)))
    assert scipy.stats.kstest((t + 0.5) / 1000, "uniform").pvalue > 0.001


def test_flow_timesteps_are_real_and_shifted():
    t = draw(ObjectiveConfig(prediction_type="flow"), FLOW)
    assert scipy.stats.kstest(t / 1000, "uniform").pvalue > 0.001
    assert len(np.unique(t)) > 0.9 * COUNT
    assert t.min() > 0  # SNR is infinite at 0
    shifted = draw(
        ObjectiveConfig(prediction_type="flow"),
        make_schedule(ScheduleConfig(kind="flow", shift=3.0)),
    )
    np.testing.assert_allclose(shifted / 1000, shift_noise_level(t / 1000, 3.0), atol=1e-5)


@pytest.mark.parametrize("stratified", [False, True])
def test_logit_normal_timesteps_are_logit_normal(stratified):
    objective = ObjectiveConfig(
        timestep_sampling="logit_normal", logit_mean=-0.4, logit_std=1.2, stratified=stratified
    )
    level = draw(objective, FLOW) / 1000
    logits = np.log(level / (1 - level))
    assert scipy.stats.kstest(logits, scipy.stats.norm(-0.4, 1.2).cdf).pvalue > 0.001


@pytest.mark.parametrize("kind", ["logit_normal", "mode"])
def test_densities_match_diffusers(kind):
    expected = compute_density_for_timestep_sampling(
        kind, COUNT, 0.5, 0.8, 1.29, generator=torch.Generator().manual_seed(0)
    )
    objective = ObjectiveConfig(timestep_sampling=kind, logit_mean=0.5, logit_std=0.8)
    level = draw(objective, FLOW) / 1000
    assert scipy.stats.ks_2samp(level, expected.numpy()).pvalue > 0.001


def test_cosmap_timesteps_have_the_density_of_the_cosmap_weighting():
    """SD3 paper, section 3.1: 2 / (pi - 2 pi t + 2 pi t**2)."""
    level = draw(ObjectiveConfig(timestep_sampling="cosmap"), FLOW) / 1000

    def cdf(x):
        return (2 / np.pi) * (np.arctan(2 * x - 1) + np.pi / 4)

    assert scipy.stats.kstest(level, cdf).pvalue > 0.001


def test_cubic_timesteps_are_those_of_t2i_adapters():
    """The formula of diffusers' train_t2i_adapter_sdxl.py, "Cubic sampling"."""
    u = torch.rand(COUNT, generator=torch.Generator().manual_seed(0))
    expected = ((1 - u**3) * 1000).long().clamp(0, 999)
    t = draw(ObjectiveConfig(timestep_sampling="cubic"))
    assert t.max() == 999 and np.all(t == np.round(t))
    assert scipy.stats.ks_2samp(t, expected.numpy()).pvalue > 0.001
    np.testing.assert_allclose(t.mean(), 749.5, atol=6)  # three quarters of the range
    np.testing.assert_allclose(np.mean(t > 500), 1 - 0.2063, atol=0.01)  # 1 - 0.5^(1/3)
