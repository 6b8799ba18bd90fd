"""The way from stored bytes to network input: decode, resize, crop, flip, normalise.

It needs NumPy and Pillow only. Images stay uint8 [H, W, 3] until the last step, which makes them
float32 in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import ExifTags, Image

from sdjax.data.config import MAX_PIXELS
from sdjax.data.image_files import ImageError, damaged, open_image

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


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An image as a network takes it, and the numbers about it that SDXL takes.

    pixels: uint8 [H, W, 3].
    size: int32 [4], height and width of the original, then top and left of the crop. These are in
    pixels of the resized picture as it is shown: mirrored, if it was.
    """

    pixels: np.ndarray
    size: np.ndarray

    @property
    def image(self) -> np.ndarray:
        """The image, float32 [H, W, 3] in [-1, 1]."""
        return normalise(self.pixels)


def prepare(
    image: np.ndarray | Image.Image, rng: np.random.Generator, *, height: int, width: int,
    crop: str, flip: bool, mirror: bool = False, original: tuple[int, int] | None = None,
) -> Prepared:  # fmt: skip
    """Resize an RGB picture to cover height x width, crop it, and perhaps mirror it.

    image: uint8 [H, W, 3] or Pillow's. flip: mirror it with probability 1/2; mirror: always.
    original: its height and width before it was stored smaller, which SDXL takes instead of the
    size. All randomness is rng's, which the pipeline seeds by the place in the stream.
    """
    stored = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
    size = covering_size(stored, height, width)
    top, left = crop_corner(size, height, width, rng if crop == "random" else None)
    cut = resized_crop(image, size, (top, left), height, width)
    if mirror or (flip and rng.random() < 0.5):
        cut = cut[:, ::-1]
        left = size[1] - width - left  # the crop's position in the mirrored picture
    return Prepared(cut, np.array([*(original or stored), top, left], np.int32))
