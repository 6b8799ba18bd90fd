"""The numbers of an example besides pictures and captions, which a family of models takes.

Some follow from the geometry of the picture. The others are number features of the dataset, called
as the field of the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]  # {field of a batch: shape for one example}
GEOMETRY = ("size",)  # fields that follow from the geometry


def of_geometry(
    fields: Collection[str], original: tuple[int, int], corner: tuple[int, int] = (0, 0)
) -> dict[str, np.ndarray]:
    """Return those of the fields that follow from the geometry, for one example.

    size: int32 [4], height and width of the original, then top and left of the crop.

    Args:
        original: height and width of the original.
        corner: top and left of the crop, in pixels of the resized picture.
    """
    found = {"size": np.array([*original, *corner], np.int32)}
    return {name: value for name, value in found.items() if name in fields}


def of_columns(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of those that are features of the dataset."""
    return {name: tuple(shape) for name, shape in shapes.items() if name not in GEOMETRY}


def dtype(field: str) -> np.dtype:
    """The type of a field in a batch: int32 of the geometry, else float32."""
    return np.dtype(np.int32 if field in GEOMETRY else np.float32)
