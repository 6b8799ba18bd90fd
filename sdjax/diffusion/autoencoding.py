"""The losses of autoencoders: KL, the Laplace likelihood, critics, and how they are weighed.

Latent diffusion, appendix G, and its code: ldm/modules/losses/contperceptual.py and, from
taming-transformers, modules/losses/vqperceptual.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = TypeVar("Tree", Array, Mapping[str, Array], tuple[Array, ...])

MOST_WEIGHT = 1e4  # of the adaptive weight (contperceptual.py, calculate_adaptive_weight)
_EPS = 1e-4


def kl_divergence(moments: Array) -> Array:
    """Return KL(N(mean, variance) || N(0, 1)), summed over each latent, [B].

    Args:
        moments: [B, h, w, 2C], mean then log-variance.
    """
    mean, logvar = jnp.split(moments, 2, axis=-1)
    each = jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar
    return 0.5 * jnp.sum(each, axis=(1, 2, 3))


def negative_likelihood(error: Array, logvar: Array | float) -> Array:
    """Return error / exp(logvar) + logvar, an error's -log p of a Laplace or Gaussian density.

    Constants are left out; logvar 0 gives the error itself.
    """
    return error * jnp.exp(-jnp.asarray(logvar)) + logvar


def critic_loss(kind: str, real: Array, made: Array) -> Array:
    """Return the loss of a critic for each pair of pictures, [B].

    Args:
        kind: "hinge" or "vanilla", the logistic loss.
        real, made: logits [B, h, w]; above 0 is "real".
    """
    if kind == "hinge":
        parts = jax.nn.relu(1.0 - real) + jax.nn.relu(1.0 + made)
    else:
        parts = jax.nn.softplus(-real) + jax.nn.softplus(made)
    return 0.5 * jnp.mean(parts, axis=(1, 2))


def generator_loss(made: Array) -> Array:
    """Return the loss of what makes pictures, [B]: less where logits [B, h, w] say "real"."""
    return -jnp.mean(made, axis=(1, 2))


def adaptive_weight(reconstruction: Array, adversarial: Array) -> Array:
    """Return the weight that makes two gradients of equal length, a scalar without gradient.

    Args:
        reconstruction, adversarial: gradients of the losses by the decoder's last kernel.
    """
    lengths = [jnp.sqrt(jnp.sum(jnp.square(one))) for one in (reconstruction, adversarial)]
    weight = jnp.clip(lengths[0] / (lengths[1] + _EPS), 0.0, MOST_WEIGHT)
    return jax.lax.stop_gradient(weight)


def with_gradient(values: Array, weights: Array, at: Tree, gradient: Tree) -> Array:
    """Return values [B] whose weighted mean has a gradient that is known already.

    So a loss can look at its gradients, or compute them within a branch, and is still
    differentiated like any other, once.

    Args:
        values: [B], of each example.
        weights: [B], of each example in the mean: sum(weights * values) / B.
        at: what it is differentiated by, directly or through what made it.
        gradient: of that mean, in the shapes of `at`.
    """
    steps = jax.tree.map(
        lambda x, slope: jnp.vdot(jax.lax.stop_gradient(slope), x - jax.lax.stop_gradient(x)),
        at,
        gradient,
    )
    zero = sum(jax.tree.leaves(steps))  # whose gradient is the one that is wanted
    share = len(values) / jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float32).tiny)
    return jax.lax.stop_gradient(values) + share * zero
