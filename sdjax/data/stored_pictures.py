"""The pictures of a stored record: encoded files, or arrays, as pictures and masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.data import transforms
from sdjax.data.image_files import ImageError
from sdjax.data.named_images import NamedImage


def original_size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """The height and width of the picture before it was stored smaller; None if not known."""
    if "original_height" not in record or "original_width" not in record:
        return None
    height, width = int(record["original_height"]), int(record["original_width"])
    return (height, width) if height > 0 and width > 0 else None


def decoded(value: Any, max_pixels: int, named: NamedImage | None = None) -> transforms.Picture:
    """The picture of a feature, encoded or an array. Raises ImageError."""
    if named is not None and named.kind == "mask":
        if isinstance(value, bytes):
            return transforms.decode_mask(value, max_pixels=max_pixels)
        return _one_channel(np.asarray(value))
    if isinstance(value, bytes):
        return transforms.decode_image(value, max_pixels=max_pixels)
    return _three_channels(np.asarray(value))


def as_array(picture: transforms.Picture) -> np.ndarray:
    """A picture as uint8 [H, W, C]."""
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array


def _three_channels(image: np.ndarray) -> np.ndarray:
    """Convert a grey or grey-alpha array of TFDS to uint8 [H, W, 3]; ImageError for other kinds."""
    image = _channels(image)
    if image.shape[-1] == 3:
        return image
    if image.shape[-1] == 1:
        return np.repeat(image, 3, -1)
    raise ImageError("unsupported_mode", f"{image.shape[-1]} channels")


def _one_channel(mask: np.ndarray) -> np.ndarray:
    """Convert an array of TFDS to a mask, uint8 [H, W, 1]. Raises ImageError for colours."""
    mask = _channels(mask)
    if mask.shape[-1] != 1:
        raise ImageError("unsupported_mode", f"{mask.shape[-1]} channels; a mask has one")
    return mask


def _channels(image: np.ndarray) -> np.ndarray:
    """An array of TFDS as uint8 [H, W, C]. Raises ImageError for other kinds."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ImageError(
            "unsupported_mode", f"{image.dtype} {list(image.shape)}, not uint8 [H, W, C]"
        )
    return image[..., None] if image.ndim == 2 else image
