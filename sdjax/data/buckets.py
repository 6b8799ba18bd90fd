"""Aspect-ratio buckets: pictures of like shape make a batch, and lose little to the crop.

The idea is NovelAI's (https://blog.novelai.net, "NovelAI improvements on Stable Diffusion", 2022).
Sides are multiples of a step, and the area is at most that of the square. A picture goes to the
bucket whose aspect is nearest. This module maps sizes to buckets and reads no pictures.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class BucketConfig:
    """The settings of buckets, which make rectangles instead of squares."""

    step: int = 0  # sides are multiples of it, 64 for Stable Diffusion; 0: no buckets, squares
    max_aspect: float = 2.0  # of a bucket; narrower pictures are cropped to the narrowest one
    max_upscale: float = 0.0  # pictures that would be enlarged more are refused; 0: no limit

    def __post_init__(self) -> None:
        if self.step < 0:
            raise UserError(f"data.buckets.step is {self.step}; expected 0 (off) or more")
        if self.max_aspect < 1:
            raise UserError(f"data.buckets.max_aspect is {self.max_aspect}; expected at least 1")
        if self.max_upscale < 0:
            raise UserError(f"data.buckets.max_upscale is {self.max_upscale}; expected 0 (any), or "
                            "how many times as long a side may become, such as 1.25")  # fmt: skip


def bucket_shapes(resolution: int, config: BucketConfig) -> list[tuple[int, int]]:
    """The (height, width) of all buckets, from the tallest to the widest.

    They are multiples of the step, of at most resolution^2 pixels, that cannot grow in either
    direction. Raises UserError when there is none.
    """
    step, area = config.step, resolution * resolution

    def longest(side: int) -> int:
        return area // side // step * step

    shapes = []
    for height in range(step, area // step + 1, step):
        width = longest(height)
        aspect = max(height, width) / width if width else np.inf
        aspect = max(aspect, width / height)
        if width and longest(width) == height and aspect <= config.max_aspect:
            shapes.append((height, width))
    if not shapes:
        raise UserError(
            f"data.buckets has no bucket: no multiple of data.buckets.step = {step} within "
            f"data.resolution = {resolution} squared has an aspect up to "
            f"data.buckets.max_aspect = {config.max_aspect:g}; use a smaller step"
        )
    return sorted(shapes, key=lambda shape: shape[1] / shape[0])


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The buckets and their pictures.

    shapes: (height, width) of the buckets that are open.
    members: for each, the numbers of its pictures, int64, rising.
    closed: for each shape too small for a batch, how many of its pictures went to other buckets.
    refused: how many pictures are not used, by reason.
    cropped: mean share of a picture's area that the crop takes off.
    """

    shapes: list[tuple[int, int]]
    members: list[np.ndarray]
    closed: dict[tuple[int, int], int]
    refused: dict[str, int]
    cropped: float

    @property
    def images(self) -> int:
        """The number of pictures in all buckets."""
        return sum(map(len, self.members))


def assign(
    heights: np.ndarray, widths: np.ndarray, shapes: list[tuple[int, int]], *,
    batch_size: int, max_upscale: float = 0.0,
) -> Buckets:  # fmt: skip
    """Assign pictures to the bucket nearest in log aspect that does not enlarge them too much.

    heights, widths: int [N]; 0 is an unreadable picture. A bucket with fewer pictures than a batch
    closes, the smallest first, until every open bucket has enough or only one is left.
    """
    readable = (heights > 0) & (widths > 0)
    chosen = np.full(len(heights), -1, np.int32)
    numbers = np.flatnonzero(readable)
    limit = max_upscale or np.inf
    open_ = np.ones(len(shapes), bool)
    chosen[numbers] = _nearest(heights[numbers], widths[numbers], shapes, open_, limit)
    too_small = int((readable & (chosen < 0)).sum())
    closed: dict[tuple[int, int], int] = {}
    while True:
        sizes = np.bincount(chosen[chosen >= 0], minlength=len(shapes))
        open_ &= sizes > 0
        if open_.sum() <= 1 or sizes[open_].min() >= batch_size:
            break
        last = int(np.argmin(np.where(open_, sizes, np.iinfo(np.int64).max)))
        open_[last] = False
        closed[shapes[last]] = int(sizes[last])
        moved = np.flatnonzero(chosen == last)
        chosen[moved] = _nearest(heights[moved], widths[moved], shapes, open_, limit)
    refused = {
        "unreadable": int((~readable).sum()),
        "would be enlarged too much": too_small,
        "their bucket closed, and all others enlarge too much": int(
            (readable & (chosen < 0)).sum() - too_small
        ),
    }
    kept = [i for i in range(len(shapes)) if open_[i]]
    used = np.flatnonzero(chosen >= 0)
    return Buckets(
        shapes=[shapes[i] for i in kept],
        members=[np.flatnonzero(chosen == i) for i in kept],
        closed=closed,
        refused={reason: count for reason, count in refused.items() if count},
        cropped=_cropped(heights[used], widths[used], np.array(shapes)[chosen[used]]),
    )


def _nearest(
    heights: np.ndarray, widths: np.ndarray, shapes: list[tuple[int, int]], open_: np.ndarray,
    limit: float,
) -> np.ndarray:  # fmt: skip
    """The open bucket of each picture, int32 [N]; -1 if all enlarge it beyond the limit."""
    best = np.full(len(heights), -1, np.int32)
    least = np.full(len(heights), np.inf)
    aspects = np.log(widths / heights)
    for i in np.flatnonzero(open_):  # one bucket at a time takes memory of N, not of N x buckets
        height, width = shapes[i]
        distance = np.abs(aspects - np.log(width / height))
        fits = np.maximum(height / heights, width / widths) <= limit
        better = fits & (distance < least - 1e-12)
        best[better], least[better] = i, distance[better]
    return best


def _cropped(heights: np.ndarray, widths: np.ndarray, shapes: np.ndarray) -> float:
    """The mean share of the area that is lost when each picture covers its [N, 2] shape."""
    if not len(heights):
        return 0.0
    ratio = (widths / heights) / (shapes[:, 1] / shapes[:, 0])
    return float(np.mean(1 - np.minimum(ratio, 1 / ratio)))
