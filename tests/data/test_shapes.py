"""captioned_shapes: what is drawn, what is said of it, and that the reader reads it back."""

import functools
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sdjax.data.builders import captioned_shapes, shapes
from sdjax.data.builders.shape_reader import judge, read_shapes, score
from sdjax.data.builders.shapes import Wanted, is_held_out, make_example, parse_caption
from sdjax.data.sources import DataConfig, DataError, captions, open_source
from sdjax.data.tfds.stored import prepare_builder
from tests.fake_gcs import FakeGCS

COUNT = 200


@pytest.fixture(scope="module")
def examples():
    return [make_example(0, ("train", "test")[index % 2], index) for index in range(COUNT)]


def test_examples_are_a_function_of_seed_split_and_index():
    image, text, scene = make_example(3, "train", 17)
    again, text_again, scene_again = make_example(3, "train", 17)
    assert (image == again).all() and text == text_again and scene == scene_again
    others = [
        make_example(4, "train", 17),
        make_example(3, "test", 17),
        make_example(3, "train", 18),
    ]
    assert all((image != other[0]).any() for other in others)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8


def test_captions_say_what_was_drawn(examples):
    for _, text, scene in examples:
        wanted = parse_caption(text)
        assert len(wanted) == len(scene.objects)
        for want, placed in zip(wanted, scene.objects, strict=True):
            assert (want.colour, want.shape) == (placed.colour, placed.shape)
            assert want.size in ("", placed.size)
            assert want.position in ("", placed.position)
        assert wanted[0].relation in ("", scene.relation)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("a red circle", [Wanted("red", "circle")]),
        (
            "A picture of an orange cross on the left",
            [Wanted("orange", "cross", "", "on the left")],
        ),
        (
            "a large red circle at the top left",
            [Wanted("red", "circle", "large", "at the top left")],
        ),
        (
            "a drawing of a small blue square to the left of a green triangle",
            [
                Wanted("blue", "square", "small", relation="to the left of"),
                Wanted("green", "triangle"),
            ],
        ),
        ("a black cross and a cyan circle", [Wanted("black", "cross"), Wanted("cyan", "circle")]),
    ],
)
def test_parse_caption(text, wanted):
    assert parse_caption(text) == wanted


@pytest.mark.parametrize("text", ["", "a red dog", "red circle", "a circle", "a red circle above"])
def test_parse_caption_refuses_other_texts(text):
    with pytest.raises(ValueError, match="not a caption of captioned_shapes"):
        parse_caption(text)


def test_test_prompts_are_held_out_but_their_words_are_not():
    test = [make_example(0, "test", index)[1:] for index in range(200)]
    train = [make_example(0, "train", index)[1:] for index in range(3000)]
    train_texts = {text for text, _ in train}
    assert all(is_held_out(tuple(parse_caption(text))) for text, _ in test)
    assert not any(is_held_out(scene.objects) for _, scene in train)
    assert not train_texts & {text for text, _ in test}
    words = {word for text in train_texts for word in text.split()}
    assert {word for text, _ in test for word in text.split()} <= words


def test_reader_reads_clean_pictures(examples):
    result = score([text for _, text, _ in examples], np.stack([image for image, *_ in examples]))
    assert result == {**dict.fromkeys(("colour", "shape", "size", "place", "exact"), 1.0),
                      "samples": COUNT}  # fmt: skip


def test_found_objects_are_where_they_were_drawn(examples):
    for image, _, scene in examples[:40]:
        found = read_shapes(image)
        assert len(found) == len(scene.objects)
        for one in found:
            placed = next(p for p in scene.objects if p.colour == one.colour)
            assert abs(one.x - placed.x) < 1
            assert abs(one.box[2] - one.box[0] - placed.width) < 2
            top, bottom = placed.y - placed.width / 2, placed.y + placed.width / 2
            assert abs(one.box[1] - top) < 2 and abs(one.box[3] - bottom) < 2


def degraded(image, *, sigma, noise, quality, rng):
    picture = Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=quality)
    noisy = np.asarray(Image.open(jpeg)) + rng.normal(0, noise, image.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("sigma, noise, quality", [(1.0, 8.0, 95), (1.0, 8.0, 30)])
def test_reader_survives_blur_noise_and_jpeg(examples, sigma, noise, quality):
    rng = np.random.default_rng(0)
    images = [degraded(image, sigma=sigma, noise=noise, quality=quality, rng=rng)
              for image, *_ in examples]  # fmt: skip
    result = score([text for _, text, _ in examples], images)
    assert min(result["colour"], result["shape"], result["exact"]) >= 0.99


def test_reader_reads_other_sizes(examples):
    images = [np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC))
              for image, *_ in examples[:40]]  # fmt: skip
    assert score([text for _, text, _ in examples[:40]], images)["exact"] == 1.0


def test_score_of_the_wrong_pictures_is_low(examples):
    images = [image for image, *_ in examples]
    result = score([text for _, text, _ in examples], images[1:] + images[:1])
    assert result["colour"] < 0.3 and result["shape"] < 0.1
    nothing = np.full((4, 64, 64, 3), 240, np.uint8)
    assert score(["a red circle"] * 4, nothing)["colour"] == 0
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    assert score(["a red circle"] * 4, noise)["shape"] == 0


