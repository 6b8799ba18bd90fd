"""Mixtures, buckets, splits and caption choices from stored datasets to batches."""

import collections
import dataclasses
import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from sdjax.data import sources
from sdjax.data.caption_choice import CaptionConfig
from sdjax.data.config import DataConfig, DataError
from sdjax.data.fixed import FixedExamples
from sdjax.data.mixture import Part
from sdjax.data.pipeline import make_iterator, open_source
from sdjax.data.stream import make_stream
from sdjax.data.tfds.tfds_on_cpu import tfds
from sdjax.system import paths

COUNT = 60
SIZES = [(40, 40), (32, 64), (64, 33), (30, 61), (80, 76)]  # height, width as shown


class Numbers:
    """A tokenizer stand-in: the number that a caption begins with."""

    def encode(self, texts):
        return np.array([[int("0" + text.split(" ")[0])] for text in texts], np.int32)


def picture(number):
    """A JPEG; every third lies on its side and says so."""
    height, width = SIZES[number % len(SIZES)]
    lying = number % 3 == 0
    image = Image.new("RGB", (height, width) if lying else (width, height), (number * 4, 99, 20))
    exif, buffer = Image.Exif(), io.BytesIO()
    if lying:
        exif[0x0112] = 6
    image.save(buffer, "JPEG", quality=95, exif=exif)
    return io.BytesIO(buffer.getvalue())


