"""Named pictures: one geometry for all, from every kind of raw data, and what cannot be used."""

import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from sdjax.config import default, resolve
from sdjax.data import transforms
from sdjax.data.builders.opening import prepared_builder
from sdjax.data.config import DataConfig, DataError
from sdjax.data.fixed import FixedExamples
from sdjax.data.image_files import ImageError
from sdjax.data.mixture import Part
from sdjax.data.named_images import NamedImage, parse
from sdjax.data.pipeline import make_iterator
from sdjax.data.raw import formats
from sdjax.data.raw.clean import Rules, clean
from sdjax.data.raw.rows import Fields, Row
from sdjax.data.sources import open_source
from sdjax.data.tfds.tfds_on_cpu import tfds
from sdjax.errors import UserError
from tests.data.test_raw import write_parquet, write_tar

SIZES = [(40, 40), (40, 64), (64, 40), (36, 60)]  # height, width
COPY = NamedImage("before", "copy")
CONTROL = NamedImage("control", "edge", "condition")
MASK = NamedImage("mask", "matte", "mask")


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise(number, channels=3, size=None):
    shape = size or SIZES[number % len(SIZES)]
    rng = np.random.default_rng(number)
    values = rng.integers(0, 256, (*shape, 3), np.uint8)
    return values if channels == 3 else values[..., 0]


