"""The preprocessing of pictures for Inception, pytorch-fid's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.evaluation.inception import SIZE

INCEPTION = f"bilinear {SIZE}x{SIZE}, no antialias, [-1, 1]"  # in the digest of features


@jax.jit
def inception_pixels(images: jax.Array) -> jax.Array:
    """Resize uint8 [B, H, W, 3] to float32 [B, 299, 299, 3] in [-1, 1], as pytorch-fid does.

    Bilinear, `align_corners=False`, without antialiasing (torch's `F.interpolate`); FID is defined
    with it, though pictures larger than 299 alias.
    """
    x = images.astype(jnp.float32) / 255
    for axis in (1, 2):
        low, high, part = _bilinear(images.shape[axis], SIZE)
        part = part.reshape([-1 if i == axis else 1 for i in range(4)])
        x = (1 - part) * jnp.take(x, low, axis=axis) + part * jnp.take(x, high, axis=axis)
    return 2 * x - 1


def _bilinear(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two old neighbours of each new position, and the weight of the second."""
    scale = np.float32(old) / np.float32(new)
    at = scale * (np.arange(new, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    at = np.maximum(at, 0)
    low = np.minimum(at.astype(np.int32), old - 1)
    return low, np.minimum(low + 1, old - 1), (at - low).astype(np.float32)
