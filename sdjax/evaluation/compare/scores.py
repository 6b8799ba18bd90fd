"""Scores of single pictures, by which two models can be compared picture by picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sdjax.data.builders.shape_reader import read_shapes
from sdjax.data.pictures import Pictures, stretches
from sdjax.evaluation.features import ClipTower
from sdjax.evaluation.metrics import similarity
from sdjax.evaluation.metrics.fidelity import PROPERTIES, is_of_shapes, verdicts

OBJECT_WIDTH = "object_width"
# {score: whether more of it is better; None where it says what a picture is like, not how good}.
SCORES: Mapping[str, bool | None] = {
    **{f"fidelity_{name}": True for name in PROPERTIES},
    "clip_score": True,
    OBJECT_WIDTH: None,
    "brightness": None,
    "contrast": None,
    "saturation": None,
}


def scores_of(
    pictures: Pictures, captions: Sequence[str], clip: ClipTower | None = None
) -> dict[str, np.ndarray]:
    """Return {one of `SCORES`: float64 [N]}, NaN where a picture has no such score.

    fidelity_PROPERTY: 1 or 0, of captions of captioned_shapes that state the property.
    object_width: the mean width of the objects that the reader of shapes finds, over the picture's.
    brightness, contrast, saturation: of a picture in [0, 1], the mean, the deviation of its
        pixels' means, and the mean difference of a pixel's largest and least channel.
    """
    shapes = is_of_shapes(captions)
    rows: list[dict[str, float]] = []
    texts = iter(captions)
    for images in stretches(pictures):
        for image in images:
            row = _look(image)
            if shapes:
                row |= _of_shapes(next(texts), image)
            rows.append(row)
    names = [name for name in SCORES if any(name in row for row in rows)]
    found = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
    if clip is not None and captions:
        every, numbers = np.unique(captions, return_inverse=True)
        of_texts = clip.texts([str(text) for text in every])[numbers]
        features = np.concatenate([clip.images(images) for images in stretches(pictures)])
        found["clip_score"] = similarity.clip_scores(features, of_texts)
    return found


def _look(image: np.ndarray) -> dict[str, float]:
    values = image / 255.0
    grey = values.mean(-1)
    return {
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        "saturation": float((values.max(-1) - values.min(-1)).mean()),
    }


def _of_shapes(caption: str, image: np.ndarray) -> dict[str, float]:
    row = {f"fidelity_{name}": float(right) for name, right in verdicts(caption, image).items()}
    boxes = [found.box for found in read_shapes(image)]
    widths = [(right - left) / image.shape[1] for left, _, right, _ in boxes]
    return {**row, **({OBJECT_WIDTH: float(np.mean(widths))} if widths else {})}
