"""The preprocessing of pictures for CLIP: as CLIPImageProcessor has it, and on devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.errors import UserError
from sdjax.system import untrusted
from sdjax.system.untrusted import brief

_MOST_SIDE = 4096  # largest side that pictures are resized to; CLIP's have 224 to 448
# OpenAI CLIP, clip/clip.py `_transform`; the defaults of transformers.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(
    images: jax.Array, side: int, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """Return the middle square of pictures [B, H, W, 3] in [0, 1], [B, side, side, 3] normalised.

    Pillow's bicubic filter: Keys' coefficient -1/2, a wider support where it makes a picture
    smaller, rows first and clipped between; without its rounding to whole numbers.
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    x = images[:, top : top + short, left : left + short]
    for shape in ((short, side), (side, side)):
        x = jax.image.resize(x, (len(x), *shape, x.shape[-1]), "cubic")
        x = jnp.clip(x, 0.0, 1.0)
    return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


@dataclasses.dataclass(frozen=True)
class ClipPreprocess:
    """The preprocessing of CLIPImageProcessor: resize, crop the middle, [0, 1], normalise.

    size: of the shorter side, or (height, width); None does not resize.
    crop: (height, width) of the middle, or None.
    resample: Pillow's number of the filter, 3 for bicubic. It works on uint8, with antialiasing.
    """

    size: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    resample: int = 3
    scale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> ClipPreprocess:
        """Read a `preprocessor_config.json` of any version.

        Raises:
            UserError: a field is not valid; the message names it.
        """
        from PIL.Image import Resampling

        try:
            crop = data.get("crop_size", 224) if data.get("do_center_crop", True) else None
            size = data.get("size", 224) if data.get("do_resize", True) else None
            normalize = data.get("do_normalize", True)
            found = cls(
                size=_sides_of(size, square=False),
                crop=_sides_of(crop, square=True),
                resample=int(data.get("resample", 3)),
                scale=float(data.get("rescale_factor", 1 / 255))
                if data.get("do_rescale", True)
                else 1.0,
                mean=tuple(map(float, data.get("image_mean", CLIP_MEAN))) if normalize else (0.0,),
                std=tuple(map(float, data.get("image_std", CLIP_STD))) if normalize else (1.0,),
            )
            Resampling(found.resample)
            found._check_numbers()
        except untrusted.damage() as error:
            raise UserError(
                f"{where}: not a CLIPImageProcessor ({untrusted.why(error)}); expected size, "
                "crop_size, resample, image_mean and image_std as transformers writes them"
            ) from error
        return found

    def _check_numbers(self) -> None:
        """Raise a ValueError that names a field whose number is out of range."""
        for name, value in (("size", self.size), ("crop_size", self.crop)):
            for side in () if value is None else _sides(value):
                if not 1 <= side <= _MOST_SIDE:
                    raise ValueError(f"{name} is {brief(value)}; expected 1 to {_MOST_SIDE:,}")
        if isinstance(self.crop, int):
            raise ValueError(f"crop_size is {self.crop}; expected a height and a width")
        for name, values in (("image_mean", self.mean), ("image_std", self.std)):
            least = 1e-6 if name == "image_std" else -1e6
            if len(values) not in (1, 3) or not all(least <= number <= 1e6 for number in values):
                raise ValueError(f"{name} is {brief(values)}; expected 3 numbers, none too small")
        if not 0 < self.scale <= 1e6:
            raise ValueError(f"rescale_factor is {brief(self.scale)}; expected a positive number")

    def check(self, image_size: int, where: str) -> None:
        """Raise a UserError unless pictures of any shape become squares of `image_size`."""
        out = self.crop or self.size
        large = not self.crop or self.size is None or min(_sides(self.size)) >= max(self.crop)
        if out != (image_size, image_size) or not large or self.size is None:
            raise UserError(
                f"{where}: size {self.size} and crop_size {self.crop} do not give the pictures of "
                f"{image_size}x{image_size} that the network takes (image_size in config.json)"
            )

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """Preprocess uint8 [B, H, W, 3] to float32 [B, h, w, 3]."""
        with ThreadPoolExecutor() as pool:  # Pillow resizes without holding the lock
            return np.stack(list(pool.map(self._pixels, images)))

    def _pixels(self, image: np.ndarray) -> np.ndarray:
        from PIL import Image  # here, as a step of training needs none

        height, width = image.shape[:2]
        if self.size is not None:
            if isinstance(self.size, int):
                short = min(height, width)
                height, width = (int(self.size * side / short) for side in (height, width))
            else:
                height, width = self.size
            resized = Image.fromarray(image).resize(
                (width, height), Image.Resampling(self.resample)
            )
            image = np.asarray(resized)
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            image = image[top : top + self.crop[0], left : left + self.crop[1]]
        x = image.astype(np.float32) * np.float32(self.scale)
        return (x - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


def _sides_of(value: Any, *, square: bool) -> Any:
    """The (height, width), or the shorter side, of a field; old files have a number."""
    if isinstance(value, Mapping):
        if value.get("shortest_edge") is not None:
            return int(value["shortest_edge"])
        return int(value["height"]), int(value["width"])
    return value if value is None else (int(value), int(value)) if square else int(value)


def _sides(size: int | tuple[int, int]) -> tuple[int, ...]:
    """The one or two sides of a size."""
    return (size,) if isinstance(size, int) else size
