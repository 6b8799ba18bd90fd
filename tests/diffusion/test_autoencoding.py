"""The losses of autoencoders: published formulas, torch's autograd, and the numbers they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion import autoencoding as terms


def test_kl_of_known_gaussians():
    moments = jnp.zeros((1, 4, 4, 8))
    assert terms.kl_divergence(moments)[0] == 0
    sharp = jnp.concatenate([jnp.ones((1, 32, 32, 4)), jnp.full((1, 32, 32, 4), -10.0)], -1)
    np.testing.assert_allclose(terms.kl_divergence(sharp), 20480.09, rtol=1e-6)


def test_kl_and_critics_equal_torch():
    rng = np.random.default_rng(0)
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    mean, logvar = rng.normal(size=(2, 3, 4, 5, 2))
    normal, one = torch.distributions.Normal, torch.tensor(1.0)
    theirs = torch.distributions.kl_divergence(
        normal(torch.tensor(mean), torch.tensor(logvar / 2).exp()), normal(0 * one, one)
    )
    ours = terms.kl_divergence(jnp.asarray(np.concatenate([mean, logvar], -1), jnp.float32))
    np.testing.assert_allclose(ours, theirs.sum((1, 2, 3)).numpy(), rtol=1e-5)
    real, made = (torch.tensor(rng.normal(size=(3, 4, 4)) * 2) for _ in range(2))
    hinge = 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + made).mean())
    vanilla = 0.5 * (functional.softplus(-real).mean() + functional.softplus(made).mean())
    for kind, want in (("hinge", hinge), ("vanilla", vanilla)):
        each = terms.critic_loss(kind, jnp.asarray(real.numpy()), jnp.asarray(made.numpy()))
        assert each.shape == (3,)
        np.testing.assert_allclose(each.mean(), want, rtol=1e-6)
    np.testing.assert_allclose(
        terms.generator_loss(jnp.asarray(made.numpy())).mean(), -made.mean(), rtol=1e-6
    )


def test_losses_of_a_critic_that_cannot_tell():
    for constant in (-1.0, 0.0, 0.7, 1.0):
        logits = jnp.full((2, 3, 3), constant)
        np.testing.assert_allclose(terms.critic_loss("hinge", logits, logits), 1.0, rtol=1e-6)
    zeros = jnp.zeros((2, 3, 3))
    np.testing.assert_allclose(terms.critic_loss("vanilla", zeros, zeros), 0.693147, rtol=1e-6)


def test_likelihood_is_that_of_a_laplace_density_whose_scale_is_learned():
    error = jnp.asarray([0.5, 2.0])
    np.testing.assert_array_equal(terms.negative_likelihood(error, 0.0), error)
    # d/dv (e exp(-v) + v) = 0 at v = log e.
    slope = jax.grad(lambda v: terms.negative_likelihood(error, v)[0])(jnp.log(0.5))
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    np.testing.assert_allclose(terms.negative_likelihood(error, 1.0), error / np.e + 1, rtol=1e-6)


def test_adaptive_weight_is_a_quotient_of_lengths_and_is_clipped():
    long, short = jnp.full((3, 3, 2, 2), 2.0), jnp.full((3, 3, 2, 2), 0.5)
    np.testing.assert_allclose(terms.adaptive_weight(long, short), 12 / (3 + 1e-4), rtol=1e-6)
    assert terms.adaptive_weight(long, 0 * short) == 1e4
    assert terms.adaptive_weight(0 * long, short) == 0
    assert jax.grad(lambda x: terms.adaptive_weight(x, short))(long).max() == 0


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 0.0, 0.5)])
def test_a_known_gradient_is_the_one_that_differentiation_finds(weights):
    weights, x = jnp.asarray(weights), jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])

    def values(x):
        mixed = x - x.mean(0)  # every example sees the others, as in batch norm
        return jnp.sum(mixed**3, axis=1)

    def mean(x):
        return jnp.mean(weights * values(x))

    gradient = jax.grad(mean)(x)

    def known(scale):
        return jnp.mean(weights * terms.with_gradient(values(x), weights, x * scale, gradient))

    value, slope = jax.value_and_grad(known)(1.0)
    np.testing.assert_allclose(value, mean(x), rtol=1e-6)
    np.testing.assert_allclose(slope, jnp.vdot(gradient, x), rtol=1e-6)


def test_examples_without_any_weight_have_no_gradient():
    nothing = jnp.zeros(2)
    known = lambda x: jnp.mean(nothing * terms.with_gradient(x, nothing, x, 0 * x))  # noqa: E731
    np.testing.assert_array_equal(jax.grad(known)(jnp.ones(2)), nothing)
