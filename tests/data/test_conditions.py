"""Conditions made of the main picture: Canny as OpenCV's, and where they come into a batch."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from sdjax.config import default, resolve
from sdjax.data import conditions, transforms
from sdjax.data.named_images import NamedImage, stored
from sdjax.data.pipeline import make_iterator
from sdjax.data.transforms import Made
from sdjax.errors import UserError

# np.packbits(cv2.Canny(picture, 100, 200) > 0), of OpenCV 5.0.0, for the picture below.
CANNY = (
    "041040041040041040fbf7bf001000041040041040fbffbf"
    "040840041040041040fdefbf041840041040041040041040"
)


def fields():
    """A picture of 4 x 4 fields of one colour each, uint8 [16, 24, 3]."""
    small = np.random.default_rng(7).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((24, 16), Image.Resampling.NEAREST))


def noise(seed=0, size=(40, 56)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def test_canny_is_that_of_opencv():
    expected = np.unpackbits(np.frombuffer(bytes.fromhex(CANNY), np.uint8)).reshape(16, 24)
    found = conditions.canny(fields())
    np.testing.assert_array_equal(found, np.repeat(255 * expected[..., None], 3, axis=-1))


def test_soft_edges_are_the_length_of_sobels_gradient():
    luma = np.asarray(Image.fromarray(noise()).convert("L")).astype(np.float64)
    dx, dy = (ndimage.sobel(luma, axis=axis, mode="nearest") for axis in (1, 0))
    expected = np.clip(np.round(np.hypot(dx, dy) / 4), 0, 255)
    np.testing.assert_array_equal(conditions.soft_edges(noise())[..., 1], expected)


def test_coarse_conditions_keep_the_mean_colours():
    picture = np.full((64, 48, 3), (10, 90, 200), np.uint8)
    for name in ("blur", "tile", "colour"):
        np.testing.assert_array_equal(conditions.CONDITIONS[name](picture), picture)
    mosaic = conditions.colour(noise(size=(48, 63)))  # fields of 3 x 3 pixels
    means = noise(size=(48, 63)).reshape(16, 3, 21, 3, 3).mean((1, 3))
    assert np.abs(mosaic[1::3, 1::3] - means).max() <= 1.0  # rounded to 8 bits twice
    grey = conditions.grey(noise())
    assert np.all(grey[..., 0] == grey[..., 2])


@pytest.mark.parametrize("name", conditions.CONDITIONS)
@pytest.mark.parametrize("size", [(5, 7), (16, 16), (33, 64)])
def test_every_condition_is_a_picture_of_the_same_size(name, size):
    made = conditions.CONDITIONS[name](noise(size=size))
    assert made.shape == (*size, 3) and made.dtype == np.uint8


def test_a_condition_is_made_of_the_final_pixels():
    rng = np.random.default_rng(1)
    prepared = transforms.prepare(
        noise(), rng, height=24, width=24, crop="random", flip=True, mirror=True,
        images={"control": Made("canny")},
    )  # fmt: skip
    np.testing.assert_array_equal(prepared.images["control"], conditions.canny(prepared.pixels))


def test_a_batch_of_a_dataset_without_conditions_has_them(shapes_dir):
    c = default(method="control")
    c.data.update(
        data_dir=str(shapes_dir), resolution=16, batch_size=4, shapes_train=40, shapes_test=8,
        threads=1, images=({"name": "control", "kind": "condition", "made": "canny"},),
    )  # fmt: skip
    data = make_iterator(resolve(c).data, {}, split="train", seed=0)
    batch = next(data)
    data.close()
    pixels = np.round((batch["image"] + 1) * 127.5).astype(np.uint8)
    for picture, control in zip(pixels, batch["control"], strict=True):
        np.testing.assert_array_equal(control, conditions.canny(picture) / np.float32(255))
    assert batch["control"].max() == 1.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"made": "hed"}, "made is 'hed'; expected '' or one of .'canny'"),
        ({"made": "canny", "kind": "mask"}, "expected the kind 'condition' and no key"),
        ({"made": "canny", "kind": "condition", "key": "edge"}, "and no key"),
    ],
)
def test_conditions_that_cannot_be_made_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        NamedImage("control", **fields)


def test_made_conditions_are_not_read():
    read = NamedImage("before")
    made = dataclasses.replace(read, name="control", kind="condition", made="grey")
    assert stored((read, made)) == (read,)
