"""The denoising loss: its value, its draws, and that the batch may be split in any way."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion import losses
from sdjax.diffusion.losses import (
    ObjectiveConfig,
    check,
    denoising_loss,
    drop_captions,
    example_keys,
    huber_width,
    pointwise_loss,
)
from sdjax.diffusion.prediction import PREDICTIONS, add_noise, target
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule, schedule_at

SD = make_schedule(ScheduleConfig())
FLOW = make_schedule(ScheduleConfig(kind="flow"))
BATCH = 8
X0 = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 4, 4, 4)), jnp.float32)
STEP_KEY = jax.random.key(7)
EVERYTHING = ObjectiveConfig(
    timestep_sampling="logit_normal",
    stratified=True,
    weighting="min_snr",
    loss="huber",
    offset_noise=0.1,
    input_perturbation=0.1,
)


def network(xt, t):
    return jnp.tanh(xt) * (0.5 + (t / 1000)[:, None, None, None])


def run(objective, part=slice(None), schedule=SD, denoise_fn=network):
    """The loss of the examples `part` of the batch. (Each jit would compile for a second.)"""
    positions = jnp.arange(BATCH)[part]
    return denoising_loss(
        denoise_fn,
        X0[part],
        keys=example_keys(STEP_KEY, positions),
        positions=positions,
        batch_size=BATCH,
        schedule=schedule,
        objective=objective,
        batch_key=STEP_KEY,
    )


def record(objective, schedule=SD):
    """(xt, timesteps) as the network gets them."""
    seen = []

    def denoise_fn(xt, t):
        seen.extend((xt, t))
        return xt

    run(objective, schedule=schedule, denoise_fn=denoise_fn)
    return seen


def noise_of(xt, t, schedule=SD):
    alpha, sigma = (s[:, None, None, None] for s in schedule_at(schedule, t))
    return (xt - alpha * X0) / sigma


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", [SD, FLOW], ids=["vp", "flow"])
def test_loss_without_weighting_is_the_mean_squared_error(prediction, schedule):
    objective = ObjectiveConfig(prediction_type=prediction)
    loss, aux = run(objective, schedule=schedule)
    xt, t = record(objective, schedule)
    alpha, sigma = schedule_at(schedule, t)
    eps = losses.normal_like(
        losses.fold_keys(example_keys(STEP_KEY, jnp.arange(BATCH)), losses.NOISE), X0
    )
    np.testing.assert_allclose(xt, add_noise(X0, eps, alpha, sigma), atol=1e-6)
    wanted = target(prediction, X0, eps, alpha, sigma)
    expected = ((network(xt, t) - wanted) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(loss, aux["loss"])
    np.testing.assert_array_equal(t, aux["timesteps"])


def test_loss_is_float32_for_a_bfloat16_network():
    loss, _ = run(ObjectiveConfig(), denoise_fn=lambda xt, t: xt.astype(jnp.bfloat16))
    assert loss.dtype == jnp.float32


def test_perfect_network_has_no_loss():
    objective = ObjectiveConfig(prediction_type="v_prediction", offset_noise=0.2)

    def oracle(xt, t):
        alpha, sigma = schedule_at(SD, t)
        return target("v_prediction", X0, noise_of(xt, t), alpha, sigma)

    loss, _ = run(objective, denoise_fn=oracle)
    np.testing.assert_allclose(loss, 0, atol=1e-6)


@pytest.mark.parametrize("stratified", [False, True])
def test_micro_batches_draw_exactly_what_the_whole_batch_draws(stratified):
    objective = dataclasses.replace(EVERYTHING, stratified=stratified)
    whole, aux = run(objective)
    parts = [run(objective, part) for part in (slice(0, 4), slice(4, 8))]
    np.testing.assert_array_equal(whole, np.concatenate([loss for loss, _ in parts]))
    np.testing.assert_array_equal(
        aux["timesteps"], np.concatenate([aux["timesteps"] for _, aux in parts])
    )


def test_order_of_the_examples_on_a_host_does_not_matter():
    order = jnp.array([3, 1, 7, 0])
    np.testing.assert_array_equal(run(EVERYTHING)[0][order], run(EVERYTHING, order)[0])


def test_jit_changes_nothing():
    np.testing.assert_allclose(jax.jit(lambda: run(EVERYTHING)[0])(), run(EVERYTHING)[0], rtol=1e-5)


def test_every_example_and_step_has_its_own_key():
    keys = [
        example_keys(jax.random.fold_in(jax.random.key(0), step), 8 * host + jnp.arange(8))
        for step in range(4)
        for host in range(4)
    ]
    data = np.concatenate([jax.random.key_data(k) for k in keys])
    assert len(np.unique(data, axis=0)) == 4 * 4 * 8


def test_draws_of_one_example_are_independent():
    keys = example_keys(STEP_KEY, jnp.arange(BATCH))
    draws = [
        np.ravel(losses.normal_like(losses.fold_keys(keys, stream), X0))
        for stream in (losses.NOISE, losses.PERTURBATION, losses.CALLER_STREAM)
    ]
    correlation = np.corrcoef(draws) - np.eye(3)
    assert np.abs(correlation).max() < 0.15


def test_offset_noise_is_part_of_the_target():
    plain, offset = ObjectiveConfig(), ObjectiveConfig(offset_noise=0.5)
    xt, t = record(plain)
    shifted, _ = record(offset)
    difference = noise_of(shifted, t) - noise_of(xt, t)
    # the same for every pixel of a channel, other for another channel or example
    np.testing.assert_allclose(difference - difference[:, :1, :1], 0, atol=2e-5)
    assert len(np.unique(np.round(difference[:, 0, 0], 4))) == BATCH * 4
    # a network that returns the noise of xt is right
    loss, _ = run(offset, denoise_fn=lambda xt, t: noise_of(xt, t))
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_input_perturbation_is_not_part_of_the_target():
    clean = noise_of(*record(ObjectiveConfig()))
    objective = ObjectiveConfig(input_perturbation=0.3)
    extra = noise_of(*record(objective)) - clean
    assert 0.2 < extra.std() < 0.4
    loss, _ = run(objective, denoise_fn=lambda xt, t: clean)
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_pseudo_huber_is_quadratic_near_zero_and_has_bounded_slope():
    d, c = jnp.linspace(-100, 100, 2001).reshape(1, -1), jnp.array([0.1])
    np.testing.assert_allclose(
        pointwise_loss(d, c), 2 * 0.1 * (np.sqrt(np.float64(d) ** 2 + 0.01) - 0.1), rtol=1e-4
    )
    small = jnp.array([[1e-4, 1e-3]])
    np.testing.assert_allclose(pointwise_loss(small, c), small**2, rtol=1e-3)
    slope = jax.vmap(jax.grad(lambda x: pointwise_loss(x[None], c)[0]))(d[0])
    assert np.abs(slope).max() <= 2 * 0.1 + 1e-6


def test_huber_width_falls_with_the_noise_as_in_kohya():
    t = jnp.array([0.0, 500.0, 999.0])
    alpha, sigma = schedule_at(SD, t)

    def width(schedule):
        objective = ObjectiveConfig(loss="huber", huber_c=0.1, huber_schedule=schedule)
        return np.asarray(huber_width(objective, t, alpha, sigma, 1000))

    np.testing.assert_allclose(width("constant"), 0.1)
    np.testing.assert_allclose(width("exponential"), 0.1 ** (np.array(t) / 1000), rtol=1e-6)
    ratio = np.sqrt((1 - SD.alphas_cumprod) / SD.alphas_cumprod)[[0, 500, 999]]
    np.testing.assert_allclose(width("snr"), 0.9 / (1 + ratio) ** 2 + 0.1, rtol=1e-5)


def test_huber_loss_is_finite_at_zero_snr():
    schedule = make_schedule(ScheduleConfig(zero_terminal_snr=True))
    objective = ObjectiveConfig(
        prediction_type="v_prediction", loss="huber", weighting="min_snr", timestep_min=999
    )
    loss, aux = run(objective, schedule=schedule)
    assert np.isfinite(loss).all() and (aux["timesteps"] == 999).all()


def test_captions_are_dropped_at_the_asked_rate():
    keys = example_keys(STEP_KEY, jnp.arange(4000))
    tokens, null = jnp.arange(8000).reshape(4000, 2) + 10, jnp.array([1, 2])
    dropped = np.all(drop_captions(keys, tokens, null, 0.1) == null, axis=1)
    assert abs(dropped.mean() - 0.1) < 0.02
    kept = np.asarray(drop_captions(keys, tokens, null, 0.1))[~dropped]
    np.testing.assert_array_equal(kept, np.asarray(tokens)[~dropped])
    np.testing.assert_array_equal(drop_captions(keys, tokens, null, 0.0), tokens)
    assert np.all(drop_captions(keys, tokens, null, 1.0) == null)


def test_gradient_reaches_the_network_and_not_the_draws():
    def mean_loss(scale):
        return run(EVERYTHING, denoise_fn=lambda xt, t: scale * network(xt, t))[0].mean()

    slope = jax.grad(mean_loss)(1.0)
    step = 1e-2
    expected = (mean_loss(1.0 + step) - mean_loss(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-2)


@pytest.mark.parametrize(
    "schedule, objective, message",
    [
        ({"zero_terminal_snr": True}, {}, "schedule.zero_terminal_snr is True.*use 'v_prediction'"),
        ({"kind": "flow"}, {}, "schedule.kind is 'flow'"),
        ({}, {"timestep_max": 1001}, "timestep_max is 1001; expected at most"),
        ({}, {"timestep_min": 1000}, "timestep_min is 1000; expected less than"),
    ],
)
def test_schedule_and_objective_that_do_not_go_together_are_refused(schedule, objective, message):
    with pytest.raises(ValueError, match=message):
        check(ScheduleConfig(**schedule), ObjectiveConfig(**objective))


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "flow"])
def test_zero_terminal_snr_accepts_what_can_be_learned(prediction):
    check(ScheduleConfig(zero_terminal_snr=True), ObjectiveConfig(prediction_type=prediction))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prediction_type": "x0"}, "objective.prediction_type is 'x0'; expected one of epsilon"),
        ({"timestep_sampling": "stratified"}, "timestep_sampling is 'stratified'"),
        ({"weighting": "snr"}, "objective.weighting is 'snr'"),
        ({"weighting": "cosmap"}, "prediction_type 'flow' only"),
        ({"loss": "l1"}, "objective.loss is 'l1'"),
        ({"huber_schedule": "linear"}, "huber_schedule is 'linear'"),
        ({"huber_c": 0.0}, "huber_c is 0.0; expected more than 0"),
        ({"min_snr_gamma": -5.0}, "min_snr_gamma is -5.0"),
        ({"offset_noise": -0.1}, "offset_noise is -0.1; expected 0 or more"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5; expected 0 to 1"),
        ({"mode_scale": 2.0}, "mode_scale is 2.0"),
        ({"timestep_min": 500, "timestep_max": 400}, "timestep_max is 400; expected more than"),
    ],
)
def test_bad_objective_config_names_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**fields)


def test_stratified_timesteps_need_the_batch_key():
    with pytest.raises(ValueError, match="pass the step's key"):
        losses.sample_timesteps(
            example_keys(STEP_KEY, jnp.arange(4)), jnp.arange(4), 4, SD, EVERYTHING
        )


def test_noise_of_an_example_is_what_its_key_draws_in_its_shape():
    keys = example_keys(STEP_KEY, jnp.arange(BATCH))
    drawn = losses.normal_like(keys, X0)
    for key, noise in zip(keys, drawn, strict=True):
        np.testing.assert_array_equal(noise, jax.random.normal(key, X0.shape[1:]))
