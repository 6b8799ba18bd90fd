"""Classifier-free guidance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from sdjax.diffusion.guidance import guided, skipped_timesteps, with_skipped_layers

_random = np.random.default_rng(0)
XT = jnp.asarray(_random.normal(size=(2, 4, 4, 4)), jnp.float32)
T = jnp.array([900.0, 100.0])
CONTEXT = jnp.asarray(_random.normal(size=(2, 3, 4)), jnp.float32)
NULL = jnp.asarray(_random.normal(size=(1, 3, 4)), jnp.float32)


def network(xt, t, context):
    return jnp.tanh(xt + context.sum(1)[:, None, None, :]) * (1 + t[:, None, None, None] / 1000)


def both():
    return network(XT, T, CONTEXT), network(XT, T, jnp.broadcast_to(NULL, CONTEXT.shape))


def test_output_moves_from_null_towards_the_condition():
    cond, null = both()
    out = guided(network, CONTEXT, NULL, scale=7.5)(XT, T)
    np.testing.assert_allclose(out, null + 7.5 * (cond - null), rtol=1e-5, atol=1e-5)


def test_condition_and_null_share_one_call_and_scale_one_needs_no_null():
    sizes = []

    def counting(xt, t, context):
        sizes.append((xt.shape[0], t.shape[0], context.shape[0]))
        return network(xt, t, context)

    guided(counting, CONTEXT, NULL, scale=3.0)(XT, T)
    out = guided(counting, CONTEXT, NULL, scale=1.0)(XT, T)
    assert sizes == [(4, 4, 4), (2, 2, 2)]
    np.testing.assert_array_equal(out, network(XT, T, CONTEXT))


def test_scale_may_be_traced():
    fn = jax.jit(lambda scale: guided(network, CONTEXT, NULL, scale=scale)(XT, T))
    for scale in (1.0, 4.0):
        expected = guided(network, CONTEXT, NULL, scale=scale)(XT, T)
        np.testing.assert_allclose(fn(scale), expected, atol=1e-5)


def test_half_precision_outputs_are_combined_in_float32():
    """In bfloat16 the difference, times the scale, would lose its digits."""

    def half(xt, t, context):
        return network(xt, t, context).astype(jnp.bfloat16)

    out = guided(half, CONTEXT, NULL, scale=7.5)(XT, T)
    cond, null = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in both())
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, null + 7.5 * (cond - null), atol=1e-5)


def test_rescale_matches_diffusers():
    cond, null = both()
    combined = null + 7.5 * (cond - null)
    expected = rescale_noise_cfg(
        torch.from_numpy(np.array(combined)), torch.from_numpy(np.array(cond)), guidance_rescale=0.7
    )
    out = guided(network, CONTEXT, NULL, scale=7.5, rescale=0.7)(XT, T)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_outside_the_interval_the_condition_alone_counts():
    cond, _ = both()
    everywhere = guided(network, CONTEXT, NULL, scale=7.5)(XT, T)
    out = guided(network, CONTEXT, NULL, scale=7.5, interval=(0.05, 0.5))(XT, T)
    np.testing.assert_allclose(out[0], cond[0], atol=1e-6)  # t = 900
    np.testing.assert_array_equal(out[1], everywhere[1])  # t = 100


def test_context_may_be_a_tree():
    def tree_network(xt, t, context):
        return network(xt, t, context["text"]) + context["extra"]

    extra = jnp.ones((2, 4, 4, 4))
    out = guided(
        tree_network,
        {"text": CONTEXT, "extra": extra},
        {"text": NULL, "extra": extra[:1]},
        scale=2.0,
    )(XT, T)
    np.testing.assert_allclose(out, guided(network, CONTEXT, NULL, scale=2.0)(XT, T) + 1, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"interval": (0.5, 0.2)}, "interval is"),
        ({"interval": (0.0, 1.5)}, "interval is"),
        ({"rescale": 1.5}, "rescale is 1.5; expected 0 to 1"),
    ],
)
def test_bad_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        guided(network, CONTEXT, NULL, scale=2.0, **settings)


@pytest.mark.parametrize("count, first, last", [(28, 1, 5), (40, 1, 7), (50, 1, 9)])
def test_skipped_layers_lead_between_the_steps_of_diffusers(count, first, last):
    """Strictly between 0.01 n and 0.20 n (pipeline_stable_diffusion_3.py)."""
    timesteps = np.linspace(1000, 10, count)
    low, high = skipped_timesteps(timesteps, 0.01, 0.2)
    assert (low, high) == (timesteps[last], timesteps[first])
    assert skipped_timesteps(timesteps, 0.5, 0.5) is None


def test_skipped_layers_lead_away_within_their_range_alone():
    xt = jnp.asarray([[1.0, 2.0], [3.0, -4.0]])
    fn = with_skipped_layers(
        lambda x, t: 10 * x, lambda x, t: 5 * x, lambda x, t: 2 * x + t[:, None],
        scale=2.5, timesteps=(100.0, 900.0),
    )  # fmt: skip
    for t, expected in (
        (900.0, 10 * xt + 2.5 * (3 * xt - 900.0)),
        (901.0, 10 * xt),
        (99.0, 10 * xt),
    ):
        np.testing.assert_allclose(jax.jit(fn)(xt, jnp.full(2, t)), expected, rtol=1e-6)