class Copies(tfds.core.GeneratorBasedBuilder):
    """Noise; two copies of each picture, its first channel, an array of it, and two numbers."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        f = tfds.features
        features = {
            "image": f.Image(shape=(None, None, 3)),
            "copy": f.Image(shape=(None, None, 3)),
            "edge": f.Image(shape=(None, None, 3)),
            "matte": f.Image(shape=(None, None, 1)),
            "other": f.Image(shape=(None, None, 3)),
            "text": f.Text(),
            "pose": f.Tensor(shape=(2,), dtype=np.float32),
        }
        return self.dataset_info_from_configs(features=f.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(24):
            whole = png(noise(i))
            yield (
                i,
                {
                    **{name: io.BytesIO(whole) for name in ("image", "copy", "edge")},
                    "matte": io.BytesIO(png(noise(i, 1))),
                    "other": io.BytesIO(png(noise(i, size=(40, 45)))),
                    "text": f"{i}",
                    "pose": np.array([i, 0.5], np.float32),
                },
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    Copies(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def config(data_dir):
    return DataConfig(
        name="copies", data_dir=data_dir, batch_size=4, resolution=32, threads=1, crop="random",
        flip=True, images=(COPY, CONTROL, MASK),
    )  # fmt: skip


def take(config, count, **options):
    data = make_iterator(config, {}, **{"split": "train", "seed": 3} | options)
    batches = [next(data) for _ in range(count)]
    data.close()
    return batches


def with_buckets(config):
    return dataclasses.replace(
        config, buckets=dataclasses.replace(config.buckets, step=8, max_aspect=2.0)
    )


# ---- geometry ---------------------------------------------------------------------------------


def mixed(config):
    parts = (Part(name="copies"), Part(name="copies", resolution=24, weight=2.0))
    return dataclasses.replace(config, mixture=parts)


@pytest.mark.parametrize("change", [lambda c: c, with_buckets, mixed], ids=["squares", "b", "mix"])
def test_copies_of_the_picture_stay_equal_to_the_bit(config, change):
    config = change(config)
    shapes = set()
    for batch in take(config, 12):
        np.testing.assert_array_equal(batch["before"], batch["image"])
        levels = np.round((batch["image"] + 1) * 127.5).astype(np.uint8)
        np.testing.assert_array_equal(batch["control"], transforms.scaled(levels))
        assert batch["control"].min() < 0.1 and batch["control"].max() > 0.9
        assert batch["mask"].shape == (*batch["image"].shape[:-1], 1)
        assert 0 <= batch["mask"].min() and batch["mask"].max() <= 1
        shapes.add(batch["image"].shape)
    assert (len(shapes) > 1) == (bool(config.mixture) or bool(config.buckets.step))


def test_a_mask_gets_the_window_and_the_flip_of_the_picture(config):
    """The mask is the first channel, so without a resize it is that of the image, to the bit."""
    config = dataclasses.replace(config, resolution=40)
    seen = 0
    for batch in take(config, 8):
        exact = (batch["image"][..., :1] + 1) / 2
        same = [np.allclose(m, e, atol=1e-6) for m, e in zip(batch["mask"], exact, strict=True)]
        seen += sum(same)
    assert seen >= 8 * 4 * 0.6  # 36 x 60 alone is resized


def test_named_pictures_change_nothing_of_the_others(config):
    bare = take(dataclasses.replace(config, images=()), 6)
    for one, other in zip(bare, take(config, 6), strict=True):
        assert other.keys() - one.keys() == {"before", "control", "mask"}
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])


def test_a_stream_resumes_on_any_hosts_and_workers_and_refuses_other_pictures(config):
    config = with_buckets(config)
    whole = take(config, 8)
    data = make_iterator(config, {}, split="train", seed=3)
    next(data), next(data)
    state = json.loads(json.dumps(data.get_state()))
    data.close()
    again = make_iterator(dataclasses.replace(config, workers=1), {}, split="train", seed=3)
    again.set_state(state)
    for expected, batch in zip(whole[2:5], again, strict=False):
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(batch[name], value)
    again.close()
    halves = [take(config, 4, process_index=i, process_count=2) for i in range(2)]
    for expected, left, right in zip(whole, *halves, strict=False):
        for name, value in expected.items():
            np.testing.assert_array_equal(np.concatenate([left[name], right[name]]), value)
    for images in ((), (COPY, CONTROL), (COPY, dataclasses.replace(CONTROL, key="copy"), MASK)):
        other = make_iterator(dataclasses.replace(config, images=images), {}, split="train", seed=3)
        with pytest.raises(DataError, match="images: "):
            other.set_state(state)


def test_fixed_examples_have_named_pictures_uncropped_and_unflipped(config):
    fixed = FixedExamples(config, {}, split="train", count=6, rows=4)
    with ThreadPoolExecutor(1) as executor:
        batch = fixed.read(fixed.groups[0], executor)
    np.testing.assert_array_equal(batch["before"], batch["image"])
    assert batch["mask"].shape == (4, 32, 32, 1)


def test_numbers_of_any_name_come_from_columns_and_size_from_the_geometry(config):
    shapes = {"size": (4,), "pose": (2,)}
    for batch in take(config, 2, number_shapes=shapes):
        assert batch["size"].dtype == np.int32 and batch["size"].shape == (4, 4)
        assert batch["pose"].dtype == np.float32 and batch["pose"].shape == (4, 2)
        np.testing.assert_array_equal(batch["pose"][:, 1], 0.5)
    with pytest.raises(DataError, match=r"the numbers 'pose' of shape \[3\]"):
        make_iterator(config, {}, split="train", seed=0, number_shapes={"pose": (3,)})


# ---- transforms -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_frames_share_one_crop_and_one_flip(seed):
    frames = [noise(i, size=(30, 50)) for i in range(3)]
    masks = [noise(i, 1, size=(30, 50))[..., None] for i in range(3)]
    options = {"height": 16, "width": 24, "crop": "random", "flip": True}
    made = transforms.prepare(
        frames, np.random.default_rng(seed), **options, images={"mask": masks, "copy": frames}
    )
    assert made.pixels.shape == (3, 16, 24, 3) and made.images["mask"].shape == (3, 16, 24, 1)
    assert made.image.shape == made.pixels.shape
    np.testing.assert_array_equal(made.images["copy"], made.pixels)
    for i, frame in enumerate(frames):
        alone = transforms.prepare(
            frame, np.random.default_rng(seed), **options, images={"mask": masks[i]}
        )
        np.testing.assert_array_equal(alone.pixels, made.pixels[i])
        np.testing.assert_array_equal(alone.images["mask"], made.images["mask"][i])
        np.testing.assert_array_equal(alone.size, made.size)
    with pytest.raises(ImageError, match="size_differs: a frame is 30x30"):
        transforms.prepare([*frames, noise(0, size=(30, 30))], np.random.default_rng(0), **options)


def test_a_mask_is_averaged_by_area_and_enlarged_with_hard_edges():
    mask = (np.random.default_rng(0).random((64, 64)) < 0.5).astype(np.uint8) * 255
    options = {"crop": "center", "flip": False}
    rng, image = np.random.default_rng(0), np.zeros((64, 64, 3), np.uint8)
    small = transforms.prepare(
        image, rng, height=16, width=16, **options, images={"mask": mask[..., None]}
    )
    exact = mask.reshape(16, 4, 16, 4).mean((1, 3))
    # Pillow rounds to 8 bits after the rows and after the columns.
    np.testing.assert_allclose(small.images["mask"][..., 0], exact, atol=1)
    large = transforms.prepare(
        image, rng, height=128, width=128, **options, images={"mask": mask[..., None]}
    )
    np.testing.assert_array_equal(large.images["mask"][..., 0], mask.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("size, fits", [
    ((40, 60), True), ((20, 30), True), ((80, 120), True), ((13, 20), True), ((667, 1000), True),
    ((60, 40), False), ((40, 57), False), ((40, 40), False),
])  # fmt: skip
def test_a_uniform_scale_alone_may_differ(size, fits):
    if fits:
        transforms.check_geometry("control", size, (40, 60))
        made = transforms.prepare(
            noise(0, size=(40, 60)), np.random.default_rng(0), height=16, width=16,
            crop="center", flip=False, images={"control": noise(1, size=size)},
        )  # fmt: skip
        assert made.images["control"].shape == (16, 16, 3)
        return
    with pytest.raises(ImageError, match=f"size_differs: control is {size[1]}x{size[0]}"):
        transforms.check_geometry("control", size, (40, 60))


def test_a_mask_is_the_luma_on_black_or_the_alpha_channel():
    alpha = np.array([[0, 128, 255]], np.uint8)
    rgba = np.concatenate([np.full((1, 3, 3), 255, np.uint8), alpha[..., None]], -1)
    for name, mode in (("luma", False), ("alpha", True)):
        found = np.asarray(transforms.decode_mask(png(rgba), alpha=mode))
        np.testing.assert_allclose(found, alpha, atol=1, err_msg=name)
    opaque = png(np.zeros((2, 2, 3), np.uint8))
    assert (np.asarray(transforms.decode_mask(opaque, alpha=True)) == 255).all()
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(np.asarray(transforms.decode_mask(png(grey))), grey)
    colour = png(np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(np.asarray(transforms.decode_mask(colour)), grey)


# ---- what cannot be used ----------------------------------------------------------------------


def test_a_feature_that_is_missing_no_picture_or_of_another_size_is_named(config):
    for key, what in (("none", "is None"), ("text", "is Text")):
        images = (NamedImage("control", key),)
        with pytest.raises(
            DataError, match=f"'control', which is read from the feature '{key}'.*{what}"
        ):
            open_source(dataclasses.replace(config, images=images), "train")
    source = open_source(dataclasses.replace(config, images=(NamedImage("other"),)), "train")
    with pytest.raises(DataError, match=r"the picture 'other' cannot be decoded \(size_differs"):
        for i in range(len(source)):
            source.example(i)


@pytest.mark.parametrize("fields, message", [
    ({"name": "image"}, "name is 'image'"),
    ({"name": "tokens_2"}, "name is 'tokens_2'"),
    ({"name": "a_moments"}, "name is 'a_moments'"),
    ({"name": "no word"}, "name is 'no word'"),
    ({"name": "control", "kind": "depth"}, "kind is 'depth'"),
])  # fmt: skip
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        NamedImage(**fields)


def test_a_recipe_and_an_option_give_named_pictures():
    recipe = default()
    recipe.data.images = (
        {"name": "control", "key": "edge", "kind": "condition"},
        {"name": "mask", "kind": "mask"},
    )
    assert resolve(recipe).data.images == (CONTROL, NamedImage("mask", "", "mask"))
    assert parse("control=edge:condition") == CONTROL
    assert parse("before") == NamedImage("before")
    assert parse("before=edges/") == NamedImage("before", "edges/")
    recipe.data.images = ({"name": "mask"}, {"name": "mask"})
    with pytest.raises(UserError, match="names that differ"):
        resolve(recipe)


# ---- raw data ---------------------------------------------------------------------------------

WANTED = (CONTROL, NamedImage("mask", "matte", "mask"))


def members(number, *, control=None, mask=None):
    """(ending, bytes) of a picture and those that are named; None leaves one out."""
    found = [(".png", png(noise(number))), (".txt", f"text {number}".encode())]
    found += [(".edge.png", png(noise(number)) if control is None else control)]
    found += [(".matte.png", png(noise(number, 1)) if mask is None else mask)]
    return [(end, data) for end, data in found if data]


ROWS = {
    "good0": members(0), "good1": members(1), "bare": members(2, control=b""),
    "half": members(3, mask=b""), "torn": members(0, control=png(noise(0))[:90]),
    "wide": members(0, mask=png(noise(0, 1, size=(40, 30)))),
}  # fmt: skip
OUTCOMES = {"good0": "", "good1": "", "bare": "missing_image", "half": "missing_image",
            "torn": "truncated", "wide": "size_differs"}  # fmt: skip


def as_tar(folder):
    write_tar(
        folder / "0.tar", [(f"{n}{end}", data) for n, row in ROWS.items() for end, data in row]
    )


def as_parquet(folder):
    ends = {".png": "image", ".txt": "text", ".edge.png": "edge", ".matte.png": "matte"}
    rows = [
        {
            "text": n, **{c: None for c in ("image", "edge", "matte")},
            **{ends[e]: {"bytes": d, "path": n} for e, d in row if e != ".txt"},
        }
        for n, row in ROWS.items()
    ]  # fmt: skip
    write_parquet(folder / "0.parquet", rows)


def as_siblings(folder):
    folder.mkdir()
    for n, row in ROWS.items():
        for end, data in row:
            (folder / f"{n}{end}").write_bytes(data)


def as_metadata(folder):
    """Hugging Face's convention: columns that name files."""
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for n, row in ROWS.items():
        line = {"file_name": f"pictures/{n}.png", "text": n}
        for end, data in row:
            if end != ".txt":
                (folder / "pictures" / f"{n}{end.replace('.edge', '-e')}").write_bytes(data)
        if any(end == ".edge.png" for end, _ in row):
            line["edge_file_name"] = f"pictures/{n}-e.png"
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


