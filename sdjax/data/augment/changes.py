"""The changes of `data.augment`, by Pillow: what is drawn for an example, and how it is made.

All randomness is the generator's of the example's place in the stream. So a batch is the same on
any number of hosts and workers, and after a resume.
"""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from sdjax.data.augment.config import AugmentConfig
from sdjax.data.image_files import open_image

GREY = 127  # of a cutout
# The words of a change whose value is below what leaves the picture as it is, and above.
_WORDS = {
    "rotation": ("turned clockwise", "turned anticlockwise"),
    "scale": ("zoomed out", "zoomed in"),
    "brightness": ("darkened", "brightened"),
    "contrast": ("less contrast", "more contrast"),
    "saturation": ("less saturated", "more saturated"),
    "hue": ("other hues", "other hues"),
    "blur": ("blurred", "blurred"),
    "cutout": ("cut out", "cut out"),
    "jpeg": ("jpeg artifacts", "jpeg artifacts"),
}
_NEUTRAL = {"scale": 1.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0}


@dataclasses.dataclass(frozen=True)
class Changes:
    """The changes of one example.

    Attributes:
      values: {change: its value}, in the order of `config.BOUNDS`.
      corner: where a cutout stands, as shares of the room that it leaves: (down, right).
      labels: whether the caption says it.
    """

    values: dict[str, float]
    corner: tuple[float, float] = (0.0, 0.0)
    labels: bool = False

    def warp(self, pixels: np.ndarray) -> np.ndarray:
        """Turn and scale a picture about its centre; beyond its edges it is mirrored.

        pixels: uint8 [H, W, 3], or [H, W, 1] of a mask, which is interpolated linearly and so keeps
        the range of its values. Returns the same shape.
        """
        angle, scale = self.values.get("rotation", 0.0), self.values.get("scale", 1.0)
        if angle == 0.0 and scale == 1.0:
            return pixels
        height, width = pixels.shape[:2]
        cos, sin = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
        # Half of the rectangle that is seen, and 2 pixels of a bicubic filter.
        reach = abs(cos) * height + abs(sin) * width, abs(sin) * height + abs(cos) * width
        down, right = (
            max(0, math.ceil((seen - side) / 2) + 2)
            for seen, side in zip(reach, (height, width), strict=True)
        )
        wide = np.pad(pixels, ((down, down), (right, right), (0, 0)), mode="symmetric")
        image = Image.fromarray(wide[..., 0] if wide.shape[-1] == 1 else wide)
        # From a point of the result to one of the picture, as Pillow's `rotate` has them.
        x, y = width / 2, height / 2
        matrix = (
            cos, -sin, x + right - cos * x + sin * y,
            sin, cos, y + down - sin * x - cos * y,
        )  # fmt: skip
        smooth = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.BICUBIC
        turned = image.transform((width, height), Image.Transform.AFFINE, matrix, smooth)
        return np.asarray(turned).reshape(pixels.shape)

    def colour(self, pixels: np.ndarray) -> np.ndarray:
        """Change the colours and the quality of a picture, uint8 [*frames, H, W, 3]."""
        if pixels.ndim > 3:
            return np.stack([self.colour(frame) for frame in pixels])
        made = {name: value for name, value in self.values.items() if name in _MAKE}
        if not made:
            return pixels
        image = Image.fromarray(np.ascontiguousarray(pixels))
        for name, value in made.items():
            image = _MAKE[name](image, value, self.corner)
        return np.asarray(image)

    def caption(self, text: str) -> str:
        """Return the text with the words of the changes in front, where they are not cut off."""
        if not self.labels:
            return text
        words = [_WORDS[name][v > _NEUTRAL.get(name, 0.0)] for name, v in self.values.items()]
        return ", ".join([*words, text] if text else words)


def draw(config: AugmentConfig, rng: np.random.Generator) -> Changes:
    """Draw the changes of an example.

    As many numbers are drawn whatever they say, so that one change does not move the others.
    """
    values = {}
    for name in config.changes:
        happens = rng.random() < getattr(config, name)
        low, high = getattr(config, f"{name}_range")
        value = float(rng.uniform(low, high))
        if happens:
            values[name] = value
    corner = tuple(rng.random(2).tolist()) if config.cutout else (0.0, 0.0)
    return Changes(values, corner, config.labels)


def _hue(image: Image.Image, value: float, corner: tuple[float, float]) -> Image.Image:
    """Turn the circle of hues by a share of it."""
    hue, saturation, brightness = image.convert("HSV").split()
    turned = np.asarray(hue) + np.array(int(value * 255) % 256, np.uint8)  # it wraps
    bands = (Image.fromarray(turned), saturation, brightness)
    return Image.merge("HSV", bands).convert("RGB")


def _blur(image: Image.Image, value: float, corner: tuple[float, float]) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(value))


def _cutout(image: Image.Image, value: float, corner: tuple[float, float]) -> Image.Image:
    """Cover a square with grey."""
    side = round(value * min(image.size))
    left, top = round(corner[1] * (image.width - side)), round(corner[0] * (image.height - side))
    covered = image.copy()
    covered.paste((GREY,) * 3, (left, top, left + side, top + side))
    return covered


def _jpeg(image: Image.Image, value: float, corner: tuple[float, float]) -> Image.Image:
    """Write it as JPEG and read it again."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(value))
    return open_image(buffer.getvalue()).convert("RGB")


def _brightness(image: Image.Image, value: float, corner: tuple[float, float]) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(value)


def _contrast(image: Image.Image, value: float, corner: tuple[float, float]) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(value)


def _saturation(image: Image.Image, value: float, corner: tuple[float, float]) -> Image.Image:
    return ImageEnhance.Color(image).enhance(value)


_MAKE = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "blur": _blur,
    "cutout": _cutout,
    "jpeg": _jpeg,
}
