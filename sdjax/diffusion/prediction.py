"""The four types of prediction of a network, and the identities between them.

With xt = alpha*x0 + sigma*eps:
    epsilon       eps
    v_prediction  v = alpha*eps - sigma*x0     (Salimans & Ho 2022)
    sample        x0
    flow          u = eps - x0                 (rectified flow, the sign of SD3 and FLUX)

They hold for any alpha and sigma; alpha**2 + sigma**2 is 1 for every schedule but flow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


def check_prediction(kind: str) -> None:
    """Raise ValueError unless `kind` is one of PREDICTIONS."""
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type is {kind!r}; expected one of {', '.join(PREDICTIONS)}")


def _like(scalars: jax.Array, x: jax.Array) -> jax.Array:
    """Reshape alpha or sigma, a scalar or [B], to broadcast against x [B, ...]."""
    scalars = jnp.asarray(scalars, jnp.float32)
    if scalars.ndim == 0:
        return scalars
    return scalars.reshape(scalars.shape + (1,) * (x.ndim - scalars.ndim))  # [B, 1, ...]


def add_noise(x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """The noisy xt = alpha*x0 + sigma*eps; x0 and eps [B, ...], alpha and sigma [B] or scalars."""
    return _like(alpha, x0) * x0 + _like(sigma, x0) * eps


def target(
    kind: str, x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
    """The output that the network should have, [B, ...]: one of the four types of prediction.

    x0, eps: [B, ...]; alpha, sigma: [B] or scalars. Raises ValueError for an unknown `kind`.
    """
    check_prediction(kind)
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "flow":
        return eps - x0
    return _like(alpha, x0) * eps - _like(sigma, x0) * x0


def to_x0(
    kind: str, out: jax.Array, xt: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
    """The x0 that the network's output `out` at xt implies, [B, ...]. "epsilon" needs alpha > 0.

    out, xt: [B, ...]; alpha, sigma: [B] or scalars. Raises ValueError for an unknown `kind`.
    """
    check_prediction(kind)
    alpha, sigma = _like(alpha, xt), _like(sigma, xt)
    if kind == "epsilon":
        return (xt - sigma * out) / alpha
    if kind == "sample":
        return out
    if kind == "flow":
        return (xt - sigma * out) / (alpha + sigma)
    return (alpha * xt - sigma * out) / (alpha**2 + sigma**2)


def to_eps(
    kind: str, out: jax.Array, xt: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
    """The eps that the network's output `out` at xt implies, [B, ...]. "sample" needs sigma > 0.

    out, xt: [B, ...]; alpha, sigma: [B] or scalars. Raises ValueError for an unknown `kind`.
    """
    check_prediction(kind)
    alpha, sigma = _like(alpha, xt), _like(sigma, xt)
    if kind == "epsilon":
        return out
    if kind == "sample":
        return (xt - alpha * out) / sigma
    if kind == "flow":
        return (xt + alpha * out) / (alpha + sigma)
    return (alpha * out + sigma * xt) / (alpha**2 + sigma**2)


def convert(
    source: str,
    destination: str,
    out: jax.Array,
    xt: jax.Array,
    alpha: jax.Array,
    sigma: jax.Array,
) -> jax.Array:
    """Convert an output [B, ...] of type `source` into the equal output of type `destination`.

    Raises ValueError where `source` or `destination` is not one of PREDICTIONS.
    """
    check_prediction(destination)
    if source == destination:
        return out
    x0 = to_x0(source, out, xt, alpha, sigma)
    eps = to_eps(source, out, xt, alpha, sigma)
    return target(destination, x0, eps, alpha, sigma)


def output_slopes(kind: str, alpha: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The slopes |d x0 / d out| and |d eps / d out| at fixed xt, each of alpha's shape.

    They carry a squared error of the output over to one of x0 or eps. So one loss weighting means
    the same for every prediction type. |d eps| = |d x0| * alpha / sigma throughout.
    """
    check_prediction(kind)
    one = jnp.ones_like(alpha)
    if kind == "epsilon":
        return sigma / alpha, one
    if kind == "sample":
        return one, alpha / sigma
    if kind == "flow":
        return sigma / (alpha + sigma), alpha / (alpha + sigma)
    norm = alpha**2 + sigma**2
    return sigma / norm, alpha / norm
