"""Augmentation: Pillow's and torchvision's changes, one geometry for all, and words that fit."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import _functional_pil as torchvision

from sdjax.data import transforms
from sdjax.data.augment.changes import GREY, Changes, draw
from sdjax.data.augment.config import BOUNDS, AugmentConfig
from sdjax.data.caption_choice import Caption, CaptionConfig, says_sides, swap_sides
from sdjax.data.config import DataConfig
from sdjax.data.named_images import NamedImage
from sdjax.data.pipeline import Transform, make_iterator
from sdjax.errors import UserError
from sdjax.evaluation.metrics.fidelity import verdicts

ALL = AugmentConfig(**dict.fromkeys(BOUNDS, 0.5), labels=True)
EDGES = NamedImage("edges", kind="condition", made="canny")


class Letters:
    """A tokenizer of letters, so that tests can read the captions of a batch."""

    def encode(self, texts):
        rows = np.zeros((len(texts), 256), np.int32)
        for row, text in zip(rows, texts, strict=True):
            row[: len(text)] = [ord(letter) for letter in text]
        return rows


TOKENIZERS = {"tokens": Letters()}


def texts(batch):
    return ["".join(map(chr, row[row > 0])) for row in batch["tokens"]]


@pytest.fixture
def config(shapes_dir):
    return DataConfig(
        data_dir=str(shapes_dir), resolution=64, shapes_train=40, shapes_test=8, batch_size=8,
        threads=1,
    )  # fmt: skip


def take(config, count, *, start=0, tokenizers=TOKENIZERS, **options):
    data = make_iterator(config, tokenizers, **{"split": "train", "seed": 3, **options})
    data.set_state({**data.get_state(), "step": start})
    batches = [next(data) for _ in range(count)]
    data.close()
    return batches


def assert_equal(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def noise(height, width, channels=3, seed=0):
    shape = height, width, channels
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


# ---- geometry ---------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [-45.0, -7.3, 3.0, 30.0])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 41)])
@pytest.mark.parametrize("channels", [3, 1])
def test_a_turn_is_pillows_of_the_mirrored_surroundings(angle, height, width, channels):
    pixels = noise(height, width, channels)
    wide = np.pad(pixels, ((40, 40), (40, 40), (0, 0)), mode="symmetric")
    image = Image.fromarray(wide.squeeze())
    kind = Image.Resampling.BICUBIC if channels == 3 else Image.Resampling.BILINEAR
    want = np.asarray(image.rotate(angle, kind))[40:-40, 40:-40].reshape(pixels.shape)
    found = Changes({"rotation": angle}).warp(pixels)
    # A number that ends in .5 may be rounded to the other side: the margins differ.
    assert np.abs(found.astype(int) - want).max() <= 1 and (found == want).mean() > 0.999


@pytest.mark.parametrize("scale", [0.6, 0.9, 1.5, 2.0])
def test_a_scale_is_pillows_extent_about_the_centre(scale):
    pixels = noise(30, 22)
    wide = Image.fromarray(np.pad(pixels, ((40, 40), (40, 40), (0, 0)), mode="symmetric"))
    (x, y), (w, h) = (51, 55), (11 / scale, 15 / scale)
    box = (x - w, y - h, x + w, y + h)
    kind = Image.Resampling.BICUBIC
    want = np.asarray(wide.transform((22, 30), Image.Transform.EXTENT, box, kind))
    found = Changes({"scale": scale}).warp(pixels)
    # Where Pillow's two ways to a point round to its other sides, a level may differ.
    assert np.abs(found.astype(int) - want).max() <= 1 and (found == want).mean() > 0.9


def test_nothing_drawn_gives_the_picture_itself():
    pixels = noise(8, 8)
    for nothing in (Changes({}), Changes({"rotation": 0.0, "scale": 1.0})):
        assert nothing.warp(pixels) is pixels and nothing.colour(pixels) is pixels
    assert Changes({"blur": 1.0}).warp(pixels) is pixels
    assert Changes({"rotation": 5.0}).colour(pixels) is pixels


def test_a_mask_follows_its_picture_through_crop_mirror_and_turn():
    """Their filters differ, so that pixels of an edge may; a copy is equal to the bit."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[10:30, 12:33] = 255
    for seed in range(20):
        changes = draw(AugmentConfig(rotation=1.0, scale=1.0, brightness=1.0), generator(seed))
        made = transforms.prepare(
            pixels, generator(seed), height=32, width=32, crop="random", flip=True,
            images={"mask": pixels[..., :1], "copy": pixels}, warp=changes.warp,
        )  # fmt: skip
        np.testing.assert_array_equal(made.images["copy"], made.pixels)
        mask, channel = made.images["mask"][..., 0], made.pixels[..., 0]
        assert np.mean((mask > 127) != (channel > 127)) < 0.02
        assert np.abs(mask.astype(int) - channel).mean() < 4
        whole = transforms.prepare(  # without a resize
            pixels, generator(seed), height=48, width=64, crop="random", flip=True,
            images={"mask": pixels[..., :1]}, warp=changes.warp,
        )  # fmt: skip
        flat = pixels[:, ::-1] if whole.mirrored else pixels
        np.testing.assert_array_equal(whole.images["mask"], changes.warp(flat[..., :1]))


