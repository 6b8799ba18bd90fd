"""Loss-aware timesteps, against guided-diffusion's resampler as its source has it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion import resampling
from sdjax.diffusion.losses import (
    BIN_LOSSES,
    BINS,
    ObjectiveConfig,
    denoising_loss,
    example_keys,
)
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule

TABLE = make_schedule(ScheduleConfig(num_train_timesteps=20))
FLOW = make_schedule(ScheduleConfig(kind="flow"))
AWARE = ObjectiveConfig(resampling="loss_second_moment", caption_dropout=0.0)


class LossSecondMomentResampler:
    """guided_diffusion/resample.py (MIT), without its gathering over hosts."""

    def __init__(self, count, history_per_term=10, uniform_prob=0.001):
        self.history_per_term, self.uniform_prob = history_per_term, uniform_prob
        self._loss_history = np.zeros([count, history_per_term], np.float64)
        self._loss_counts = np.zeros([count], int)

    def weights(self):
        if not (self._loss_counts == self.history_per_term).all():
            return np.ones([len(self._loss_counts)], np.float64)
        weights = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        weights /= np.sum(weights)
        weights *= 1 - self.uniform_prob
        weights += self.uniform_prob / len(weights)
        return weights

    def update_with_all_losses(self, ts, losses):
        for t, loss in zip(ts, losses, strict=True):
            if self._loss_counts[t] == self.history_per_term:
                self._loss_history[t, :-1] = self._loss_history[t, 1:]
                self._loss_history[t, -1] = loss
            else:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1


def test_memory_and_probabilities_are_those_of_guided_diffusion():
    rng, count = np.random.default_rng(0), 7
    theirs, ours = LossSecondMomentResampler(count), resampling.empty(count)
    full = []
    for _ in range(12):
        ts = rng.choice(count, 32, p=[0.4, 0.3, 0.1, 0.05, 0.05, 0.05, 0.05])
        losses = rng.lognormal(ts / 2).astype(np.float32)  # often more than ten of a bin at once
        theirs.update_with_all_losses(ts, losses)
        ours = jax.jit(resampling.remembered)(ours, jnp.asarray(ts, jnp.int32), losses)
        np.testing.assert_array_equal(np.minimum(ours["counts"], 10), theirs._loss_counts)
        np.testing.assert_array_equal(
            np.sort(ours["losses"], axis=1), np.sort(theirs._loss_history, axis=1)
        )
        weights = theirs.weights()
        np.testing.assert_allclose(
            resampling.probabilities(ours), weights / weights.sum(), rtol=1e-6
        )
        full.append(bool(resampling.is_full(ours)))
    assert full[0] is False and full[-1] is True


def memory_of(losses):
    """A full memory whose bins have had these losses, ten times each."""
    losses = np.asarray(losses, np.float32)
    return {
        "losses": jnp.tile(losses[:, None], (1, resampling.HISTORY)),
        "counts": jnp.full(len(losses), resampling.HISTORY, jnp.int32),
    }


def test_bins_are_drawn_by_their_losses_and_weights_undo_it():
    losses = np.array([1.0, 2.0, 5.0, 0.0, 12.0])
    memory = memory_of(losses)
    u = (jnp.arange(20_000) + 0.5) / 20_000
    moved, bins, weight = resampling.draw(memory, u)
    p = 0.999 * losses / losses.sum() + 0.001 / 5
    np.testing.assert_allclose(np.bincount(bins, minlength=5) / len(u), p, atol=1e-4)
    np.testing.assert_allclose(weight, (1 / (5 * p))[np.asarray(bins)], rtol=1e-5)
    places = np.minimum(np.floor(np.asarray(moved) * 5 + 1e-5), 4)
    np.testing.assert_array_equal(places, bins)
    # The weighted mean of any function is that of even numbers; here of x^2: 1/3.
    assert float(jnp.mean(weight * moved**2)) == pytest.approx(1 / 3, abs=1e-3)


@pytest.mark.parametrize("schedule", [TABLE, FLOW], ids=["table", "flow"])
def test_timesteps_are_as_without_until_the_memory_is_full(schedule):
    keys, positions = example_keys(jax.random.key(0), jnp.arange(64)), jnp.arange(64)
    x0 = jax.random.normal(jax.random.key(1), (64, 2, 2, 3))
    objective = dataclasses.replace(AWARE, prediction_type="v_prediction")
    memory = resampling.empty(resampling.count_bins(objective, schedule.config))
    arguments = {
        "keys": keys, "positions": positions, "batch_size": 64, "schedule": schedule,
        "objective": objective,
    }  # fmt: skip
    denoise = lambda xt, t: 0.5 * xt  # noqa: E731
    plain, aux = denoising_loss(denoise, x0, **arguments)
    aware, more = denoising_loss(denoise, x0, **arguments, memory=memory)
    np.testing.assert_array_equal(aux["timesteps"], more["timesteps"])
    np.testing.assert_array_equal(plain, aware)
    np.testing.assert_array_equal(more[BIN_LOSSES], plain)
    if schedule is TABLE:
        np.testing.assert_array_equal(more[BINS], aux["timesteps"])
    else:
        assert len(memory["counts"]) == 100


@pytest.mark.parametrize(
    "schedule, changes",
    [
        (TABLE, {}),
        (TABLE, {"timestep_sampling": "logit_normal", "weighting": "min_snr"}),
        (TABLE, {"resampling_bins": 4, "timestep_min": 3, "stratified": True}),
        (FLOW, {"prediction_type": "flow", "timestep_sampling": "logit_normal"}),
    ],
)
def test_the_expected_gradient_is_the_plain_one(schedule, changes):
    """For a loss (w - t)^2 per example, with a memory that is far from even."""
    objective = dataclasses.replace(AWARE, **{"prediction_type": "v_prediction", **changes})
    count = resampling.count_bins(objective, schedule.config)
    memory = memory_of(np.linspace(0.5, 2.0, count))
    total = 20_000
    key, positions = jax.random.key(3), jnp.arange(total)
    # Strata of u over the whole draw: what is left of the noise is far below the bias looked for.
    objective = dataclasses.replace(objective, stratified=True)

    @jax.jit
    def gradient(memory):
        # `denoise` sees the timesteps; with x0 = 0 and unit weights the error is its output's.
        keys = example_keys(key, positions)
        x0 = jnp.zeros((total, 1, 1, 1))

        def loss(w):
            out, aux = denoising_loss(
                lambda xt, t: (w - t / 20)[:, None, None, None] + 0 * xt, x0, keys=keys,
                positions=positions, batch_size=total, schedule=schedule, objective=objective,
                batch_key=key, memory=memory,
            )  # fmt: skip
            return jnp.mean(out)

        return jax.grad(loss)(2.0)

    np.testing.assert_allclose(gradient(memory), gradient(None), rtol=0.03)


def test_a_loss_that_never_was_leaves_the_draw_even():
    memory = memory_of(np.zeros(4))
    np.testing.assert_allclose(resampling.probabilities(memory), 0.25)


def test_fields_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"objective.resampling is 'loss'; expected one of none"):
        ObjectiveConfig(resampling="loss")
    with pytest.raises(ValueError, match="objective.resampling_bins is -1; expected 0 or more"):
        ObjectiveConfig(resampling_bins=-1)
