"""EQ-VAE: latents are scaled and turned, and must decode to the picture scaled and turned alike.

Kouzelis et al. 2025 (arXiv:2502.09509), and train_eqvae/ldm/models/autoencoder.py of its authors: a
share of the batches is changed, and a share of the others is made of smaller pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Streams of a step's key, beyond those of examples and of what a batch shares.
_KIND, _SCALE, _TURNS = 64, 65, 66


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to look at a batch.

    latents: the scale of latents, and of the picture that they must decode to; they are turned too.
    pictures: the scale of pictures before they are encoded.
    """

    latents: float = 1.0
    pictures: float = 1.0


def variants(share: float, smaller: float, scales: Sequence[float]) -> tuple[Variant, ...]:
    """Return the ways in which batches are looked at; the first leaves them as they are.

    Args:
        share: of batches whose latents are changed.
        smaller: the share, of the others, whose pictures are made smaller.
    """
    changed = [Variant(latents=scale) for scale in scales] if share else []
    small = [Variant(pictures=scale) for scale in scales] if smaller and share < 1 else []
    return (Variant(), *changed, *small)


def drawn(key: jax.Array, share: float, smaller: float, count: int) -> tuple[jax.Array, jax.Array]:
    """Return (the place of a variant, quarter turns: 1, 2 or 3), int32 scalars, for a whole batch.

    Args:
        key: of the step.
        share, smaller: see `variants`.
        count: of scales.
    """
    draws = [jax.random.fold_in(key, stream) for stream in (_KIND, _SCALE, _TURNS)]
    u, v = jax.random.uniform(draws[0], (2,))
    scale = jax.random.randint(draws[1], (), 0, count)
    first_smaller = 1 + count if share else 1
    other = jnp.where(v < smaller, first_smaller + scale, 0)
    return jnp.where(u < share, 1 + scale, other), jax.random.randint(draws[2], (), 1, 4)


def resized(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Return x [B, H, W, C] in another size, bilinear and without smoothing.

    That is torch's `interpolate(mode="bilinear", align_corners=False)`.
    """
    shape = (x.shape[0], *size, x.shape[-1])
    return jax.image.resize(x, shape, "linear", antialias=False)


def turned(x: jax.Array, turns: jax.Array) -> jax.Array:
    """Return x [B, H, W, C] after 1 to 3 quarter turns clockwise.

    A picture that is no square takes two: others would change the shape of the batch.
    """
    if x.shape[1] != x.shape[2]:
        return x[:, ::-1, ::-1]
    ways = [lambda x, k=k: jnp.rot90(x, k, axes=(2, 1)) for k in (1, 2, 3)]
    return jax.lax.switch(turns - 1, ways, x)


def scaled_sizes(
    latents: tuple[int, int], scale: float, downscale: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the sizes of latents and of their picture at a scale, in whole latents.

    Args:
        latents: their height and width at scale 1.
        downscale: pixels per latent.
    """
    height, width = (max(1, round(side * scale)) for side in latents)
    return (height, width), (height * downscale, width * downscale)
