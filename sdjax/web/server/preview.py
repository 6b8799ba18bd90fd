"""Pictures as they are while they are drawn, without the VAE: colours that follow from latents.

The colour of a latent's place is nearly linear in its channels. The map is learned from pictures as
they are drawn, so that it suits any VAE.
"""

from __future__ import annotations

import threading

import numpy as np
from PIL import Image


class Preview:
    """A linear map from latents to colours, by least squares over all pictures seen."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._squares: np.ndarray | None = None  # [C + 1, C + 1]
        self._products = np.zeros((0, 3))  # [C + 1, 3]

    def learn(self, latents: np.ndarray, pictures: np.ndarray) -> None:
        """Take account of latents [N, h, w, C] and their pictures, uint8 [N, H, W, 3]."""
        count, height, width, _ = latents.shape
        side = pictures.shape[1] // height
        blocks = pictures.reshape(count, height, side, width, side, 3)
        colours = blocks.mean(axis=(2, 4)).reshape(-1, 3)
        inputs = _inputs(latents)
        if not np.isfinite(inputs).all():
            return
        with self._lock:
            if self._squares is None:
                # A little of the identity, for the first pictures, which leave directions open.
                self._squares = 1e-3 * np.eye(inputs.shape[1])
                self._products = np.zeros((inputs.shape[1], 3))
            self._squares += inputs.T @ inputs
            self._products += inputs.T @ colours

    def picture(self, latents: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
        """Return uint8 [H, W, 3] for latents [h, w, C]; None before anything was learned."""
        with self._lock:
            if self._squares is None:
                return None
            mapped = np.linalg.solve(self._squares, self._products)
        colours = np.clip(np.nan_to_num(_inputs(latents[None]) @ mapped), 0, 255)
        small = colours.reshape(*latents.shape[:2], 3).astype(np.uint8)
        large = Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)
        return np.asarray(large)


def _inputs(latents: np.ndarray) -> np.ndarray:
    """Return the channels of every place, and 1: [N * h * w, C + 1] float64."""
    flat = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
