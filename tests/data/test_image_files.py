"""Pictures from strangers: what is opened, what is refused before it costs anything, and why."""

import ast
import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

import sdjax
from sdjax.data import image_files, image_tags
from sdjax.data.image_files import FORMATS, MOST_SCANS, ImageError, open_image, read_image
from sdjax.data.raw.clean import Example, Rules, checked, clean
from sdjax.data.raw.rows import Row, Skip
from sdjax.data.transforms import decode, upright_size

PACKAGE = Path(sdjax.__file__).parent
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n"
    b"(/tmp/escaped) (w) file closefile showpage\n%%EOF\n"
)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height=32, width=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def reason(data, read=decode, **options):
    with pytest.raises(ImageError) as caught:
        read(data, **options)
    return caught.value.reason


def test_no_other_file_of_the_package_opens_a_picture():
    """Neither `Image.open` nor anything else of Pillow that chooses a reader by the bytes."""
    openers = {"open", "preinit", "init", "Parser"}
    for file in PACKAGE.rglob("*.py"):
        if file == Path(image_files.__file__):
            continue
        text = file.read_text()
        for node in ast.walk(ast.parse(text)) if "PIL" in text else ():
            if isinstance(node, ast.Attribute) and node.attr in openers:
                owner = node.value
                assert not (isinstance(owner, ast.Name) and owner.id in ("Image", "ImageFile")), (
                    file, node.lineno)  # fmt: skip
            if isinstance(node, ast.ImportFrom) and node.module in ("PIL.Image", "PIL.ImageFile"):
                assert not openers & {alias.name for alias in node.names}, file
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("PIL") for alias in node.names), file
    text = Path(image_files.__file__).read_text()
    assert text.count("Image.open(") == 1 and "formats=FORMATS" in text


def test_eps_called_a_png_starts_no_ghostscript(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    (tmp_path / "a.png").write_bytes(EPS)
    dos = b"\xc5\xd0\xd3\xc6" + struct.pack("<LLLLLLH", 30, len(EPS), 0, 0, 0, 0, 0xFFFF) + EPS
    for data in (EPS, dos):
        assert reason(data) == reason(data, upright_size) == "unsupported_format"
        found = clean(Row("a", "train", data, "text"), Rules())
        assert (found.reason, found.detail) == ("unsupported_format", "EPS; convert it to PNG")
    with pytest.raises(ImageError, match="EPS"):
        read_image(tmp_path / "a.png")
    assert not started


@pytest.mark.parametrize("kind", ["ICO", "PCX", "DDS", "SGI", "PPM", "XBM", "TGA", "QOI"])
def test_format_that_is_not_listed_is_not_opened(kind):
    image = noise(32, 32).convert("1" if kind == "XBM" else "RGB")
    try:
        data = encoded(image, kind)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow does not write {kind}")
    assert reason(data, open_image) == "unsupported_format"


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "MPO"]
)
def test_format_that_is_listed_is_read_as_pillow_reads_it(kind):
    data = encoded(noise(), kind)
    assert kind in FORMATS or kind == "MPO"
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)
    assert upright_size(data) == (32, 40)


@pytest.mark.parametrize("kind", ["AVIF", "TIFF", "JPEG2000", "PNG", "GIF", "WEBP", "JPEG"])
@pytest.mark.parametrize("error", [RuntimeError, KeyError, ZeroDivisionError, MemoryError])
def test_whatever_a_decoder_raises_counts_as_corrupt_with_its_type(kind, error, monkeypatch):
    data = encoded(noise(), kind)
    opened = type(Image.open(io.BytesIO(data)))

    def broken(self, *args):
        raise error("of its own")

    for method in ("load", "_open"):
        with monkeypatch.context() as patched:
            patched.setattr(opened, method, broken)
            found = clean(Row("a", "train", data, "text"), Rules())
        assert isinstance(found, Skip)
        # Pillow takes a LookupError in a reader for a picture of another format.
        assert found.reason in ("corrupt", "not_an_image")
        if method == "load":
            assert found.reason == "corrupt" and error.__name__ in found.detail


