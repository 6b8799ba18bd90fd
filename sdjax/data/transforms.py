"""From stored bytes to network input: decode, resize, crop, flip, normalise. NumPy and Pillow only.

Images stay uint8 [H, W, 3] until the last step, which makes them float32 in [-1, 1].
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000
CROPS = ("center", "random")


class ImageError(ValueError):
    """An image that cannot be used; `reason` is a short word for counting, the text says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def decode(encoded: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image file by its content -> uint8 [H, W, 3].

    EXIF orientation is applied, alpha composited on white, 16 bits scaled to 8, every other mode
    converted to RGB, and the first frame taken of an animation.

    Raises ImageError: empty_file, not_an_image, unsupported_format, unsupported_mode,
    too_many_pixels (refused before decoding), truncated, corrupt.
    """
    image = open_image(encoded, max_pixels=max_pixels)
    try:
        image.load()
        return np.asarray(to_rgb(_upright(image)))
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, IndexError, struct.error, zlib.error) as error:
        # Pillow's decoders raise any of these on damaged data.
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise ImageError(reason, str(error) or type(error).__name__) from error


def open_image(encoded: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image file and checks its header without decoding it. Raises ImageError."""
    if not encoded:
        raise ImageError("empty_file", "zero bytes")
    try:
        image = Image.open(io.BytesIO(encoded))
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from error
    except UnidentifiedImageError as error:
        if b"<svg" in encoded[:1024]:
            raise ImageError("unsupported_format", "SVG; convert it to PNG") from error
        raise ImageError("not_an_image", f"starts with {encoded[:8]!r}") from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise ImageError("corrupt", str(error)) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_many_pixels", f"{width}x{height}; at most {max_pixels} are read")
    return image


def is_plain_rgb(image: Image.Image) -> bool:
    """Whether the stored pixels are what training should see: RGB, upright, a single frame."""
    return (
        image.mode == "RGB"
        and image.format in ("PNG", "JPEG", "WEBP")
        and "transparency" not in image.info
        and "exif" not in image.info
        and getattr(image, "n_frames", 1) == 1
    )


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; a broken EXIF block or an unknown value is ignored."""
    if image.format == "PNG" and "exif" not in image.info:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, alpha on white. Raises ImageError for floating-point images."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError("unsupported_mode", "floating-point pixels; convert to 8 bits")
    if image.mode.startswith("I"):  # 16 bits, or 32 holding 16: scale, where convert() would clip
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


def resize_short_side(image: np.ndarray, side: int) -> np.ndarray:
    """Scales so that the short side is `side`, antialiased (Lanczos); no copy if it is already."""
    height, width = image.shape[:2]
    if min(height, width) == side:
        return image
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def crop_square(image: np.ndarray, side: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Cuts [side, side, 3] out of the middle, or with rng from anywhere, evenly likely."""
    height, width = image.shape[:2]
    if rng is None:
        top, left = (height - side) // 2, (width - side) // 2
    else:
        top = int(rng.integers(height - side + 1))
        left = int(rng.integers(width - side + 1))
    return image[top : top + side, left : left + side]


def normalise(image: np.ndarray) -> np.ndarray:
    """uint8 0..255 -> float32 -1..1"""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def prepare(
    image: np.ndarray, rng: np.random.Generator, *, resolution: int, crop: str, flip: bool
) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [resolution, resolution, 3] in [-1, 1].

    All randomness is rng's, which the pipeline seeds by the element's place in the epoch.
    """
    image = resize_short_side(image, resolution)
    image = crop_square(image, resolution, rng if crop == "random" else None)
    if flip and rng.random() < 0.5:
        image = image[:, ::-1]
    return normalise(image)