def place(colour, shape, x, y, width=19.0):
    return shapes.Placed(colour, shape, "small", "", x, y, width, shapes.PALETTE[colour])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a red circle to the left of a blue square", "colour shape size place exact"),
        ("a small blue square to the right of a red circle", "colour shape size place exact"),
        ("a large red circle and a blue square", "colour shape place"),
        ("a red circle to the right of a blue square", "colour shape size"),
        ("a red square and a blue circle", "colour"),
        ("a red circle", "colour shape size place"),  # but the square is not wanted
        ("a red circle and a green square", ""),
        ("a red circle and a red circle", ""),  # one circle does not count twice
    ],
)
def test_judge(text, expected):
    objects = (place("red", "circle", 16, 30), place("blue", "square", 46, 34))
    picture = shapes.draw(shapes.Scene(objects, "", (240, 240, 240)))
    verdict = judge(parse_caption(text), read_shapes(picture), 64)
    assert {name for name, right in verdict.items() if right} == set(expected.split())


def test_reader_separates_touching_objects():
    objects = (place("red", "circle", 22, 32, 20.0), place("blue", "square", 42, 32, 20.0))
    picture = shapes.draw(shapes.Scene(objects, "", (240, 240, 240)))
    assert {(f.colour, f.shape) for f in read_shapes(picture)} == {
        ("red", "circle"), ("blue", "square")}  # fmt: skip


def test_reader_refuses_floats():
    with pytest.raises(ValueError, match="expected uint8"):
        read_shapes(np.zeros((64, 64, 3), np.float32))


def test_builder_stores_what_is_generated(tmp_path):
    config = DataConfig(data_dir=str(tmp_path), shapes_train=12, shapes_test=3, shapes_pairs=0.5)
    source = open_source(config, "train")
    assert len(source) == 12 and len(open_source(config, "test")) == 3
    for index in range(12):
        image, text, scene = make_example(0, "train", index, pair_fraction=0.5)
        example = source[index]
        assert (example["image"] == image).all() and example["text"] == text
        stored = json.loads(source._records[index]["objects"])
        assert [one["shape"] for one in stored] == [one.shape for one in scene.objects]
    assert captions(config, "test") == [make_example(0, "test", i, pair_fraction=0.5)[1]
                                        for i in range(3)]  # fmt: skip


def test_any_colour_stands_out_from_the_background_and_is_not_named(tmp_path):
    named = re.compile("|".join(shapes.PALETTE))
    colours = set()
    for index in range(40):
        image, text, scene = make_example(0, "train", index, colours="any")
        assert not named.search(text) and "  " not in text
        for placed in scene.objects:
            row, column = round(placed.y), round(placed.x)
            assert tuple(image[row, column]) == placed.rgb or placed.shape == "triangle"
            assert max(np.subtract(scene.background, placed.rgb)) > shapes.CONTRAST
            colours.add(placed.rgb)
    assert len(colours) > 40
    config = DataConfig(data_dir=str(tmp_path), shapes_train=2, shapes_test=1, shapes_colours="any")
    image, text, _ = make_example(0, "train", 1, colours="any")
    example = open_source(config, "train")[1]
    assert (example["image"] == image).all() and example["text"] == text


@pytest.mark.parametrize(
    "wrong", [{"shapes_train": 0}, {"shapes_pairs": 1.5}, {"shapes_colours": "all"}]
)
def test_builder_refuses_impossible_sizes(tmp_path, wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        open_source(DataConfig(data_dir=str(tmp_path), **wrong), "train")


def test_data_are_read_from_a_bucket_and_never_prepared_in_one(tmp_path):
    """By a process that takes this one's server for Google's."""
    code = """if True:
        import json, sys
        import numpy as np
        from sdjax.data.sources import DataConfig, open_source
        from sdjax.errors import UserError
        for folder in ("tfds", "empty"):
            config = DataConfig(
                data_dir=f"gs://bucket/{folder}", shapes_train=3, shapes_test=2, resolution=16
            )
            try:
                source = open_source(config, "train")
                print(json.dumps([np.asarray(source[n]["image"]).tolist() for n in range(3)]))
            except UserError as error:
                print(error)
    """
    local = DataConfig(data_dir=str(tmp_path), shapes_train=3, shapes_test=2, resolution=16)
    source = open_source(local, "train")
    wanted = [np.asarray(source[n]["image"]).tolist() for n in range(3)]
    with FakeGCS(tmp_path, "bucket") as gcs:
        for file in tmp_path.glob("captioned_shapes/*/*/*"):
            gcs.write(f"bucket/tfds/{file.relative_to(tmp_path)}", file.read_bytes())
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=gcs.environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
    read, refused = run.stdout.splitlines()
    assert json.loads(read) == wanted
    assert "gs://bucket/empty" in refused and "prepare it with a local data.data_dir" in refused


@pytest.mark.parametrize("moment", ["before it looks", "before TFDS looks", "before it renames"])
def test_another_host_may_prepare_the_data_at_any_moment(moment, tmp_path, monkeypatch):
    """A builder that was made before there were files knows the splits that another wrote."""
    make = functools.partial(
        captioned_shapes.make_builder,
        data_dir=str(tmp_path),
        train_examples=3,
        test_examples=2,
        pair_fraction=0.0,
    )
    late, other = make(), make()
    if moment == "before it looks":
        prepare_builder(other)
    else:
        looks = moment == "before TFDS looks"
        name = "download_and_prepare" if looks else "_generate_splits"
        own = getattr(late, name)

        def after_the_other(*args, **kwargs):
            prepare_builder(other)
            return own(*args, **kwargs)

        monkeypatch.setattr(late, name, after_the_other)
    prepare_builder(late)
    assert {k: s.num_examples for k, s in late.info.splits.items()} == {"train": 3, "test": 2}