LAYOUTS = {"webdataset": as_tar, "parquet": as_parquet, "image_text_folder": as_siblings,
           "metadata": as_metadata}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_reader_gives_named_pictures_and_counts_what_is_missing(layout, tmp_path):
    folder = tmp_path / "data"
    LAYOUTS[layout](folder)
    format = "image_text_folder" if layout == "metadata" else layout
    fields, rules = Fields(images=WANTED), Rules(images=WANTED)
    found, details = {}, {}
    survey = formats.survey(str(folder), format, fields)
    names = [name for shard in survey.shards for name in formats.names(shard, fields)]
    items = [item for shard in survey.shards for item in formats.read(shard, fields)]
    for number, item in enumerate(items):
        made = clean(item, rules) if isinstance(item, Row) else item
        stem = made.name.rpartition("/")[2].partition(".")[0]
        key = list(ROWS)[number] if format == "parquet" else stem
        found[key] = getattr(made, "reason", "")
        details[key] = getattr(made, "detail", "")
        if not found[key]:
            which = int(key[-1])
            np.testing.assert_array_equal(transforms.decode(made.images["control"]), noise(which))
            mask = np.asarray(Image.open(io.BytesIO(made.images["mask"])))
            np.testing.assert_array_equal(mask, noise(which, 1))
    assert found == OUTCOMES
    assert len(names) == len(ROWS)
    assert "'control'" in details["bare"] and "'mask'" in details["half"]
    assert "'control'" in details["torn"] and "'mask'" in details["wide"]
    assert not survey.unnamed