def bomb(tags, size, big=False):
    """A TIFF directory of so many tags, all of which point to the same bytes."""
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) if big else b"II*\0" + struct.pack("<L", 8)
    entry, count = ("<HHQQ", "<Q") if big else ("<HHLL", "<H")
    at = len(head) + struct.calcsize(count) + tags * struct.calcsize(entry) + 8
    entries = b"".join(struct.pack(entry, 40_000 + n, 7, size, at) for n in range(tags))
    return head + struct.pack(count, tags) + entries + bytes(8) + bytes(size)


def with_exif(exif):
    """A JPEG with EXIF in as many segments as it takes."""
    data = encoded(noise(), "JPEG")
    parts = (exif[at : at + 65_000] for at in range(0, len(exif), 65_000))
    segments = (b"\xff\xe1" + struct.pack(">H", len(p) + 8) + b"Exif\0\0" + p for p in parts)
    return data[:2] + b"".join(segments) + data[2:]


@pytest.mark.parametrize("big", [False, True])
def test_tags_that_point_to_the_same_bytes_are_refused_before_they_are_copied(big):
    """2,000 tags of 0.5 MB in a file of 0.5 MB would be copied to a gigabyte."""
    tiff = bomb(2_000, 500_000, big)
    png = encoded(noise(), "PNG", exif=b"Exif\0\0" + tiff)
    cases = [tiff, png] if big else [tiff, png, with_exif(tiff)]
    tracemalloc.start()
    for data in cases:
        assert reason(data, upright_size) == "corrupt"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_sound_exif_of_any_format_is_kept():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description that is longer than four bytes" * 50
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + b"comment" * 200
    image_tags.check_exif(exif.tobytes())
    image_tags.check(exif.tobytes()[6:])
    assert image_tags.jpeg_head(encoded(noise(), "JPEG", exif=exif)) == (exif.tobytes()[6:], True)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):  # AVIF takes it out
        assert upright_size(encoded(noise(), kind, exif=exif)) == (40, 32), kind


def test_jpeg_of_very_many_scans_is_refused():
    data = encoded(noise(), "JPEG", progressive=True)
    assert decode(data).shape == (32, 40, 3)
    empty = bytes([0xFF, 0xDA, 0, 12, 3, 1, 0, 2, 0, 3, 0, 0, 0, 0x10])
    assert decode(data[:-2] + empty * 20 + data[-2:]).shape == (32, 40, 3)
    assert reason(data[:-2] + empty * MOST_SCANS + data[-2:]) == "corrupt"
    assert not image_tags.jpeg_head(data)[1]
    assert reason(data[:-2] + b"\0" + empty * MOST_SCANS + data[-2:]) == "corrupt"


def test_tile_larger_than_the_limit_is_refused():
    """A TIFF of 16 x 16 pixels whose one tile would be decoded to gigabytes."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 322: 60_000, 323: 60_000, 324: 8, 325: 4}
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(8)
    assert reason(data) == "too_many_pixels"


@pytest.mark.parametrize("size", [(60_000, 60_000), (8_000, 8_000)])
def test_announced_size_counts_before_anything_is_decoded(size):
    data = bytearray(encoded(noise(), "PNG"))
    data[16:24] = struct.pack(">LL", *size)
    data[29:33] = struct.pack(">L", zlib.crc32(data[12:29]))
    assert reason(bytes(data), open_image) == "too_many_pixels"


def test_orientation_is_undone_as_pillow_does_it():
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(noise(), "PNG", exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_picture_is_read_or_refused_with_a_reason():
    for seed in range(90):
        read_damaged(seed)


def read_damaged(seed):
    rng = np.random.default_rng(seed)
    kinds = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "MPO"]
    data = bytearray(encoded(noise(17, 23), kinds[seed % len(kinds)]))
    for _ in range(rng.integers(1, 12)):
        data[rng.integers(min(len(data), 200) if rng.random() < 0.5 else len(data))] = rng.integers(
            256
        )
    if rng.random() < 0.3:
        del data[int(rng.integers(len(data))) :]
    found = clean(Row("a", "train", bytes(data), "text"), Rules(min_side=1, max_aspect=0))
    assert isinstance(found, Example) or found.reason != "bad_record", found
    if isinstance(found, Example):
        assert checked(found.image, Rules(min_side=1, max_aspect=0))[0] == found.image
