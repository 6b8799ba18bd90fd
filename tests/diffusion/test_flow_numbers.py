"""Levels, shifts, densities and weights of SD3, FLUX.1 and v-pred SDXL, as numbers.

They were computed with diffusers 0.42 and by their formulas, and hold whatever version is there.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion.flow_levels import FlowConfig
from sdjax.diffusion.grids import SamplerConfig, make_grid
from sdjax.diffusion.prediction import add_noise
from sdjax.diffusion.samplers import sample
from sdjax.diffusion.schedules import (
    ScheduleConfig,
    make_schedule,
    schedule_at,
    shift_noise_level,
    token_shift,
)
from sdjax.diffusion.timesteps import noise_level
from sdjax.diffusion.weighting import loss_weight
from tests.diffusion.test_flow_levels import grid

U = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
# Midpoints, of which 200,000 give a mean to 1e-7.
EVEN = (np.arange(200_000) + 0.5) / 200_000
TABLE = (1000 - np.arange(1000)) / 1000


def level(kind, u, mean=0.0, std=1.0, scale=1.29):
    found = noise_level(kind, jnp.asarray(u), logit_mean=mean, logit_std=std, mode_scale=scale)
    return np.asarray(found, np.float64)


@pytest.mark.parametrize(
    "shift, expected",
    [
        (3.0, [0.25, 0.5, 0.75, 0.9, 0.964286]),
        (1.5, [0.142857, 0.333333, 0.6, 0.818182, 0.931034]),
        (np.exp(1.15), [0.259758, 0.512844, 0.759511, 0.904531, 0.966014]),
    ],
)
def test_shift_of_levels(shift, expected):
    np.testing.assert_allclose(shift_noise_level(U, shift), expected, atol=5e-7)


def test_training_table_of_sd3():
    sigma = shift_noise_level(TABLE, 3.0)
    np.testing.assert_allclose(sigma[:5], [1, 0.999666, 0.999332, 0.998998, 0.998663], atol=5e-7)
    np.testing.assert_allclose(sigma[-3:], [0.00894632, 0.0059761, 0.00299401], atol=5e-9)
    np.testing.assert_allclose(sigma.mean(), 0.67654056, atol=5e-8)
    assert sigma[500] == 0.75


SUMS = [
    # steps, options, sum, {place: level}
    (4, {"shift": 3.0}, None, {0: 1, 1: 0.857692, 2: 0.602151, 3: 0.008929, 4: 0}),  # turbo
    (40, {"shift": 3.0}, 26.9431034, {1: 0.991331, -2: 0.008929}),
    (50, {"shift": 3.0}, 33.7248215, {1: 0.993124}),
    (28, {}, None, {0: 1, 1: 0.963, 2: 0.926, 27: 0.001, 28: 0}),
    (28, {"shift": 3.0, "trailing": True}, None,  # shifted once
     {1: 0.987805, 2: 0.975, 3: 0.961538, 25: 0.264706, 26: 0.1875, 27: 0.1}),
    (28, {"tokens": 1024}, 17.3976456, {1: 0.980656, 2: 0.960644, 14: 0.652489, 27: 0.06502}),
    (50, {"tokens": 4096}, 34.6752425, {1: 0.99358, 49: 0.06055}),
    (4, {"tokens": 4096}, None, {1: 0.904531, 2: 0.759511, 3: 0.512844, 4: 0}),
    (10, {"shift": 3.0, "terminal": 0.1}, None,
     dict(enumerate([1, 0.963793, 0.921311, 0.870769, 0.809632, 0.734177, 0.63871, 0.51405,
                     0.34439, 0.1, 0]))),
    (10, {"shift": 3.0, "spread": "karras"}, None,
     dict(enumerate([1, 0.67558, 0.445905, 0.286694, 0.178925, 0.107927, 0.062589, 0.034664,
                     0.018179, 0.008929, 0]))),
    (10, {"shift": 3.0, "spread": "exponential"}, None,
     dict(enumerate([1, 0.591983, 0.350444, 0.207457, 0.122811, 0.072702, 0.043038, 0.025478,
                     0.015082, 0.008929, 0]))),
]  # fmt: skip


@pytest.mark.parametrize("steps, options, total, places", SUMS)
def test_levels_of_samplers(steps, options, total, places):
    if "tokens" in options:
        options = {**options, "trailing": True, "dynamic": "exponential"}
    sigma = grid(steps, **options).sigma
    for place, value in places.items():
        np.testing.assert_allclose(sigma[place], value, atol=1e-6, err_msg=str(place))
    if total is not None:
        np.testing.assert_allclose(sigma.sum(), total, atol=2e-7)


@pytest.mark.parametrize(
    "side, mu, wider",
    [(256, 0.5, 0.5), (512, 0.63, 0.632), (768, 0.846667, 0.852), (1024, 1.15, 1.16),
     (1536, 2.016667, 2.04), (2048, 3.23, 3.272)],
)  # fmt: skip
def test_mu_of_pictures(side, mu, wider):
    tokens = (side // 16) ** 2
    np.testing.assert_allclose(token_shift(tokens), mu, atol=5e-7)
    np.testing.assert_allclose(token_shift(tokens, max_shift=1.16), wider, atol=5e-7)


def test_dynamic_shifts_of_pictures():
    """exp(mu), also for a picture that is no square and for two beyond the range."""
    np.testing.assert_allclose(token_shift(3952), 1.125625, atol=5e-7)  # 832 x 1216 px
    flow = FlowConfig(dynamic="exponential")
    for side, shift in ((256, 1.648721), (512, 1.877611), (768, 2.331861), (1024, 3.158193),
                        (1536, 7.513239), (2048, 25.279657)):  # fmt: skip
        tokens = flow.tokens(side // 8, side // 8)
        np.testing.assert_allclose(flow.shift(tokens), shift, rtol=5e-7)


@pytest.mark.parametrize("dynamic, end", [("", 0.6024811), ("exponential", 0.6024143)])
def test_euler_on_a_known_flow(dynamic, end):
    """v = x / 2 from x = 1, whose exact end is exp(-1/2): SD3's levels, and FLUX.1's at 1024 px."""
    flow, spacing = FlowConfig(dynamic=dynamic), "trailing" if dynamic else "leading"
    sampler = SamplerConfig(name="flow_euler", steps=28, spacing=spacing, flow=flow)
    schedule = make_schedule(ScheduleConfig(kind="flow", shift=1.0 if dynamic else 3.0))
    x, _ = sample(
        lambda x, t: 0.5 * x, jnp.ones((1, 128, 128, 1)), schedule=schedule, prediction_type="flow",
        sampler=sampler,
    )  # fmt: skip
    np.testing.assert_allclose(x, end, atol=1e-6)


def test_noise_of_a_shifted_timestep():
    """diffusers scale_noise at timesteps[500] of the table, shift 3."""
    schedule = make_schedule(ScheduleConfig(kind="flow", shift=3.0))
    levels = schedule_at(schedule, jnp.full(1, 750.0))
    xt = add_noise(jnp.full((1, 1), -1.0), jnp.full((1, 1), 2.0), *levels)
    np.testing.assert_allclose(xt, 1.25)


def cosmap(sigma):
    sigma = jnp.asarray(sigma)
    return np.asarray(loss_weight("cosmap", "flow", 1 - sigma, sigma), np.float64)


def test_cosmap_weights():
    expected = [0.6366198, 0.7763655, 1.0185916, 1.2732395]
    np.testing.assert_allclose(cosmap([0, 0.1, 0.25, 0.5]), expected, rtol=1e-6)
    np.testing.assert_allclose(cosmap(EVEN).mean(), 1.0, atol=1e-6)
    np.testing.assert_allclose(cosmap(shift_noise_level(TABLE, 3.0)).mean(), 0.9503587, atol=1e-6)
    np.testing.assert_allclose(cosmap(TABLE).mean(), 0.9999998, atol=1e-6)
    np.testing.assert_allclose(cosmap(level("logit_normal", EVEN)).mean(), 1.1085232, atol=2e-5)


@pytest.mark.parametrize(
    "mean, std, own, shifted, variance",
    [(0.0, 1.0, 0.5, 0.7140208, 0.0433791), (0.5, 1.0, 0.6020271, 0.7928348, None),
     (-0.5, 1.0, 0.3979729, 0.6214957, None), (0.0, 1.5, 0.5, 0.6862687, 0.0732723)],
)  # fmt: skip
def test_logit_normal_levels(mean, std, own, shifted, variance):
    levels = level("logit_normal", EVEN, mean, std)
    np.testing.assert_allclose(levels.mean(), own, atol=2e-5)
    np.testing.assert_allclose(shift_noise_level(levels, 3.0).mean(), shifted, atol=2e-5)
    if variance is not None:
        np.testing.assert_allclose(levels.var(), variance, atol=2e-5)
    if (mean, std) == (0.0, 1.0):
        quantiles = level("logit_normal", [0.1, 0.5, 0.9])
        np.testing.assert_allclose(quantiles, [0.217286, 0.5, 0.782714], atol=1e-6)
        # The density is one over the slope of the quantiles.
        coarse, even = levels[::200], EVEN[::200]  # the levels are float32: no slope of neighbours
        found = np.interp(U, coarse, 1 / np.gradient(coarse, even))
        density = [0.3965747, 1.1636521, 1.5957691, 1.1636521, 0.3965747]
        np.testing.assert_allclose(found, density, rtol=1e-3)


@pytest.mark.parametrize(
    "scale, expected, variance",
    [
        (1.29, [0.802568, 0.616416, 0.5, 0.383584, 0.197431], 0.0463950),
        (0.81, [0.838822, 0.666122, 0.5, 0.333878, 0.161178], 0.0579269),
        (-1.0, [0.975528, 0.853553, 0.5, 0.146447, 0.024472], 0.125),
        (0.0, 1 - U, 1 / 12),
    ],
)
def test_levels_of_mode(scale, expected, variance):
    np.testing.assert_allclose(level("mode", U, scale=scale), expected, atol=1e-6)
    np.testing.assert_allclose(1 - level("mode", U, scale=scale), level("mode", 1 - U, scale=scale),
                               atol=1e-6)  # fmt: skip
    levels = level("mode", EVEN, scale=scale)
    np.testing.assert_allclose([levels.mean(), levels.var()], [0.5, variance], atol=1e-6)


def test_zero_terminal_snr_of_sdxl():
    plain, zero = (make_schedule(ScheduleConfig(zero_terminal_snr=z)) for z in (False, True))
    places = [0, 250, 500, 750, 900, 998, 999]
    before = [0.9991500, 0.6737923, 0.2763325, 0.0561698, 0.0141511, 0.0047167, 0.0046601]
    after = [0.9991500, 0.6524567, 0.2410185, 0.0327991, 0.0029604, 1.96796e-7, 0]
    # Those are float32's of torch.
    np.testing.assert_allclose(plain.alphas_cumprod[places], before, rtol=1e-5)
    np.testing.assert_allclose(zero.alphas_cumprod[places], after, rtol=5e-5)
    sampler = SamplerConfig(name="euler", steps=28, spacing="trailing")
    points = make_grid(zero, sampler)
    assert points.timesteps[:3].tolist() == [999, 963, 928] and points.timesteps[-1] == 35
    sigma = points.sigma[:-1] / points.alpha[:-1]
    np.testing.assert_allclose(sigma[:5], [4096, 57.8674, 27.1697, 16.6961, 11.5983], rtol=5e-5)
    np.testing.assert_allclose(sigma[-3:], [0.37149, 0.28517, 0.19172], rtol=5e-5)
    weight = loss_weight(
        "min_snr", "v_prediction", jnp.asarray(zero.alpha), jnp.asarray(zero.sigma)
    )
    np.testing.assert_allclose(np.mean(np.asarray(weight, np.float64)), 0.2776075, atol=1e-6)
