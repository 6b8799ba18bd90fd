"""The opening of pictures: the only module that gives bytes to Pillow, and the formats it reads.

Pillow reads some forty formats. For one of them, EPS, it starts Ghostscript, which runs the file as
a program. Others hold a picture of another size than their header says, or are rare.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from sdjax.data import image_tags
from sdjax.data.config import MAX_PIXELS
from sdjax.system import paths, text_files, untrusted

# An MPO is a JPEG followed by others; it is opened as a JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # beyond it Pillow reports a decompression bomb
MOST_BYTES = 256 << 20  # of an encoded picture: 50 megapixels uncompressed are 200 MB
# The most scans of a JPEG, those of its preview included. A progressive JPEG has some 10. However
# short, each scan costs time in proportion to the whole picture.
MOST_SCANS = 100
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# The beginnings of files in known formats that are not read. JPEG XL: ISO/IEC 18181-2.
_OTHERS = (
    (b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"), (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"), (b"%PDF", "PDF"), (b"\0\0\1\0", "ICO"), (b"\0\0\2\0", "TGA"),
    (b"icns", "ICNS"), (b"8BPS", "PSD"), (b"DDS ", "DDS"), (b"BLP1", "BLP"), (b"BLP2", "BLP"),
    (b"qoif", "QOI"), (b"\1\xda", "SGI"), (b"SIMPLE  =", "FITS"), (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"\x59\xa6\x6a\x95", "Sun raster"), (b"/* XPM", "XPM"), (b"#define", "XBM"),
    *((b"P%d" % n, "PPM") for n in range(1, 8)), (b"\x0a\5\1", "PCX"), (b"II\xbc", "JPEG XR"),
)  # fmt: skip

# Pillow warns of broken EXIF blocks, which are ignored here.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class ImageError(ValueError):
    """An image that cannot be used; `reason` is a short word for counting, `detail` explains it."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def damaged(error: Exception) -> ImageError:
    """The ImageError for an error of a decoder."""
    text = " ".join(str(error).split())[:200]
    reason = "truncated" if "truncated" in text.lower() else "corrupt"
    return ImageError(reason, f"{type(error).__name__}: {text}" if text else type(error).__name__)


def open_image(encoded: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image file and check its header without decoding it.

    Raises ImageError: empty_file, git_lfs_pointer, not_an_image, unsupported_format,
    too_many_pixels, truncated, corrupt.
    """
    if not encoded:
        raise ImageError("empty_file", "zero bytes")
    try:
        _check_before(encoded)
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _check_after(image, max_pixels)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from error
    except UnidentifiedImageError as error:
        if text_files.is_pointer(encoded):
            raise ImageError("git_lfs_pointer", text_files.POINTER) from error
        if kind := _other_format(encoded):
            raise ImageError("unsupported_format", f"{kind}; convert it to PNG") from error
        raise ImageError("not_an_image", f"starts with {encoded[:8]!r}") from error
    except Exception as error:  # Pillow's readers raise any error for damaged data
        raise damaged(error) from error
    return image


def read_image(path: paths.PathLike, *, max_pixels: int = MOST_PIXELS) -> Image.Image:
    """The decoded picture of a file, in the mode of the file.

    Raises ImageError as `open_image`, UserError if it is no regular file or has more than
    `MOST_BYTES`, and OSError if it cannot be read.
    """
    image = open_image(read_encoded(path), max_pixels=max_pixels)
    try:
        image.load()
    except Exception as error:
        raise damaged(error) from error
    return image


def read_encoded(path: paths.PathLike) -> bytes:
    """The bytes of a picture's file. Raises UserError and OSError as `read_image`."""
    return untrusted.read_bytes(path, min(MOST_BYTES, max(untrusted.check_regular(path), 1)))


def _other_format(encoded: bytes) -> str:
    """The name of a known format that is not read; "" for other files."""
    if b"<svg" in encoded[:1024]:
        return "SVG"
    if encoded[4:8] == b"ftyp" and encoded[8:12] in _HEIF_BRANDS:
        return "HEIC"
    return next((name for start, name in _OTHERS if encoded.startswith(start)), "")


def _check_before(encoded: bytes) -> None:
    """Refuse a file whose header alone would cost Pillow too much."""
    if image_tags.is_tiff(encoded):
        image_tags.check(encoded)
    elif encoded.startswith(b"\xff\xd8\xff"):
        exif, single = image_tags.jpeg_head(encoded)
        if exif:
            image_tags.check_exif(exif)
        if not single and (scans := _scans(encoded)) > MOST_SCANS:
            raise ImageError("corrupt", f"a JPEG of {scans:,} scans; at most {MOST_SCANS} are read")


def _scans(encoded: bytes) -> int:
    """The number of times that a JPEG's start-of-scan marker occurs, at even and at odd places."""
    views = (np.frombuffer(encoded, "<u2", (len(encoded) - at) // 2, at) for at in (0, 1))
    return sum(int(np.count_nonzero(view == 0xDAFF)) for view in views)


def _check_after(image: Image.Image, max_pixels: int) -> None:
    """Refuse an opened picture with too many pixels or costly tags."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_many_pixels", f"{width}x{height}; at most {max_pixels} are read")
    exif = image.info.get("exif", b"")
    if image.format not in ("JPEG", "MPO") and exif:
        image_tags.check_exif(exif)
    image.info.pop("Raw profile type exif", None)  # ImageMagick's EXIF, in hexadecimal
    if image.format == "TIFF":
        wide, high = (image.tag_v2.get(tag, 0) for tag in (322, 323))  # type: ignore[attr-defined]
        if wide * high > max(max_pixels, width * height):
            raise ImageError("too_many_pixels", f"tiles of {wide}x{high}")
