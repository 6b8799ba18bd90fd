"""Masks of the loss against PyTorch's area interpolation and formulas written out; frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.diffusion.losses import (
    NOISE,
    OFFSET,
    ObjectiveConfig,
    area_mean,
    denoising_loss,
    example_keys,
    fold_keys,
    loss_mask,
    normal_like,
)
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule, schedule_at

PLAIN = ObjectiveConfig()
SCHEDULE = make_schedule(ScheduleConfig())
BATCH = 4
RNG = np.random.default_rng(0)
X0 = jnp.asarray(RNG.normal(size=(BATCH, 6, 4, 4)), jnp.float32)
VIDEO = jnp.asarray(RNG.normal(size=(BATCH, 3, 6, 4, 4)), jnp.float32)
KEYS = example_keys(jax.random.key(5), jnp.arange(BATCH))
MASK = jnp.asarray(RNG.random((BATCH, 6, 4, 1)), jnp.float32)


def run(x0, mask=None, objective=PLAIN, denoise_fn=lambda xt, t: 0.5 * xt):
    return denoising_loss(
        denoise_fn, x0, keys=KEYS, positions=jnp.arange(BATCH), batch_size=BATCH,
        schedule=SCHEDULE, objective=objective, mask=mask,
    )  # fmt: skip


@pytest.mark.parametrize(
    "shape, factor", [((3, 16, 24, 1), 8), ((2, 12, 8, 1), 4), ((1, 5, 3, 1), 1)]
)
def test_area_mean_is_that_of_torch(shape, factor):
    mask = RNG.random(shape).astype(np.float32)
    size = shape[1] // factor, shape[2] // factor
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(mask).permute(0, 3, 1, 2), size=size, mode="area"
    )
    # Sums of at most 64 numbers in [0, 1], in another order.
    np.testing.assert_allclose(
        area_mean(jnp.asarray(mask), factor)[..., 0], theirs[:, 0], atol=1e-6
    )
    frames = area_mean(jnp.asarray(mask)[:, None], factor)
    np.testing.assert_array_equal(frames[:, 0], area_mean(jnp.asarray(mask), factor))


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
@pytest.mark.parametrize("x0", [X0, VIDEO], ids=["picture", "frames"])
def test_a_masked_loss_is_the_formula(x0, weighting):
    mask = MASK if x0 is X0 else jnp.broadcast_to(MASK[:, None], (BATCH, 3, 6, 4, 1))
    seen = {}

    def denoise_fn(xt, t):
        seen.update(xt=np.asarray(xt, np.float64), t=np.asarray(t))
        return 0.5 * xt

    loss, aux = run(x0, mask, ObjectiveConfig(weighting=weighting), denoise_fn)
    alpha, sigma = (
        np.asarray(s, np.float64) for s in schedule_at(SCHEDULE, jnp.asarray(seen["t"]))
    )
    m = np.asarray(mask, np.float64)
    for i in range(BATCH):
        eps = (seen["xt"][i] - alpha[i] * np.asarray(x0[i], np.float64)) / sigma[i]
        e = (0.5 * seen["xt"][i] - eps) ** 2
        snr = (alpha[i] / sigma[i]) ** 2
        w = 1.0 if weighting == "uniform" else min(snr, 5.0) / snr
        exact = (m[i] * e).sum() / e.size
        # float32; eps is found again from xt, which loses digits where sigma is small.
        np.testing.assert_allclose(aux["loss"][i], exact, rtol=1e-4)
        np.testing.assert_allclose(loss[i], w * exact, rtol=1e-4)
    assert not np.allclose(loss, run(x0, None, ObjectiveConfig(weighting=weighting))[0], rtol=0.05)


def test_ones_are_no_mask_and_a_share_of_ones_has_that_share_of_the_loss():
    np.testing.assert_array_equal(run(X0, jnp.ones_like(MASK))[0], run(X0)[0])
    # kohya's measured case: a square of 25 in a grid of 64 has 0.1526 of a loss of ones.
    square = jnp.zeros((BATCH, 64, 64, 1)).at[:, 10:35, 20:45].set(1.0)
    constant = jnp.zeros((BATCH, 64, 64, 4))
    objective = ObjectiveConfig(prediction_type="sample")
    loss, _ = run(constant, square, objective, lambda xt, t: jnp.ones_like(xt))
    np.testing.assert_allclose(loss, 625 / 4096, rtol=1e-6)


def test_a_mask_of_zeros_gives_no_gradient_and_a_weight_multiplies_the_masked_loss():
    weight = jnp.asarray([0.0, 0.5, 1.0, 2.0])

    def mean_loss(scale, mask):
        return jnp.mean(weight * run(X0, mask, denoise_fn=lambda xt, t: scale * xt)[0])

    gradient = jax.grad(mean_loss)
    assert gradient(0.3, jnp.zeros_like(MASK)) == 0.0
    assert gradient(0.3, MASK) != 0.0
    per_example = np.asarray(run(X0, MASK, denoise_fn=lambda xt, t: 0.3 * xt)[0], np.float64)
    exact = (np.asarray(weight) * per_example).mean()
    np.testing.assert_allclose(mean_loss(0.3, MASK), exact, rtol=1e-6)


def test_offset_noise_is_constant_over_each_channel_of_a_frame():
    seen = []
    objective = ObjectiveConfig(offset_noise=0.5)
    run(jnp.zeros_like(VIDEO), None, objective, lambda xt, t: seen.extend((xt, t)) or xt)
    xt, t = seen
    sigma = schedule_at(SCHEDULE, t)[1].reshape(-1, 1, 1, 1, 1)
    eps = normal_like(fold_keys(KEYS, NOISE), VIDEO)
    offset = (xt / sigma - eps) / 0.5
    expected = normal_like(fold_keys(KEYS, OFFSET), jnp.zeros((BATCH, 3, 4)))[:, :, None, None]
    np.testing.assert_allclose(offset, jnp.broadcast_to(expected, offset.shape), atol=1e-4)


def square(pixels=64, factor=8):
    """FT-41: a mask of 25 x 25 pixels of 64 x 64, on the grid of the latents."""
    mask = np.zeros((BATCH, pixels, pixels, 1), np.float32)
    mask[:, 20:45, 20:45] = 1.0
    return area_mean(jnp.asarray(mask), factor)


@pytest.mark.parametrize(
    ("fields", "mean"),
    [
        ({}, 0.1526),  # kohya's sd-scripts
        ({"unmasked_weight": 0.1}, 0.2276),  # OneTrainer
        ({"unmasked_weight": 0.1, "normalize_masked_area": True}, 1.0),
        ({"normalize_masked_area": True}, 1.0),
        ({"unmasked_probability": 1.0}, 1.0),
    ],
)
def test_a_loss_of_ones_has_the_share_that_the_mask_leaves(fields, mean):
    mask = loss_mask(KEYS, square(), ObjectiveConfig(**fields))
    np.testing.assert_allclose(mask.mean(axis=(1, 2, 3)), mean, atol=5e-5)


def test_a_mask_of_ones_equals_none_to_the_bit_whatever_is_made_of_it():
    x0 = jnp.asarray(RNG.normal(size=(BATCH, 8, 8, 4)), jnp.float32)
    fields = {"unmasked_weight": 0.3, "unmasked_probability": 0.5, "normalize_masked_area": True}
    for chosen in ({}, fields):
        loss, _ = run(x0, jnp.ones((BATCH, 8, 8, 1)), ObjectiveConfig(**chosen))
        np.testing.assert_array_equal(loss, run(x0)[0])


def test_some_examples_train_without_their_mask_and_a_mask_of_zeros_has_no_loss():
    keys = example_keys(jax.random.key(1), jnp.arange(2000))
    mask = jnp.zeros((2000, 1, 1, 1))
    free = loss_mask(keys, mask, ObjectiveConfig(unmasked_probability=0.1))
    assert abs(float(free.mean()) - 0.1) < 0.02
    whole = ObjectiveConfig(normalize_masked_area=True)
    assert not np.asarray(loss_mask(keys, mask, whole)).any()


@pytest.mark.parametrize("field", ["unmasked_weight", "unmasked_probability"])
def test_shares_of_masks_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=rf"objective.{field} is 1.5; expected 0 to 1"):
        ObjectiveConfig(**{field: 1.5})
