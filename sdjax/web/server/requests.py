"""Pictures that clients ask for, and those that they send."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Hashable

import numpy as np
from PIL import Image

from sdjax.data.image_files import ImageError, open_image
from sdjax.data.transforms import to_rgb, upright
from sdjax.diffusion.grids import SamplerConfig
from sdjax.system.untrusted import brief
from sdjax.web.server.fields import InvalidRequest


@dataclasses.dataclass(frozen=True, eq=False)
class PictureRequest:
    """One picture with all that it depends on, besides the model.

    image: uint8 [H, W, 3] to begin with, of the size that is drawn, or None.
    mask: float32 [H, W, 1], 1 where the picture is drawn anew, or None.
    strength: share of the steps that are taken from `image`.
    adapters: the weight of each of the server's adapters, in their order; None as at the start.
    chunks: that the text encoders read, of prompts with weights.
    """

    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    sampler: SamplerConfig
    guidance: float
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    strength: float = 1.0
    adapters: tuple[float, ...] | None = None
    chunks: int = 1

    @property
    def alike(self) -> Hashable:
        """Return what pictures have in common that are drawn by one program."""
        begins = self.strength if self.image is not None else None
        masked = self.mask is not None
        drawn = self.height, self.width, self.sampler, self.guidance == 1.0, begins, masked
        return *drawn, self.adapters, self.chunks


def decoded_image(name: str, text: str, most_pixels: int) -> Image.Image:
    """Return the picture of base64, perhaps after "data:image/png;base64,", upright in RGB or RGBA.

    Raises:
        InvalidRequest: it is a URL, which is never fetched, or no picture.
    """
    if text[:8].lower().startswith(("http:", "https:", "file:", "ftp:")):
        raise InvalidRequest(
            f"{name} is the URL {brief(text)}; a URL is never fetched, send the picture in base64"
        )
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{name} is {brief(text)}; expected a picture in base64") from None
    return read_image(name, data, most_pixels)


def read_image(name: str, data: bytes, most_pixels: int) -> Image.Image:
    """Return the picture of a file's bytes, upright.

    Raises:
        InvalidRequest: it is no picture, or too large.
    """
    try:
        return upright(open_image(data, max_pixels=most_pixels))
    except ImageError as error:
        raise InvalidRequest(f"{name} cannot be used: {error}; send a PNG or JPEG") from error


def picture_array(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return uint8 [H, W, 3] of a picture resized to (H, W), as --init_image is."""
    return np.asarray(to_rgb(image).resize(size[::-1], Image.Resampling.LANCZOS), np.uint8)


def mask_array(image: Image.Image, size: tuple[int, int], *, inverted: bool = False) -> np.ndarray:
    """Return float32 [H, W, 1] of a mask, 1 where it is white (black if inverted)."""
    grey = to_rgb(image).resize(size[::-1], Image.Resampling.LANCZOS).convert("L")
    white = np.asarray(grey, np.float32)[..., None] / 255 >= 0.5
    return (white != inverted).astype(np.float32)
