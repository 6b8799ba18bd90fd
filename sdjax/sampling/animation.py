"""Pictures that move: animated WebP or PNG, without loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sdjax.system import paths

FORMATS = ("webp", "png")


def save_animation(
    path: paths.PathLike,
    frames: Sequence[np.ndarray],
    *,
    milliseconds: int = 150,
    rest: int = 1500,
    min_side: int = 256,
) -> None:
    """Write uint8 frames [H, W, 3] as an endless animation, WebP or PNG by the path's ending.

    Small frames are enlarged by whole factors (nearest) to `min_side`.

    Args:
        milliseconds: each frame is shown.
        rest: milliseconds that the last one is.
    """
    path = paths.to_path(path)
    height, width = frames[0].shape[:2]
    factor = max(1, -(-min_side // width))
    size = (width * factor, height * factor)
    first, *others = (
        Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in frames
    )
    durations = [milliseconds] * len(others) + [rest]
    format = path.suffix[1:].upper()
    options = {"lossless": True, "quality": 100} if format == "WEBP" else {}
    with paths.writing(path) as local:
        first.save(
            local, format=format, save_all=True, append_images=others, duration=durations, loop=0,
            **options,
        )  # fmt: skip


def animated(name: str, format: str) -> str:
    """The file of an animation beside NAME.png."""
    return f"{name}.webp" if format == "webp" else f"{name}-animated.png"