def test_a_second_folder_with_equal_stems(tmp_path):
    folder = tmp_path / "data"
    for i, (tree, edges) in enumerate((("a/b", "edges/a/b"), ("c", "edges"))):
        for place in (tree, edges):
            (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / tree / f"{i}.png").write_bytes(png(noise(i)))
        (folder / tree / f"{i}.txt").write_text(f"text {i}")
        (folder / edges / f"{i}.png").write_bytes(png(noise(i)[..., ::-1]))
    fields = Fields(images=(NamedImage("control", "edges/", "condition"),))
    rows = [r for s in formats.list_shards(str(folder), "image_text_folder", fields)
            for r in formats.read(s, fields)]  # fmt: skip
    assert [row.name for row in rows] == ["a/b/0.png", "c/1.png"]
    for i, row in enumerate(rows):
        found = transforms.decode(row.images["control"])
        np.testing.assert_array_equal(found, noise(i)[..., ::-1])


def test_an_import_keeps_named_pictures_and_is_made_anew_when_one_changes(tmp_path):
    folder = tmp_path / "data"
    as_siblings(folder)
    config = DataConfig(
        name="image_text_folder", path=str(folder), data_dir=str(tmp_path / "tfds"),
        images=WANTED, batch_size=2, resolution=32,
    )  # fmt: skip
    builder = prepared_builder(config)
    skipped = json.loads((builder.data_path / "skipped.json").read_text())
    reasons = {entry["name"]: entry["reason"] for entry in skipped}
    assert reasons == {f"{n}.png": why for n, why in OUTCOMES.items() if why}
    (batch,) = take(config, 1, split=next(iter(builder.info.splits)))
    assert batch["control"].shape == (2, 32, 32, 3) and batch["mask"].shape == (2, 32, 32, 1)
    (folder / "bare.edge.png").write_bytes(png(noise(2)))
    other = prepared_builder(config)
    assert other.info.full_name != builder.info.full_name
    assert len(json.loads((other.data_path / "skipped.json").read_text())) == len(skipped) - 1


def test_the_alpha_channel_of_raw_pictures_can_be_the_mask(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    alpha = noise(0, 1)
    (folder / "a.png").write_bytes(png(np.concatenate([noise(0), alpha[..., None]], -1)))
    (folder / "a.txt").write_text("a")
    images = (NamedImage("mask", "alpha", "mask"),)
    fields = Fields(images=images)
    (shard,) = formats.list_shards(str(folder), "image_text_folder", fields)
    (row,) = formats.read(shard, fields)
    made = clean(row, Rules(images=images))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(made.images["mask"]))), alpha)
