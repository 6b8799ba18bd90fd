"""The way from stored bytes to network input: decode, resize, crop, flip, normalise.

It needs NumPy and Pillow only. Images stay uint8 [H, W, 3] until the last step, which makes them
float32 in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from PIL import ExifTags, Image

from sdjax.data.conditions import CONDITIONS
from sdjax.data.config import MAX_PIXELS
from sdjax.data.image_files import ImageError, damaged, open_image

Picture: TypeAlias = np.ndarray | Image.Image  # uint8 [H, W, 3], of a mask [H, W, 1], or Pillow's
_NONE: Mapping[str, Picture] = {}

# The operation that undoes each EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def decode(encoded: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file by its content to uint8 [H, W, 3].

    EXIF orientation is applied, alpha composited on white, and 16 bits scaled to 8. Every other
    mode is converted to RGB. Of an animation the first frame is taken.

    Raises ImageError: empty_file, git_lfs_pointer, not_an_image, unsupported_format,
    unsupported_mode, too_many_pixels (refused before decoding), truncated, corrupt.
    """
    return np.asarray(decode_image(encoded, max_pixels=max_pixels))


def decode_image(encoded: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode as `decode`, to Pillow's image, which saves two copies before a resize."""
    image = open_image(encoded, max_pixels=max_pixels)
    try:
        image.load()
        return to_rgb(upright(image))
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise any error for damaged data
        raise damaged(error) from error


def decode_mask(
    encoded: bytes, *, alpha: bool = False, orient: bool = True, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image file to a mask, Pillow's of one channel.

    Colours become their luma, and transparent pixels are black.

    Args:
        alpha: take the alpha channel, which is 255 everywhere in a picture without one.
        orient: apply the EXIF orientation.

    Raises ImageError as `decode`.
    """
    image = open_image(encoded, max_pixels=max_pixels)
    try:
        image.load()
        return _to_mask(upright(image) if orient else image, alpha=alpha)
    except ImageError:
        raise
    except Exception as error:  # as `decode_image`
        raise damaged(error) from error


def _to_mask(image: Image.Image, *, alpha: bool) -> Image.Image:
    """Convert a picture to a mask, see `decode_mask`."""
    if image.has_transparency_data and not image.mode.startswith("I"):
        rgba = image.convert("RGBA")
        if alpha:
            return rgba.getchannel("A")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
        image = image.convert("RGB")
    return Image.new("L", image.size, 255) if alpha else to_rgb(image).convert("L")


def upright_size(encoded: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The height and width of `decode`'s result, from the header alone. Raises ImageError."""
    image = open_image(encoded, max_pixels=max_pixels)
    width, height = image.size
    if image.format == "TIFF":  # Pillow may have turned the size of a TIFF already
        width, height = (image.tag_v2[tag] for tag in (256, 257))  # type: ignore[attr-defined]
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def is_plain_rgb(image: Image.Image) -> bool:
    """Whether the stored pixels are those of `decode`: RGB, upright, a single frame."""
    return (
        image.mode == "RGB"
        and image.format in ("PNG", "JPEG", "WEBP")
        and "transparency" not in image.info
        and not is_turned(image)
        and getattr(image, "n_frames", 1) == 1
    )


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation asks for the pixels to be turned or mirrored."""
    return _orientation(image) in _TURNS


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, if there is none that can be read."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises any error for a broken EXIF block, which is ignored
        return 1


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a broken EXIF block or an unknown value is ignored.

    Pillow's own `exif_transpose` also copies the block, with all the bytes that it points to.
    """
    orientation = _orientation(image)
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, with alpha on white. Raises ImageError for floating-point images."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError("unsupported_mode", "floating-point pixels; convert to 8 bits")
    if image.mode.startswith("I"):  # 16 bits, or 32 holding 16: convert() would clip, not scale
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("unsupported_mode", "32-bit pixels; convert to 8 bits")
        eight = np.round(values / 257).astype(np.uint8) if values.max() > 255 else values
        return Image.fromarray(eight.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def covering_size(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """The height and width of a picture of `size`, scaled until it just covers height x width."""
    scale = max(height / size[0], width / size[1])
    return max(height, round(size[0] * scale)), max(width, round(size[1] * scale))


def crop_corner(
    size: tuple[int, int], height: int, width: int, rng: np.random.Generator | None = None
) -> tuple[int, int]:
    """The top and left of a crop out of the middle, or with rng of a uniformly random one."""
    spare = size[0] - height, size[1] - width
    if rng is None:
        return spare[0] // 2, spare[1] // 2
    return int(rng.integers(spare[0] + 1)), int(rng.integers(spare[1] + 1))


def resized_crop(
    image: np.ndarray | Image.Image, size: tuple[int, int], corner: tuple[int, int], height: int,
    width: int,
) -> np.ndarray:  # fmt: skip
    """Resize a picture to `size` (Lanczos, antialiased) and crop height x width from `corner`.

    The result equals Pillow's resize and a crop, bit for bit. Pillow resizes the rows first and
    then the columns, with 8 bits between, so the parts outside of the crop can be left out before.
    (The `box` of Pillow's resize would save more, but shifts the samples by the rounding of a
    float32.) An array that has the size already is neither resized nor copied.
    """
    (top, left), (rows, columns) = corner, size
    if isinstance(image, np.ndarray):
        if image.shape[:2] == size:
            return image[top : top + height, left : left + width]
        image = Image.fromarray(image)
    if columns != image.width:
        image = _rows_resized(image, size, top, height)
    if columns != width:
        image = image.crop((left, 0, left + width, image.height))
    if rows != image.height:
        image = image.resize((width, rows), Image.Resampling.LANCZOS)
    return np.asarray(image)[top : top + height]


def _rows_resized(image: Image.Image, size: tuple[int, int], top: int, height: int) -> Image.Image:
    """Resize every row to size[1] pixels; rows that do not matter to the crop are black."""
    rows, columns = size
    scale = image.height / rows
    support = 3 * max(scale, 1) + 2  # that of Lanczos; more does no harm
    first = max(0, math.floor(top * scale - support))
    last = min(image.height, math.ceil((top + height) * scale + support))
    if (first, last) == (0, image.height):
        return image.resize((columns, image.height), Image.Resampling.LANCZOS)
    some = image.crop((0, first, image.width, last))
    whole = Image.new("RGB", (columns, image.height))
    whole.paste(some.resize((columns, last - first), Image.Resampling.LANCZOS), (0, first))
    return whole


def normalise(image: np.ndarray) -> np.ndarray:
    """Convert uint8 0..255 to float32 -1..1, of the same shape."""
    scaled = np.divide(image, np.float32(127.5), dtype=np.float32)
    scaled -= np.float32(1)
    return scaled


def scaled(values: np.ndarray) -> np.ndarray:
    """Convert uint8 0..255 to float32 0..1, of the same shape."""
    return np.divide(values, np.float32(255), dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Made:
    """Stands in for a picture that is made of the main one when that has its final pixels.

    condition: a name of `CONDITIONS`.
    """

    condition: str

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """Return the picture made of pixels, uint8 [*frames, H, W, 3]."""
        if pixels.ndim > 3:
            return np.stack([self.of(frame) for frame in pixels])
        return CONDITIONS[self.condition](np.ascontiguousarray(pixels))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An image as a network takes it, and the numbers about it that SDXL takes.

    pixels: uint8 [*frames, H, W, 3].
    size: int32 [4], height and width of the original, then top and left of the crop. These are in
    pixels of the resized picture as it is shown: mirrored, if it was.
    images: those of `prepare`, uint8 [*frames, H, W, 3] and of masks [*frames, H, W, 1].
    mirrored: whether left and right have changed places.
    """

    pixels: np.ndarray
    size: np.ndarray
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    mirrored: bool = False

    @property
    def image(self) -> np.ndarray:
        """The image, float32 of the same shape in [-1, 1]."""
        return normalise(self.pixels)


class Warp(Protocol):
    """Changes the geometry of a picture that has its final size."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return a picture of the same shape, uint8 [H, W, 3], of a mask [H, W, 1]."""


def prepare(
    image: Picture | Sequence[Picture], rng: np.random.Generator, *, height: int, width: int,
    crop: str, flip: bool, mirror: bool = False, original: tuple[int, int] | None = None,
    images: Mapping[str, Picture | Sequence[Picture] | Made] = _NONE, warp: Warp | None = None,
) -> Prepared:  # fmt: skip
    """Resize an RGB picture to cover height x width, crop it, and perhaps mirror it.

    image: uint8 [H, W, 3] or Pillow's; or a sequence of those, the frames of one picture, which
    share one crop and one flip. flip: mirror it with probability 1/2; mirror: always.
    original: its height and width before it was stored smaller, which SDXL takes instead of the
    size. images: other pictures and masks, which get the same window, crop and flip.
    warp: what becomes of each of them then.
    All randomness is rng's, which the pipeline seeds by the place in the stream.
    Raises ImageError size_differs: a frame or one of `images` has another aspect.
    """
    stored = size_of(image)
    size = covering_size(stored, height, width)
    top, left = crop_corner(size, height, width, rng if crop == "random" else None)
    mirrored = mirror or (flip and rng.random() < 0.5)

    def cut(picture: Picture | Sequence[Picture], name: str) -> np.ndarray:
        if isinstance(picture, Sequence):
            return np.stack([cut(frame, name) for frame in picture])
        if picture is not image:
            check_geometry(name, size_of(picture), stored)
        is_mask = picture.mode == "L" if isinstance(picture, Image.Image) else (
            picture.shape[-1] == 1)  # fmt: skip
        part = (_mask_crop if is_mask else resized_crop)(picture, size, (top, left), height, width)
        part = part[:, ::-1] if mirrored else part
        return part if warp is None else warp(part)

    pixels = cut(image, "a frame")
    others = {
        name: other.of(pixels) if isinstance(other, Made) else cut(other, name)
        for name, other in images.items()
    }
    if mirrored:
        left = size[1] - width - left  # the crop's position in the mirrored picture
    size_and_corner = np.array([*(original or stored), top, left], np.int32)
    return Prepared(pixels, size_and_corner, others, mirrored)


def size_of(image: Picture | Sequence[Picture]) -> tuple[int, int]:
    """The height and width of a picture, or of the first of its frames."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, Sequence):
        return size_of(image[0])
    return image.shape[0], image.shape[1]


def check_geometry(name: str, size: tuple[int, int], main: tuple[int, int]) -> None:
    """Raise an ImageError size_differs unless two pictures differ by a uniform scale alone.

    The larger one, scaled to the width or to the height of the smaller, may be off by a pixel.
    """
    small, large = sorted((size, main))
    ratios = small[0] / large[0], small[1] / large[1]
    fits = (abs(large[1] * ratios[0] - small[1]) <= 1, abs(large[0] * ratios[1] - small[0]) <= 1)
    if not any(fits):
        raise ImageError(
            "size_differs",
            f"{name} is {size[1]}x{size[0]}, the picture {main[1]}x{main[0]}; expected one aspect",
        )


def _mask_crop(
    mask: Picture, size: tuple[int, int], corner: tuple[int, int], height: int, width: int
) -> np.ndarray:
    """Resize a mask to `size` and crop it: uint8 [height, width, 1].

    A pixel is the mean of the area it covers, so values never leave the range of the mask. An
    enlarged mask keeps its hard edges.
    """
    (top, left), (rows, columns) = corner, size
    image = Image.fromarray(mask[..., 0]) if isinstance(mask, np.ndarray) else mask
    if (image.height, image.width) != size:
        image = image.resize((columns, rows), Image.Resampling.BOX)
    return np.asarray(image)[top : top + height, left : left + width, None]
