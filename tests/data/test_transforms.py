"""Decoding of every kind of image file, and the geometry of what follows."""

import io

import numpy as np
import pytest
from PIL import Image

from sdjax.data import transforms
from sdjax.data.transforms import ImageError, decode


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    return Image.fromarray(pixels)


def test_png_is_lossless(picture):
    assert (decode(encode(picture)) == np.asarray(picture)).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16", "I"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.fromarray(np.full((8, 8), 255, np.uint8))
    if mode.startswith("I"):
        kind = np.uint16 if mode == "I;16" else np.int32
        image = Image.fromarray((np.asarray(grey).astype(kind) * 257).astype(kind))
    else:
        image = grey.convert("RGB").convert(mode) if mode != "LA" else grey.convert("LA")
    rgb = decode(encode(image, "TIFF" if mode in ("CMYK", "I") else "PNG"))
    assert rgb.shape == (8, 8, 3) and rgb.dtype == np.uint8
    assert (rgb == 255).all()


def test_sixteen_bits_are_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], np.uint16))
    assert decode(encode(image))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_is_refused():
    with pytest.raises(ImageError, match="unsupported_mode"):
        decode(encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


def test_alpha_is_composited_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 0] = 255  # red, also where it is transparent
    rgba[0, :, 3] = 255
    rgba[1, 0, 3] = 128
    decoded = decode(encode(Image.fromarray(rgba)))
    assert decoded[0, 0].tolist() == [255, 0, 0]
    assert decoded[1, 1].tolist() == [255, 255, 255]
    assert abs(int(decoded[1, 0, 1]) - 127) <= 1


def test_transparent_palette_index_and_rgb_key_are_white():
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert (decode(encode(palette, transparency=0)) == 255).all()
    key = Image.new("RGB", (2, 2), (1, 2, 3))
    assert (decode(encode(key, transparency=(1, 2, 3))) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # a white corner at the top left
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1],
            4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
            6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
            8: lambda a: np.rot90(a, -1)}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    for kind, options in (("JPEG", {"quality": 100}), ("PNG", {}), ("WEBP", {"lossless": True})):
        decoded = decode(encode(stored, kind, exif=exif, **options))
        assert decoded.shape == (16, 32, 3)
        assert np.abs(decoded.astype(int) - upright).max() < 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_broken_exif_is_ignored(picture, exif):
    assert decode(encode(picture, "JPEG", exif=exif)).shape == (12, 20, 3)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    gif = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(gif)[0, 0].tolist() == [255, 0, 0]