def generator(seed):
    return np.random.default_rng(seed)


def test_frames_share_their_changes():
    frames = np.stack([noise(16, 16)] * 3)
    changes = Changes({"rotation": 9.0, "contrast": 0.5, "cutout": 0.4}, (0.3, 0.9))
    made = transforms.prepare(
        list(frames), generator(0), height=16, width=16, crop="center", flip=False,
        warp=changes.warp,
    )  # fmt: skip
    found = changes.colour(made.pixels)
    assert found.shape == frames.shape
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], changes.colour(changes.warp(frames[1])))


# ---- colours ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reference", "values"),
    [
        ("brightness", torchvision.adjust_brightness, (0.0, 0.7, 1.6)),
        ("contrast", torchvision.adjust_contrast, (0.0, 0.7, 1.6)),
        ("saturation", torchvision.adjust_saturation, (0.0, 0.7, 1.6)),
        ("hue", torchvision.adjust_hue, (-0.5, -0.03, 0.1, 0.5)),
    ],
)
def test_colours_are_torchvisions_to_the_bit(name, reference, values):
    pixels = noise(20, 30)
    for value in values:
        want = np.asarray(reference(Image.fromarray(pixels), value))
        np.testing.assert_array_equal(Changes({name: value}).colour(pixels), want)


def test_a_cutout_covers_a_square_and_nothing_else():
    pixels = noise(20, 40)
    found = Changes({"cutout": 0.5}, (1.0, 0.5)).colour(pixels)
    covered = np.zeros((20, 40), bool)
    covered[10:20, 15:25] = True
    assert (found[covered] == GREY).all()
    np.testing.assert_array_equal(found[~covered], pixels[~covered])


def test_jpeg_is_that_of_a_file():
    pixels = noise(16, 24)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=30)
    want = np.asarray(Image.open(buffer))
    np.testing.assert_array_equal(Changes({"jpeg": 30.2}).colour(pixels), want)


# ---- the stream -------------------------------------------------------------------------------


def with_(config, **fields):
    return dataclasses.replace(config, augment=dataclasses.replace(config.augment, **fields))


def test_probability_0_changes_no_bit(config):
    config = dataclasses.replace(config, flip=True, crop="random", images=(EDGES,))
    ranges = {f"{name}_range": ends for name, ends in BOUNDS.items()}
    assert_equal(take(config, 4), take(with_(config, **ranges), 4))


def test_hosts_workers_and_a_resume_give_the_same(config):
    config = dataclasses.replace(config, flip=True, crop="random", augment=ALL, images=(EDGES,))
    whole = take(config, 4)
    plain = take(dataclasses.replace(config, augment=AugmentConfig()), 4)
    assert all(np.any(a["image"] != b["image"]) for a, b in zip(whole, plain, strict=True))
    assert_equal(whole[2:], take(config, 2, start=2))
    halves = [take(config, 4, process_index=i, process_count=2) for i in (0, 1)]
    joined = [
        {name: np.concatenate([one[name], other[name]]) for name in one}
        for one, other in zip(*halves, strict=True)
    ]
    assert_equal(whole, joined)
    # Without tokens: a worker would have to import this file for them.
    alone, workers = config, dataclasses.replace(config, workers=1)
    assert_equal(take(alone, 2, tokenizers={}), take(workers, 2, tokenizers={}))


def test_a_change_does_not_move_the_others():
    rare = dataclasses.replace(ALL, rotation=1e-12, brightness=1e-12)
    for seed in range(20):
        one, other = draw(ALL, generator(seed)), draw(rare, generator(seed))
        rest = {k: v for k, v in one.values.items() if k not in ("rotation", "brightness")}
        assert other.values == rest and one.corner == other.corner


def test_probabilities_and_ranges_are_those_of_the_configuration():
    config = AugmentConfig(rotation=0.25, rotation_range=(-20.0, 40.0), hue=1.0)
    drawn = [draw(config, generator(seed)).values for seed in range(2000)]
    angles = [values["rotation"] for values in drawn if "rotation" in values]
    assert 430 < len(angles) < 570 and all("hue" in values for values in drawn)
    assert min(angles) < -17 and max(angles) > 37 and all(-20 <= a <= 40 for a in angles)


