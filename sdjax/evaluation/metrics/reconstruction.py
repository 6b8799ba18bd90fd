"""How near a picture is to the one it was made of: PSNR, and SSIM (Wang et al. 2004).

SSIM has the authors' constants and window: 11 x 11, Gaussian of deviation 1.5, within the picture.
Each colour is judged alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

MOST_PSNR = 100.0  # dB, also of equal pictures
WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03
_RANGE = 255.0


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the peak signal-to-noise ratios of pictures [B, H, W, C] of 0 to 255, in dB, [B]."""
    error = jnp.mean(jnp.square(a - b), axis=(1, 2, 3)) / _RANGE**2
    return -10.0 * jnp.log10(jnp.maximum(error, 10 ** (-MOST_PSNR / 10)))


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the structural similarities of pictures [B, H, W, C] of 0 to 255, [B]; 1 is equal."""
    a, b = a / _RANGE, b / _RANGE
    mean_a, mean_b = _blurred(a), _blurred(b)
    variance_a = _blurred(a * a) - mean_a**2
    variance_b = _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    lights = (2 * mean_a * mean_b + _K1**2) / (mean_a**2 + mean_b**2 + _K1**2)
    structure = (2 * covariance + _K2**2) / (variance_a + variance_b + _K2**2)
    return jnp.mean(lights * structure, axis=(1, 2, 3))


def _blurred(x: jax.Array) -> jax.Array:
    """Weighted means of x [B, H, W, C] over each whole window."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    channels = x.shape[-1]
    for shape in ((WINDOW, 1), (1, WINDOW)):
        kernel = jnp.tile(jnp.asarray(weights).reshape(*shape, 1, 1), (1, 1, 1, channels))
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels, precision="highest",
        )  # fmt: skip
    return x