def test_unusable_files_say_why(picture):
    png, jpeg = encode(picture), encode(picture.resize((200, 200)), "JPEG")
    broken = bytearray(encode(picture.resize((200, 200))))
    broken[len(broken) // 2] ^= 0xFF
    cases = {
        "empty_file": b"",
        "not_an_image": b"<html>404</html>",
        "unsupported_format": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "truncated": jpeg[: len(jpeg) // 2],
        "corrupt": bytes(broken),
    }
    for reason, encoded in cases.items():
        with pytest.raises(ImageError) as caught:
            decode(encoded)
        assert caught.value.reason == reason, (reason, str(caught.value))
    with pytest.raises(ImageError, match="too_many_pixels: 20x12; at most 100"):
        decode(png, max_pixels=100)


@pytest.mark.parametrize("shape", [(64, 64), (64, 100), (100, 64), (48, 36), (333, 97)])
def test_short_side_becomes_the_resolution(shape):
    resized = transforms.covering_size(shape, 64, 64)
    assert min(resized) == 64
    assert max(resized) == round(64 * max(shape) / min(shape))


def test_a_picture_of_the_right_size_is_not_copied():
    image = np.random.default_rng(0).integers(0, 256, (64, 100, 3), np.uint8)
    cut = transforms.resized_crop(image, (64, 100), (0, 9), 64, 64)
    assert np.shares_memory(cut, image) and (cut == image[:, 9:73]).all()


def test_resizing_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    resized = transforms.resized_crop(stripes, (64, 64), (0, 0), 64, 64)
    assert np.abs(resized.astype(int) - 127)[:, 4:-4].max() < 4


@pytest.mark.parametrize(
    "shape, wanted, covers",
    [((100, 200), (64, 96), (64, 128)), ((200, 100), (64, 96), (192, 96)), ((30, 90), (64, 192),
     (64, 192)), ((101, 67), (64, 48), (72, 48))],
)  # fmt: skip
def test_a_picture_covers_its_rectangle_and_keeps_its_aspect(shape, wanted, covers):
    assert transforms.covering_size(shape, *wanted) == covers


@pytest.mark.parametrize("height, width", [(32, 32), (48, 24), (24, 48), (100, 90)])
@pytest.mark.parametrize("shape", [(61, 61), (50, 97), (97, 50), (300, 101), (33, 32), (20, 150)])
def test_a_crop_is_that_of_the_whole_resized_picture(shape, height, width):
    """To the bit, wherever it lies, up and down in size, from arrays and from Pillow's images."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    size = transforms.covering_size(shape, height, width)
    whole = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))
    spare = size[0] - height, size[1] - width
    for part in (0, 0.3, 0.5, 1):
        top, left = (int(part * s) for s in spare)
        for given in (image, Image.fromarray(image)):
            cut = transforms.resized_crop(given, size, (top, left), height, width)
            assert (cut == whole[top : top + height, left : left + width]).all()


def test_crops():
    size = (10, 7)
    assert transforms.crop_corner(size, 4, 4) == (3, 1)
    rng = np.random.default_rng(0)
    corners = {transforms.crop_corner(size, 4, 4, rng) for _ in range(400)}
    assert corners == {(top, left) for top in range(7) for left in range(4)}


def test_normalise_spans_minus_one_to_one():
    every = np.arange(256, dtype=np.uint8)
    expected = every.astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert (transforms.normalise(every) == expected).all()
    assert transforms.normalise(np.array([0, 255], np.uint8)).tolist() == [-1.0, 1.0]
    assert transforms.normalise(np.zeros((1,), np.uint8)).dtype == np.float32


def test_prepare_flips_half_of_the_time():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4] = 255
    rng = np.random.default_rng(0)
    square = {"height": 8, "width": 8, "crop": "center"}
    flipped = [transforms.prepare(image, rng, **square, flip=True).image[0, 0, 0] < 0
               for _ in range(300)]  # fmt: skip
    assert 110 < sum(flipped) < 190
    still = transforms.prepare(image, rng, **square, flip=False).image
    assert still.shape == (8, 8, 3) and still[0, 0, 0] == 1


def test_sizes_and_crops_by_hand():
    """40 x 90 halved is 20 x 45; a crop of 16 x 16 out of its middle begins at (2, 14)."""
    image = np.zeros((40, 90, 3), np.uint8)
    half = {"height": 20, "width": 16, "crop": "center"}
    sizes = {tuple(transforms.prepare(image, np.random.default_rng(i), **half, flip=True).size)
             for i in range(20)}  # fmt: skip
    assert sizes == {(40, 90, 0, 14), (40, 90, 0, 45 - 16 - 14)}


def test_the_recorded_crop_is_the_crop_of_the_mirrored_picture():
    """Cutting there out of the whole resized picture, mirrored or not, gives the same pixels."""
    image = np.random.default_rng(0).integers(0, 256, (33, 70, 3), np.uint8)
    whole = np.asarray(Image.fromarray(image).resize((51, 24), Image.Resampling.LANCZOS))
    mirrored = set()
    for i in range(30):
        rng = np.random.default_rng(i)
        made = transforms.prepare(image, rng, height=24, width=16, crop="random", flip=True)
        assert made.size.dtype == np.int32 and tuple(made.size[:3]) == (33, 70, 0)
        left = made.size[3]
        plain, other = (transforms.normalise(p[:, left : left + 16]) for p in
                        (whole, whole[:, ::-1]))  # fmt: skip
        assert (made.image == plain).all() or (made.image == other).all()
        mirrored.add(bool((made.image == other).all()))
    assert mirrored == {True, False}