class Photos(tfds.core.GeneratorBasedBuilder):
    """JPEG files; text "7 seven" but for every tenth, which has none; 0 to 2 more captions."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "text": tfds.features.Text(),
                    "more": tfds.features.Sequence(tfds.features.Text()),
                    "author": tfds.features.Text(),
                    "score": tfds.features.Scalar(np.float32),
                    "kind": tfds.features.ClassLabel(names=["cat", "dog"]),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(COUNT):
            yield (
                i,
                {
                    "image": picture(i),
                    "text": "" if i % 10 == 9 else f"{i} main",
                    "more": [f"{i} other {j}" for j in range(i % 3)] if i % 10 != 9 else [],
                    "author": f"author {i // 6}",
                    "score": float("nan") if i == 50 else i / COUNT,
                    "kind": i % 2,
                },
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    Photos(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def config(data_dir):
    return DataConfig(name="photos", data_dir=data_dir, batch_size=4, resolution=32, threads=2)


def buckets(config, **fields):
    group = dataclasses.replace(config.buckets, **{"step": 8, "max_aspect": 2.0} | fields)
    return dataclasses.replace(config, buckets=group)


def start(config, **options):
    return make_iterator(config, {"tokens": Numbers()}, **{"split": "train", "seed": 1} | options)


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


# ---- sizes and keys --------------------------------------------------------------------------


def test_sizes_are_those_of_the_decoded_pictures(config):
    source = open_source(config, "train")
    shapes = [source[i]["image"].shape[:2] for i in range(len(source))]
    assert shapes == [SIZES[i % len(SIZES)] for i in range(COUNT)]
    assert list(zip(source.table.height, source.table.width, strict=True)) == shapes
    assert np.flatnonzero(source.table.empty).tolist() == list(range(9, COUNT, 10))


def test_the_table_is_read_once_and_mended(config, monkeypatch):
    first = open_source(config, "train").table
    folder = paths.to_path(open_source(config, "train").directory)

    def forbidden(self, index):
        raise AssertionError("a record was read again")

    with monkeypatch.context() as patch:
        patch.setattr(sources.Source, "_row", forbidden)
        again = open_source(config, "train").table
        np.testing.assert_array_equal(again.share, first.share)
        other = dataclasses.replace(config, split_key="author")  # is another table
        with pytest.raises(AssertionError, match="read again"):
            open_source(other, "train").table  # noqa: B018
    for file in folder.glob("columns-*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    mended = open_source(config, "train").table
    np.testing.assert_array_equal(mended.height, first.height)


def test_a_long_pass_is_made_in_parts_and_speaks(config, monkeypatch, caplog):
    whole = open_source(config, "train").table
    monkeypatch.setattr("sdjax.data.columns._read", lambda path, count: None)
    monkeypatch.setattr("sdjax.data.columns.CHUNK", 7)
    monkeypatch.setattr("sdjax.data.columns.PROGRESS", -1.0)
    parts = open_source(config, "train").table
    for name in ("height", "width", "share", "fold", "empty", "score"):
        one, other = getattr(parts, name), getattr(whole, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert "sizes and keys of 7 of 60 records are read" in caplog.text
    assert "sizes and keys of 60 of 60 records are read" in caplog.text


def test_the_table_does_without_a_place_to_keep_it(config, monkeypatch):
    def full(path):
        raise OSError("no space left on device")

    monkeypatch.setattr("sdjax.data.columns._read", lambda path, count: None)
    monkeypatch.setattr("sdjax.data.columns.paths.writing", full)
    assert len(open_source(config, "train").table.height) == COUNT


# ---- splits ----------------------------------------------------------------------------------


def test_splits_by_hash_of_a_stored_dataset(config):
    config = dataclasses.replace(config, test_share=0.2, validation_share=0.2)
    made = [open_source(config, split) for split in ("train", "validation", "test")]
    assert sum(map(len, made)) == COUNT and min(map(len, made)) > 2
    texts = [source.text(i) for source in made for i in range(len(source)) if source.text(i)]
    assert len(set(texts)) == len(texts) == COUNT - 6
    assert open_source(config, "test").text(0) == made[2].text(0)
    with pytest.raises(DataError, match="split 'test' is not in .* data.test_share to have them"):
        open_source(dataclasses.replace(config, test_share=0.0), "test")


def test_examples_of_one_key_are_on_one_side(config):
    config = dataclasses.replace(config, test_share=0.4, split_key="author")
    sides = [open_source(config, split) for split in ("train", "test")]
    authors = [{source._record(i)["author"] for i in range(len(source))} for source in sides]
    assert authors[0] and authors[1] and not authors[0] & authors[1]
    with pytest.raises(DataError, match="data.split_key is 'painter', but photos.* has the feat"):
        open_source(dataclasses.replace(config, split_key="painter"), "train")


def test_folds_of_a_stored_dataset(config):
    held_out = [open_source(dataclasses.replace(config, fold=f"{i}/3"), "validation")
                for i in (1, 2, 3)]  # fmt: skip
    assert sum(map(len, held_out)) == COUNT
    for i, source in enumerate(held_out, start=1):
        train = open_source(dataclasses.replace(config, fold=f"{i}/3"), "train")
        assert len(train) + len(source) == COUNT


# ---- captions --------------------------------------------------------------------------------


def choice(config, **fields):
    return dataclasses.replace(config, captions=dataclasses.replace(config.captions, **fields))


def test_empty_captions(config, caplog):
    assert len(open_source(config, "train")) == COUNT
    skipping = choice(config, empty="skip")
    source = open_source(skipping, "train")
    assert len(source) == COUNT - 6 and all(source.text(i) for i in range(len(source)))
    assert "photos/1.0.0, split train: left out: 6 no caption" in caplog.text
    strict = open_source(choice(config, empty="error"), "train")
    with pytest.raises(DataError, match="example 9 has no caption; data.captions.empty = 'skip'"):
        strict[9]
    assert strict[8]["text"] == "8 main"


def test_all_captions_of_a_picture_come(config):
    class Kept:
        def encode(self, texts):
            return np.array([[ord(letter) for letter in text.ljust(12)] for text in texts])

    config = choice(config, others_key="more", main_share=0.5)
    tokens = make_iterator(config, {"tokens": Kept()}, split="train", seed=0)
    rows = np.concatenate([batch["tokens"] for batch in take(tokens, 300)])
    texts = collections.Counter("".join(map(chr, row)).strip() for row in rows)
    assert texts["3 main"] == 20  # has no others
    assert texts["2 main"] + texts["2 other 0"] + texts["2 other 1"] == 20
    main = sum(texts[f"{i} main"] for i in range(COUNT) if i % 3 == 2 and i % 10 != 9)
    other = sum(texts[f"{i} other 0"] for i in range(COUNT) if i % 3 == 2 and i % 10 != 9)
    assert main == pytest.approx(18 * 20 / 2, abs=50) and other == pytest.approx(90, abs=45)
    for key in ("text", "none"):
        with pytest.raises(DataError, match=f"data.captions.others_key is '{key}'"):
            open_source(choice(config, others_key=key), "train")


def test_templates_of_labels(config):
    config = choice(config, templates=("a {} outside", "one {}"))
    config = dataclasses.replace(config, text_key="kind", label_template="a photo of a {}")
    caption = open_source(config, "train")[1]["caption"]
    assert caption.main == "a photo of a dog" and caption.others == ("a dog outside", "one dog")
    assert caption.main_share == pytest.approx(1 / 3)


# ---- weights ----------------------------------------------------------------------------------


def test_an_example_has_its_weight_and_validation_none(config):
    weighed = dataclasses.replace(config, weight_key="score", score_key="score", min_score=0.0)
    source = open_source(weighed, "train")
    batch = next(start(choice(weighed, empty="keep")))
    assert batch["weight"].dtype == np.float32 and batch["weight"].shape == (len(batch["tokens"]),)
    scores = {float(np.float32(source.example(i)["weight"])) for i in range(len(source))}
    assert {float(weight) for weight in batch["weight"]} <= scores and len(scores) > 5
    assert "weight" not in next(start(choice(config, empty="keep")))
    fixed = FixedExamples(weighed, {}, split="train", count=4, rows=4)
    with ThreadPoolExecutor(1) as executor:
        assert "weight" not in fixed.read(fixed.groups[0], executor)


def test_a_weight_that_is_none_is_refused_with_its_example(config):
    source = open_source(dataclasses.replace(config, weight_key="score"), "train")
    with pytest.raises(DataError, match=r"example \d+: data.weight_key = 'score' is nan"):
        for i in range(len(source)):
            source.example(i)
    with pytest.raises(DataError, match="data.weight_key is 'text', which is no number"):
        open_source(dataclasses.replace(config, weight_key="text"), "train")


# ---- scores ----------------------------------------------------------------------------------


def test_examples_with_a_low_score_are_left_out_and_counted(config, caplog):
    good = dataclasses.replace(config, score_key="score", min_score=0.75)
    source = open_source(good, "train")
    texts = [source.text(i) for i in range(len(source)) if source.text(i)]
    assert texts == [f"{i} main" for i in range(45, COUNT) if i % 10 != 9 and i != 50]
    assert "left out: 46 score below 0.75" in caplog.text  # 45, and the one that has none
    summary = start(choice(good, empty="skip")).summary
    assert summary.lines[1:] == ("  6 not used: no caption", "  42 not used: score below 0.75")
    assert summary.scalars == {
        "not_used": 48, "not_used_no_caption": 6, "not_used_score_below_0.75": 42,
    }  # fmt: skip
    with pytest.raises(DataError, match="no example belongs to it .*60 score below 2"):
        open_source(dataclasses.replace(good, min_score=2.0), "train")
    for key in ("none", "text"):
        with pytest.raises(DataError, match=f"data.score_key is '{key}', which is no number"):
            open_source(dataclasses.replace(good, score_key=key), "train")
    with pytest.raises(ValueError, match="data.min_score is 0.5, but data.score_key is empty"):
        DataConfig(min_score=0.5)


def test_quality_tags_are_those_of_the_score(config):
    captions = CaptionConfig(quality_tags=((0.75, "best"), (0.0, "worst")))
    told = open_source(dataclasses.replace(config, score_key="score", captions=captions), "train")
    for i in range(len(told)):
        if i != 50 and i % 10 != 9:  # one has no score, some have no caption
            assert told.text(i) == f"{'best' if i >= 45 else 'worst'}, {i} main"
    assert told.text(50) == "50 main" and not told.text(49)
    with pytest.raises(ValueError, match="quality_tags is set, but data.score_key is empty"):
        DataConfig(captions=captions)


# ---- buckets ---------------------------------------------------------------------------------


def test_batches_share_a_bucket_and_an_epoch_is_everything(config):
    config = buckets(config)
    iterator = start(config)
    seen, shapes = collections.Counter(), set()
    for _ in range(3 * COUNT // 4):
        announced = iterator.next_shape
        batch = next(iterator)
        height, width = batch["image"].shape[1:3]
        assert (height, width) == announced and height * width <= 32**2
        assert height % 8 == width % 8 == 0
        shapes.add(announced)
        for number in batch["tokens"][:, 0]:
            original = SIZES[number % len(SIZES)]
            distance = abs(np.log(original[1] / original[0]) - np.log(width / height))
            assert number == 0 or distance < 0.2
        seen.update(batch["tokens"][:, 0].tolist())
    iterator.close()
    # 12 pictures of each size, whole batches of 4 (a token 0 is 0, or one of six without words).
    assert all(seen[i] == 3 for i in range(1, COUNT) if i % 10 != 9) and seen[0] == 3 * 7
    assert shapes == {(32, 32), (24, 40), (40, 24)}
    scalars = iterator.summary.scalars
    assert (scalars["bucket_32x32"], scalars["bucket_40x24"]) == (24, 24)


def test_hosts_agree_on_the_bucket_and_share_the_batch(config):
    config = buckets(dataclasses.replace(config, crop="random", flip=True))
    whole = take(start(config, number_shapes={"size": (4,)}), 20)
    parts = [take(start(config, number_shapes={"size": (4,)}, process_index=i, process_count=2), 20)
             for i in range(2)]  # fmt: skip
    joined = [{name: np.concatenate([one[name], other[name]]) for name in one}
              for one, other in zip(*parts, strict=True)]  # fmt: skip
    assert_equal(joined, whole)


def test_buckets_resume_at_the_example(config):
    config = buckets(config)
    reference = take(start(config), 40)
    iterator = start(config)
    take(iterator, 17)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = start(config)
    resumed.set_state(state)
    assert_equal(take(resumed, 23), reference[17:])
    with pytest.raises(DataError, match="buckets: .*step"):
        start(buckets(config, step=16)).set_state(state)
    with pytest.raises(DataError, match="buckets: .* in the state, None here"):
        start(dataclasses.replace(config, buckets=DataConfig().buckets)).set_state(state)


def test_the_summary_counts_what_is_refused_and_moved(config):
    # 40 x 40 onto 32 x 32 is 0.8 times the side, and 30 x 61 onto 24 x 40 too.
    summary = start(buckets(config, max_upscale=0.76)).summary
    text, sizes = "\n".join(summary.lines), ("32x32", "40x24", "24x40")
    assert [summary.scalars[f"bucket_{size}"] for size in sizes] == [12, 12, 12]
    assert summary.scalars["not_used"] == 24
    assert summary.scalars["not_used_would_be_enlarged_too_much"] == 24
    assert "32x32: 12" in text and "24 not used: would be enlarged too much" in text
    assert "0 pictures do not fill a batch" in text
    closed = start(buckets(dataclasses.replace(config, batch_size=20))).summary
    assert "closed for want of a batch" in "\n".join(closed.lines)
    with pytest.raises(DataError, match="the buckets refuse each of 60 pictures"):
        start(buckets(config, max_upscale=0.1))


def test_worker_processes_can_receive_a_stream(config):
    source = open_source(config, "train")
    stream, _ = make_stream(buckets(config), [buckets(config)], [source], seed=1, shuffle=True)
    copy = pickle.loads(pickle.dumps(stream))
    for place in (0, 5, 333):
        assert copy.locate(place) == stream.locate(place)
        np.testing.assert_array_equal(copy[place]["image"], stream[place]["image"])


# ---- mixtures --------------------------------------------------------------------------------


def origins(batches):
    """Of each batch how many rows are of photos; shapes say no number."""
    return [int((batch["tokens"] > 0).sum()) for batch in batches]


@pytest.fixture
def mixed(config):
    """Photos with captions, and shapes, whose captions have no number, three to one."""
    photos = Part(name="photos", weight=3.0)
    shapes = Part(name="captioned_shapes", start=10, end=20)
    config = choice(config, empty="skip")
    return dataclasses.replace(
        config, name="captioned_shapes", shapes_train=20, shapes_test=4, mixture=(photos, shapes)
    )


class OrZero(Numbers):
    def encode(self, texts):
        found = [text.split(" ")[0] for text in texts]
        return np.array([[int(w) + 1 if w.isdigit() else 0] for w in found], np.int32)


def begin(config, **options):
    return make_iterator(config, {"tokens": OrZero()}, **{"split": "train", "seed": 1} | options)


def test_a_mixture_by_phases(mixed):
    batches = take(begin(mixed), 34)
    assert origins(batches) == [4] * 10 + [3] * 10 + [4] * 14
    # 40 + 30 + 56 rows of photos: two epochs of the 54 that have words, and 18 of the third.
    rows = [int(n) for batch in batches for n in batch["tokens"][:, 0] if n]
    words = sorted(i + 1 for i in range(COUNT) if i % 10 != 9)
    assert sorted(rows[:54]) == sorted(rows[54:108]) == words and rows[:54] != rows[54:108]


def with_class(mixed, own, of_class):
    """Photos and, as many, pictures of the class; loss weights of both."""
    photos = Part(name="photos", loss_weight=own)
    shapes = Part(name="captioned_shapes", loss_weight=of_class)
    return dataclasses.replace(mixed, mixture=(photos, shapes))


def test_prior_preservation_in_both_conventions_of_the_loss(mixed):
    """FT-40: 0.3 of instances and 0.1 of the class, weight 1; each batch has as many of both."""
    found = {}
    for own, of_class in ((1.0, 1.0), (2.0, 2.0), (1.0, 0.0), (1.0, 0.5)):
        for batch in take(begin(with_class(mixed, own, of_class)), 5):
            photo = batch["tokens"][:, 0] > 0
            assert photo.sum() == len(photo) / 2  # captions and pictures stay together
            weight = batch.get("weight", np.ones(len(photo), np.float32))
            np.testing.assert_array_equal(weight, np.where(photo, own, of_class))
            found[own, of_class] = np.mean(np.where(photo, 0.3, 0.1) * weight)
    np.testing.assert_allclose(found[1.0, 1.0], 0.2)  # one mean over the batch, as kohya's
    np.testing.assert_allclose(found[2.0, 2.0], 0.4)  # the sum of two means, as diffusers'
    np.testing.assert_allclose(found[1.0, 0.0], 0.15)
    np.testing.assert_allclose(found[1.0, 0.5], 0.175)


def test_a_loss_weight_multiplies_the_weight_of_the_example(mixed):
    found = []
    for loss_weight in (1.0, 3.0):
        part = Part(name="photos", score_key="score", min_score=0.0, loss_weight=loss_weight)
        changed = {"name": "photos", "weight_key": "score", "mixture": (part,)}
        found.append(next(begin(dataclasses.replace(mixed, **changed))))
    one, three = found
    np.testing.assert_allclose(three["weight"], 3 * one["weight"], rtol=1e-6)
    np.testing.assert_array_equal(three["tokens"], one["tokens"])


def test_mixtures_on_hosts_and_after_a_stop(mixed):
    reference = take(begin(mixed), 24)
    parts = [take(begin(mixed, process_index=i, process_count=2), 24) for i in range(2)]
    joined = [{name: np.concatenate([one[name], other[name]]) for name in one}
              for one, other in zip(*parts, strict=True)]  # fmt: skip
    assert_equal(joined, reference)
    resumed = begin(mixed)
    resumed.set_state(resumed.get_state() | {"step": 13})
    assert_equal(take(resumed, 11), reference[13:])
    other = dataclasses.replace(mixed, mixture=mixed.mixture[:1])
    with pytest.raises(DataError, match="mixture: "):
        begin(other).set_state(resumed.get_state())


def test_a_curriculum_of_resolutions(mixed):
    """Small pictures first, then both, whole batches of one shape, then large ones."""
    small, large = Part(name="photos", end=8), Part(name="photos", start=4, resolution=48)
    config = dataclasses.replace(mixed, mixture=(small, large))
    iterator = begin(config)
    announced = []
    for _ in range(14):
        announced.append(iterator.next_shape)
        assert next(iterator)["image"].shape == (4, *announced[-1], 3)
    iterator.close()
    sides = [shape[0] for shape in announced]
    assert sides[:4] == [32] * 4 and sides[8:] == [48] * 6
    assert sorted(sides[4:8]) == [32, 32, 48, 48]


def test_a_curriculum_of_scores(mixed):
    """Everything first, then the best alone, with its own epochs."""
    every, best = Part(name="photos", end=5), Part(name="photos", start=5, score_key="score",
                                                   min_score=0.9)  # fmt: skip
    config = dataclasses.replace(mixed, mixture=(every, best))
    batches = take(begin(config), 10)
    rows = [[int(n) - 1 for batch in part for n in batch["tokens"][:, 0]]
            for part in (batches[:5], batches[5:])]  # fmt: skip
    assert min(rows[0]) < 30 and sorted(rows[1]) == sorted([*range(54, 59)] * 4)


def test_a_mixture_of_buckets(mixed):
    photos, shapes = mixed.mixture
    config = dataclasses.replace(
        buckets(mixed), mixture=(photos, dataclasses.replace(shapes, start=0, end=0))
    )
    batches = take(begin(config), 20)
    assert sorted(origins(batches)) == [0] * 5 + [4] * 15  # whole batches, three to one
    assert {batch["image"].shape[1:3] for batch in batches} == {(32, 32), (24, 40), (40, 24)}


def test_the_evaluation_split_of_a_mixture(mixed):
    found = sources.open_parts(dataclasses.replace(mixed, test_share=0.2), "test")
    assert [source.split for source in found] == ["test", "test"] and len(found[1]) == 4
    assert len(sources.captions(mixed, "train")) == 54 + 20
    with pytest.raises(DataError, match="split 'dev' is neither data.split = 'train' nor"):
        sources.open_parts(mixed, "dev")