def test_a_made_condition_follows_the_turn_and_not_the_colours(config):
    config = dataclasses.replace(config, images=(EDGES,))
    turned = with_(config, rotation=1.0, rotation_range=(20.0, 20.0))
    dark = with_(turned, brightness=1.0, brightness_range=(0.1, 0.1))
    (straight,), (one,), (other,) = (take(c, 1) for c in (config, turned, dark))
    assert np.any(one["image"] != other["image"])
    np.testing.assert_array_equal(one["edges"], other["edges"])
    assert np.any(one["edges"] != straight["edges"])
    made = transforms.Made("canny")
    levels = np.round((one["image"] + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(one["edges"][0], transforms.scaled(made.of(levels[0])))


# ---- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("a dog left of a cat", "a dog right of a cat"),
        ("LEFT, Right; leftmost-Rightward", "RIGHT, Left; rightmost-Leftward"),
        ("1girl, looking_left, right-handed", "1girl, looking_right, left-handed"),
        ("bright copyright leftover upright", "bright copyright leftover upright"),
        ("lefthand RIGHT2 \u00fcleft", "righthand RIGHT2 \u00fcleft"),
    ],
)
def test_sides_change_places(text, swapped):
    assert swap_sides(text) == swapped and swap_sides(swapped) == text
    assert says_sides(text) == (text != swapped)


def test_captions_of_mirrored_shapes_stay_right(config):
    config = dataclasses.replace(config, flip=True)
    plain = dataclasses.replace(config, captions=CaptionConfig(swap_sides=False))
    changed = 0
    for batch, bare in zip(take(config, 10), take(plain, 10), strict=True):
        np.testing.assert_array_equal(batch["image"], bare["image"])
        pictures = np.round((batch["image"] + 1) * 127.5).astype(np.uint8)
        for text, other, picture in zip(texts(batch), texts(bare), pictures, strict=True):
            assert verdicts(text, picture)["exact"], text
            if text != other:
                changed += 1
                assert not verdicts(other, picture)["exact"], other
    assert changed >= 5


@pytest.mark.parametrize(
    ("captions", "choice", "mirrors"),
    [
        (("a dog", "a cat"), CaptionConfig(), True),
        (("a dog left of a cat", "a cat"), CaptionConfig(), False),
        (("a dog", "a cat on the Right"), CaptionConfig(), False),
        (("a dog left of a cat",), CaptionConfig(swap_sides=False), True),
    ],
)
def test_stored_embeddings_that_say_a_side_are_not_mirrored(captions, choice, mirrors):
    one, size = np.ones((4, 4, 8), np.float32), np.zeros(4, np.int32)
    example = {
        "moments": one, "size": size, "others": {}, "images": {},
        "flipped": {"moments": -one, "size": size, "others": {}},
        "caption": Caption(captions[0], captions[1:], 0.5),
        "context": np.stack([np.full((2, 3), i) for i in range(len(captions))]),
    }  # fmt: skip
    transform = Transform({}, True, "center", True, choice)
    found = [transform(example, generator(seed))["moments"][0, 0, 0] for seed in range(40)]
    assert (-1 in found) == mirrors and 1 in found


def test_labels_say_what_was_changed(config):
    values = {"rotation": -3.0, "scale": 1.05, "brightness": 0.9, "jpeg": 50.0}
    changes = Changes(values, labels=True)
    words = "turned clockwise, zoomed in, darkened, jpeg artifacts"
    assert changes.caption("a dog") == f"{words}, a dog" and changes.caption("") == words
    assert Changes(values).caption("a dog") == "a dog" == Changes({}, labels=True).caption("a dog")
    labelled = with_(config, blur=0.5, labels=True)
    (bare,), (found,) = take(config, 1), take(labelled, 1)
    blurred = [text.startswith("blurred, ") for text in texts(found)]
    assert 0 < sum(blurred) < len(blurred)
    for said, one, other in zip(blurred, found["image"], bare["image"], strict=True):
        assert said == np.any(one != other)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"blur": 1.5}, "data.augment.blur is 1.5"),
        ({"rotation_range": (-90.0, 90.0)}, "left, right, above or below"),
        ({"jpeg_range": (0.0, 90.0)}, "qualities of JPEG"),
        ({"scale_range": (1.2, 0.9)}, "data.augment.scale_range"),
        ({"hue_range": (0.1,)}, "data.augment.hue_range"),
        ({"labels": True}, "no change has a probability"),
    ],
)
def test_values_out_of_range_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        AugmentConfig(**fields)


def test_what_would_part_pictures_that_belong_together_is_refused(config):
    pair = (NamedImage("before"),)
    with pytest.raises(UserError, match="'before'"):
        dataclasses.replace(config, images=pair, augment=AugmentConfig(hue=0.1))
    dataclasses.replace(config, images=pair, augment=AugmentConfig(rotation=0.1))
    with pytest.raises(UserError, match="encoded"):
        DataConfig(name="encoded", path="x", augment=AugmentConfig(rotation=0.1))
