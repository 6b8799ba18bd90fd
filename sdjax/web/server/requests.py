"""Pictures that clients ask for, and the bounds of what they may ask."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from sdjax.data.image_files import ImageError, open_image
from sdjax.data.transforms import to_rgb, upright
from sdjax.diffusion.grids import SamplerConfig
from sdjax.errors import UserError
from sdjax.system.untrusted import brief


class InvalidRequest(UserError):
    """A request that cannot be answered; the message names the field, its value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The bounds of requests; a request beyond them is refused in words.

    side: of a picture, in pixels; steps: of the sampler; pictures: of one request.
    prompt: characters of a prompt.
    body: bytes of a request; image: pixels of a picture that a client sends.
    queue: pictures that wait; seconds: of one request, in which it waits and is drawn.
    rate: requests a minute of one address.
    """

    side: int = 2048
    steps: int = 150
    pictures: int = 16
    prompt: int = 10_000
    body: int = 32 << 20
    image: int = 16_000_000
    queue: int = 64
    seconds: float = 600.0
    rate: int = 600


@dataclasses.dataclass(frozen=True, eq=False)
class PictureRequest:
    """One picture with all that it depends on, besides the model.

    image: uint8 [H, W, 3] to begin with, of the size that is drawn, or None.
    mask: float32 [H, W, 1], 1 where the picture is drawn anew, or None.
    strength: share of the steps that are taken from `image`.
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

    @property
    def alike(self) -> Hashable:
        """Return what pictures have in common that are drawn by one program."""
        begins = self.strength if self.image is not None else None
        masked = self.mask is not None
        return self.height, self.width, self.sampler, self.guidance == 1.0, begins, masked


class Fields:
    """The fields of a client's JSON object, read with a type and bounds.

    Fields that are absent or null have their default; those that nobody reads are ignored, as the
    servers do whose clients these are.
    """

    def __init__(self, body: Any):
        if not isinstance(body, Mapping):
            raise InvalidRequest(f"expected a JSON object, found {brief(body)}")
        self._body = body

    def text(self, name: str, default: str = "", *, most: int) -> str:
        """Return a text of at most so many characters."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} is {brief(value)}; expected a text")
        if len(value) > most:
            raise InvalidRequest(f"{name} has {len(value)} characters; expected at most {most}")
        return value

    def whole(self, name: str, default: int, *, least: int, most: int) -> int:
        """Return a whole number within bounds; 3.0 and "3" are 3."""
        return int(self._number(name, default, least, most, whole=True))

    def number(self, name: str, default: float, *, least: float, most: float) -> float:
        """Return a finite number within bounds."""
        return self._number(name, default, least, most, whole=False)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} is {brief(value)}; expected true or false")
        return value

    def names(self, name: str) -> Sequence[str]:
        """Return a list of texts."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise InvalidRequest(f"{name} is {brief(value)}; expected a list of texts")
        return value

    def group(self, name: str) -> Fields:
        """Return the fields of an object within this one."""
        value = self._get(name, {})
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"{name} is {brief(value)}; expected an object")
        return Fields(value)

    def _get(self, name: str, default: Any) -> Any:
        value = self._body.get(name)
        return default if value is None else value

    def _number(self, name: str, default: float, least: float, most: float, whole: bool) -> float:
        value = self._get(name, default)
        kind = "a whole number" if whole else "a number"
        try:
            if isinstance(value, bool):
                raise ValueError
            found = float(value)
            if found != found or (whole and found != int(found)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise InvalidRequest(f"{name} is {brief(value)}; expected {kind}") from None
        if not least <= found <= most:
            raise InvalidRequest(
                f"{name} is {brief(value)}; expected {kind} from {least:g} to {most:g}"
            )
        return int(value) if whole and isinstance(value, int) else found


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
