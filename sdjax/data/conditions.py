"""Condition pictures that are made of the main picture by arithmetic alone, without a network.

Each function takes and gives uint8 [H, W, 3], the picture as the network is to draw it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

# cv2.Canny(image, 100, 200) of diffusers' ControlNet guide and of ControlNet's own demo.
CANNY_LOW, CANNY_HIGH = 100, 200
BLUR_SIGMA = 1 / 64  # of the shorter side
TILE = 8  # pixels that become one, as in ControlNet 1.1's tile_resample
COLOUR = 16  # fields across the shorter side
_TAN_22 = 13573  # tan(22.5 degrees) in fixed point of 15 bits, as OpenCV's canny.cpp


def canny(image: np.ndarray) -> np.ndarray:
    """Return edges, white on black: those of OpenCV's `Canny` with a 3x3 Sobel and |dx| + |dy|.

    The channel with the steepest gradient decides at each pixel.
    """
    from scipy import ndimage

    dx, dy = _gradients(image)
    steep = np.argmax(np.abs(dx) + np.abs(dy), axis=-1)[..., None]
    dx, dy = (np.take_along_axis(d, steep, axis=-1)[..., 0] for d in (dx, dy))
    size = np.abs(dx) + np.abs(dy)
    crest = (size > CANNY_LOW) & _is_crest(size, dx, dy)
    lines, _ = ndimage.label(crest, structure=np.ones((3, 3)))
    strong = np.unique(lines[crest & (size > CANNY_HIGH)])
    found = np.isin(lines, strong[strong > 0])
    return np.repeat(found[..., None].astype(np.uint8) * 255, 3, axis=-1)


def _gradients(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel's derivatives to the right and downwards, int64 [H, W, C]; edges are repeated."""
    from scipy import ndimage

    wide = image.astype(np.int64)

    def along(axis: int) -> np.ndarray:
        steps = ndimage.correlate1d(wide, [-1, 0, 1], axis=axis, mode="nearest")
        return ndimage.correlate1d(steps, [1, 2, 1], axis=1 - axis, mode="nearest")

    return along(1), along(0)


def _is_crest(size: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Whether a gradient is the largest along its direction, to the nearest 45 degrees."""
    padded = np.pad(size, 1)

    def at(down: int, right: int) -> np.ndarray:
        return padded[1 + down : 1 + down + len(size), 1 + right : 1 + right + size.shape[1]]

    x, y = np.abs(dx), np.abs(dy) << 15
    flat = x * _TAN_22
    sideways, upright = y < flat, y > flat + (x << 16)
    falls = (dx ^ dy) < 0
    before = np.where(falls, at(-1, 1), at(-1, -1))
    after = np.where(falls, at(1, -1), at(1, 1))
    return np.select(
        [sideways, upright],
        [(size > at(0, -1)) & (size >= at(0, 1)), (size > at(-1, 0)) & (size >= at(1, 0))],
        (size > before) & (size > after),
    )


def soft_edges(image: np.ndarray) -> np.ndarray:
    """Return the steepness of the luma, |(dx, dy)| / 4 of Sobel's derivatives, in grey."""
    luma = grey(image)[..., :1]
    steepness = np.hypot(*_gradients(luma)) / 4
    return np.repeat(np.clip(np.round(steepness), 0, 255).astype(np.uint8), 3, axis=-1)


def blur(image: np.ndarray) -> np.ndarray:
    """Return the picture after a Gaussian filter, as wide as a 64th of its shorter side."""
    from scipy import ndimage

    sigma = BLUR_SIGMA * min(image.shape[:2])
    soft = ndimage.gaussian_filter(image.astype(np.float64), (sigma, sigma, 0), mode="nearest")
    return np.round(soft).astype(np.uint8)


def tile(image: np.ndarray) -> np.ndarray:
    """Return the picture with an eighth of its pixels on a side, enlarged again."""
    return _coarse(image, TILE, "BICUBIC")


def colour(image: np.ndarray) -> np.ndarray:
    """Return a mosaic of mean colours, 16 fields across the shorter side."""
    return _coarse(image, max(1, min(image.shape[:2]) // COLOUR), "NEAREST")


def _coarse(image: np.ndarray, factor: int, enlarge: str) -> np.ndarray:
    from PIL import Image  # not where shapes are enough

    height, width = image.shape[:2]
    small = max(1, width // factor), max(1, height // factor)
    reduced = Image.fromarray(image).resize(small, Image.Resampling.BOX)
    return np.asarray(reduced.resize((width, height), Image.Resampling[enlarge]))


def grey(image: np.ndarray) -> np.ndarray:
    """Return the luma, for a network that colours."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


CONDITIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "canny": canny, "soft_edges": soft_edges, "blur": blur, "tile": tile, "colour": colour,
    "grey": grey,
}  # fmt: skip
