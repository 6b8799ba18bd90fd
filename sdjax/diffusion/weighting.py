"""Loss weightings as functions of alpha and sigma, equal in effect for every prediction type.

A weighting is defined on the error of x0 or of eps. The slopes g = |d x0/d out| and e = |d eps/d
out| carry it over to the error of the network's output (e**2 = SNR g**2). Written in g and e,
weightings stay finite at SNR 0.

    uniform   1
    min_snr   min(gamma, SNR) on x0         Hang 2023: /SNR for eps, /(SNR+1) for v
    p2        (k + SNR)**-gamma on eps      Choi 2022
    debiased  SNR**-1/2 on eps              Yu 2023
    edm       SNR + 1/sigma_data**2 on x0   Karras 2022, lambda(sigma) at sigma = 1/sqrt(SNR)
    cosmap    2/(pi (1 - 2s + 2s**2)) on the flow velocity, s = sigma   (SD3 paper, 3.1)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.diffusion.prediction import output_slopes

WEIGHTINGS = ("uniform", "min_snr", "p2", "debiased", "edm", "cosmap")


def loss_weight(
    kind: str,
    prediction_type: str,
    alpha: jax.Array,
    sigma: jax.Array,
    *,
    min_snr_gamma: float = 5.0,
    p2_k: float = 1.0,
    p2_gamma: float = 1.0,
    sigma_data: float = 1.0,
) -> jax.Array:
    """The weight of a squared error of the network's output, float32 of alpha's shape.

    Raises ValueError for an unknown `kind`.
    """
    if kind not in WEIGHTINGS:
        raise ValueError(f"weighting is {kind!r}; expected one of {', '.join(WEIGHTINGS)}")
    x0_slope, eps_slope = output_slopes(prediction_type, alpha, sigma)
    if kind == "min_snr":
        return jnp.minimum(min_snr_gamma * x0_slope**2, eps_slope**2)
    if kind == "p2":
        return eps_slope**2 * (sigma**2 / (p2_k * sigma**2 + alpha**2)) ** p2_gamma
    if kind == "debiased":
        return x0_slope * eps_slope
    if kind == "edm":
        return eps_slope**2 + (x0_slope / sigma_data) ** 2
    if kind == "cosmap":
        return 2.0 / (jnp.pi * (1.0 - 2.0 * sigma + 2.0 * sigma**2))
    return jnp.ones_like(alpha)
