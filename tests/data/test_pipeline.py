"""Batches: determinism, hosts, resumption, epochs, other TFDS datasets, and what cannot be used."""

import dataclasses
import gc
import json
import re
import sys
import time
import tracemalloc
from pathlib import Path

import grain.python as grain
import numpy as np
import pytest
from PIL import Image

from sdjax.data.builders.opening import prepared_builder
from sdjax.data.caption_choice import CaptionConfig
from sdjax.data.pipeline import DataConfig, DataError, captions, make_iterator
from sdjax.data.sources import open_source
from sdjax.data.tfds.records import Record, Records
from sdjax.data.tfds.tfds_on_cpu import tfds


class Letters:
    """A tokenizer stand-in: code points, padded."""

    def encode(self, texts):
        codes = np.zeros((len(texts), 80), np.int32)
        for row, text in zip(codes, texts, strict=True):
            row[: len(text)] = [ord(letter) for letter in text]
        return codes


class TinyLabels(tfds.core.GeneratorBasedBuilder):
    """Ten grey pictures with labels, a text, an array image and a number."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "picture": tfds.features.Image(shape=(None, None, 1)),
                    "raw": tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(names=["ice_cream", "dog"]),
                    "note": tfds.features.Text(),
                    "number": tfds.features.Scalar(np.int64),
                }
            )
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "validation": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield (
                str(i),
                {
                    "picture": np.full((12, 10, 1), 20 * i, np.uint8),
                    "raw": np.full((8, 8, 3), 20 * i, np.uint8),
                    "label": i % 2,
                    "note": f"note {i}",
                    "number": i,
                },
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def config(data_dir):
    return DataConfig(
        data_dir=data_dir, shapes_train=50, shapes_test=5, batch_size=8, resolution=32,
        crop="random", flip=True,
        captions=CaptionConfig(swap_sides=False),  # captions tell examples apart
    )  # fmt: skip


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


def start(config, **options):
    return make_iterator(config, {"tokens": Letters()}, **{"split": "train", "seed": 1} | options)


def test_batches_have_the_promised_form(config):
    (batch,) = take(start(config), 1)
    assert batch["image"].shape == (8, 32, 32, 3) and batch["image"].dtype == np.float32
    assert -1 <= batch["image"].min() < -0.5 and 0.7 < batch["image"].max() <= 1
    assert batch["tokens"].shape == (8, 80) and batch["tokens"].dtype == np.int32
    (batch,) = take(make_iterator(config, {}, split="test", seed=1), 1)
    assert batch.keys() == {"image"}
    both = {"tokens": Letters(), "tokens_2": Letters()}
    (batch,) = take(
        make_iterator(config, both, split="test", seed=1, number_shapes={"size": (4,)}), 1
    )
    assert batch.keys() == {"image", "size", "tokens", "tokens_2"}
    assert batch["size"].shape == (8, 4) and batch["size"].dtype == np.int32
    assert (batch["size"] == [64, 64, 0, 0]).all()


def test_batches_depend_on_the_seed_alone(config):
    reference = take(start(config), 14)  # two epochs and a bit
    for changes in ({"prefetch": 0}, {"threads": 1, "prefetch": 2}, {"threads": 3, "prefetch": 9}):
        assert_equal(take(start(dataclasses.replace(config, **changes)), 14), reference)
    other = take(start(config, seed=2), 1)
    assert not (other[0]["image"] == reference[0]["image"]).all()


def test_batches_are_those_that_checkpoints_of_old_runs_continue(data_dir):
    """The stream of a single dataset, spelled out with Grain and Pillow."""
    config = DataConfig(name="tiny_labels", data_dir=data_dir, image_key="picture", batch_size=4,
                        text_key="note", resolution=8, crop="random", flip=True)  # fmt: skip
    source = open_source(config, "train")

    def transform(example, rng):
        image = Image.fromarray(example["image"]).resize((8, round(12 * 8 / 10)), 1)  # Lanczos
        top, left = rng.integers(image.height - 8 + 1), rng.integers(1)
        pixels = np.asarray(image)[top : top + 8, left : left + 8]
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return {
            "image": pixels.astype(np.float32) / np.float32(127.5) - np.float32(1),
            "tokens": Letters().encode([example["text"]])[0],
        }

    stream = grain.MapDataset.source(source).seed(5).shuffle().repeat().random_map(transform)
    stream = stream.batch(4, drop_remainder=True)
    iterator = start(config, seed=5)
    assert_equal(take(iterator, 7), [stream[i] for i in range(7)])
    assert iterator.get_state() == {
        "step": 7, "dataset": "tiny_labels/1.0.0", "split": "train", "examples": 10,
        "batch_size": 4, "seed": 5, "shuffle": True,
    }  # fmt: skip


@pytest.mark.parametrize("hosts", [2, 4])
def test_global_batch_does_not_depend_on_hosts(config, hosts):
    reference = take(start(config), 8)
    parts = [take(start(config, process_index=i, process_count=hosts), 8) for i in range(hosts)]
    joined = [{name: np.concatenate([part[step][name] for part in parts]) for name in reference[0]}
              for step in range(8)]  # fmt: skip
    assert_equal(joined, reference)


def test_hosts_share_no_example_and_together_read_each_once_an_epoch(config):
    config = dataclasses.replace(config, shapes_train=48)  # whole batches: 6 an epoch
    iterators = [start(config, process_index=i, process_count=4) for i in range(4)]
    stored = sorted(Letters().encode([text])[0].tobytes() for text in captions(config, "train"))
    for _ in range(2):
        parts = [take(iterator, 6) for iterator in iterators]
        assert [sum(len(batch["image"]) for batch in part) for part in parts] == [12] * 4
        texts, images = (
            [row.tobytes() for part in parts for batch in part for row in batch[name]]
            for name in ("tokens", "image")
        )
        assert sorted(texts) == stored
        assert len(set(images)) == 48  # captions repeat, pictures do not


def test_state_restores_exactly(config):
    reference = take(start(config), 12)
    iterator = start(config)
    take(iterator, 5)
    state = json.loads(json.dumps(iterator.get_state()))
    assert_equal(take(iterator, 2), reference[5:7])  # goes on after close
    resumed = start(config)
    next(resumed)
    resumed.set_state(state)
    assert resumed.step == 5
    assert_equal(take(resumed, 7), reference[5:])
    # and on another number of hosts
    parts = []
    for index in range(2):
        part = start(config, process_index=index, process_count=2)
        part.set_state(state)
        parts.append(take(part, 1)[0])
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert_equal([joined], reference[5:6])


def test_state_of_another_stream_is_refused(config):
    state = start(config).get_state()
    with pytest.raises(DataError, match="seed: 1 in the state, 2 here"):
        start(config, seed=2).set_state(state)
    with pytest.raises(DataError, match=r"split: 'train' in the state, 'test' here; examples: 50"):
        start(config, split="test").set_state(state)
    with pytest.raises(DataError, match="step is None"):
        start(config).set_state({**state, "step": None})


def test_worker_processes_give_the_same_batches(config):
    reference = take(start(config), 6)
    iterator = start(dataclasses.replace(config, workers=1))
    iterator.set_state({**iterator.get_state(), "step": 2})
    assert_equal(take(iterator, 4), reference[2:])


def test_every_epoch_is_a_different_order_of_everything(config):
    iterator = start(config)
    assert (iterator.examples_per_epoch, iterator.epoch, iterator.examples_seen) == (50, 0, 0)
    rows = np.concatenate([batch["tokens"] for batch in take(iterator, 25)])  # four epochs
    assert (iterator.epoch, iterator.examples_seen) == (4, 200)
    epochs = [[row.tobytes() for row in rows[i : i + 50]] for i in range(0, 200, 50)]
    stored = sorted(Letters().encode([text])[0].tobytes() for text in captions(config, "train"))
    assert all(sorted(epoch) == stored for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_without_shuffling_the_order_is_that_on_disk(config):
    rows = take(start(config, shuffle=False), 2)
    texts = captions(config, "train")
    np.testing.assert_array_equal(rows[1]["tokens"], Letters().encode(texts[8:16]))


def test_augmentation_differs_between_epochs(config):
    config = dataclasses.replace(config, shapes_train=1, batch_size=1)
    images = [batch["image"].tobytes() for batch in take(start(config), 20)]
    assert len(set(images)) == 2  # square pictures: only the flip is random


def test_dataset_smaller_than_a_batch_repeats(config, caplog):
    (batch,) = take(start(config, split="test"), 1)
    assert len({row.tobytes() for row in batch["tokens"]}) <= 5
    assert "has 5 examples, fewer than data.batch_size = 8" in caplog.text


def test_batch_size_must_divide(config):
    with pytest.raises(ValueError, match="data.batch_size is 8, not divisible by the 3 hosts; set"):
        start(config, process_count=3)


@pytest.mark.parametrize(
    "field, value",
    [("batch_size", 0), ("resolution", -1), ("crop", "left"), ("label_template", "a photo"),
     ("name", ""), ("threads", -1), ("max_aspect", -1.0)],
)  # fmt: skip
def test_config_names_the_wrong_field(field, value):
    with pytest.raises(ValueError, match=f"data.{field}"):
        DataConfig(**{field: value})


def test_summary(config):
    summary = start(config).summary
    assert len(summary.lines) == 1 and summary.scalars == {}
    assert re.search(r"captioned_shapes.*, split train, 50 examples", summary.lines[0])


def test_records_are_those_of_tfds(data_dir):
    """Every kind of feature, those that are read directly and those that TFDS decodes."""
    config = DataConfig(name="tiny_labels", data_dir=data_dir, image_key="picture",
                        text_key="label")  # fmt: skip
    open_source(config, "train")  # makes it
    builder = tfds.builder_from_directory(Path(data_dir) / "tiny_labels" / "1.0.0")
    for decoders in ({}, {"picture": tfds.decode.SkipDecoding()}):
        theirs = builder.as_data_source("train", decoders=decoders)
        ours = Records(builder, "train", decoders)
        assert len(ours) == len(theirs) == 10
        for one, other in zip((ours[i] for i in range(10)), theirs, strict=True):
            assert set(one) == set(other)
            for name, value in other.items():
                if name == "picture" and not decoders:  # Pillow decodes none here
                    with pytest.raises(DataError, match="'picture' is a Image, which is not read"):
                        one[name]
                    continue
                assert type(one[name]) is type(value)
                np.testing.assert_array_equal(one[name], value)
                assert getattr(one[name], "dtype", None) == getattr(value, "dtype", None)
    assert {"raw", "label", "note", "number"} <= set(ours.readers)
    assert "text" not in ours[0] and ours[0].get("text") is None
    assert Record(b"", ours)["label"] is None  # what ArrayRecord gives past the end of a file


def test_memory_does_not_grow_with_the_batches(config):
    iterator = start(dataclasses.replace(config, prefetch=0, batch_size=2))
    # What other threads of the process hold, of tests before, is not this iterator's.
    mine = [tracemalloc.Filter(True, f"*/{name}/*") for name in ("sdjax", "grain", "numpy", "PIL")]
    tracemalloc.start()
    held = []
    for _ in range(4):
        for _ in range(60):
            next(iterator)
        gc.collect()
        # CPython remembers the 4,096 last names looked up, and Pillow makes such names anew.
        sys._clear_type_cache()
        held.append(
            sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(mine).traces)
        )
    tracemalloc.stop()
    # What leaks, leaks in each round; a batch has 24 kB, one number of each picture has 2.8.
    assert np.diff(held).min() < 1_000


def test_speed(config):
    iterator = start(config)
    next(iterator)
    began = time.process_time()
    for _ in range(20):
        next(iterator)
    iterator.close()
    assert (time.process_time() - began) / 160 < 0.004


def test_other_dataset_with_labels(data_dir):
    config = DataConfig(name="tiny_labels", data_dir=data_dir, image_key="picture",
                        text_key="label", label_template="a sketch of a {}", resolution=8,
                        batch_size=4)  # fmt: skip
    source = open_source(config, "train")
    texts = {int(source[i]["image"][0, 0, 0]) // 20: source[i]["text"] for i in range(10)}
    assert texts == {i: f"a sketch of a {('ice cream', 'dog')[i % 2]}" for i in range(10)}
    assert source[0]["image"].shape == (12, 10, 3)
    (batch,) = take(make_iterator(config, {"tokens": Letters()}, split="validation", seed=0), 1)
    assert batch["image"].shape == (4, 8, 8, 3)


def test_other_dataset_with_text_and_arrays(data_dir):
    config = DataConfig(name="tiny_labels", data_dir=data_dir, image_key="raw", text_key="note")
    example = open_source(config, "train")[0]
    number = int(example["text"].removeprefix("note "))
    assert (example["image"] == 20 * number).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, r"data.image_key is 'image', but tiny_labels/1.0.0 has .*'label', 'note'"),
        ({"image_key": "picture"}, r"data.text_key is 'text', but tiny_labels"),
        ({"image_key": "picture", "text_key": "number"}, "expected a text or a class label"),
    ],
)
def test_wrong_feature_names(data_dir, fields, message):
    config = DataConfig(name="tiny_labels", data_dir=data_dir, **fields)
    with pytest.raises(DataError, match=message):
        open_source(config, "train")


def test_dataset_in_a_sequential_format(tmp_path):
    TinyLabels(data_dir=str(tmp_path), file_format="tfrecord").download_and_prepare()
    config = DataConfig(name="tiny_labels", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="stored as tfrecord(.|\n)*set data.data_dir(.|\n)*convert"):
        open_source(config, "train")


def test_tfds_can_load_its_own_builders():
    pytest.importorskip("importlib_resources")  # TFDS 4.9.10 needs it and does not require it
    assert tfds.builder_cls("mnist").url_infos


def test_unknown_dataset(data_dir):
    with pytest.raises(DataError, match="'no_such_data', which TFDS cannot open"):
        open_source(DataConfig(name="no_such_data", data_dir=data_dir), "train")


def test_damaged_record_is_named(tmp_path):
    """A picture that was good when it was imported, and is not any more."""
    folder = tmp_path / "d" / "train"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' * 3)
    config = DataConfig(name="image_text_folder", path=str(tmp_path / "d"), batch_size=2,
                        data_dir=str(tmp_path / "tfds"), resolution=32)  # fmt: skip
    source = open_source(config, "train")
    good = source._records

    class Damaged:
        def __len__(self):
            return len(good)

        def __getitem__(self, index):
            record = dict(good[index])
            return {**record, "image": record["image"][:900]} if index == 1 else record

    source._records = Damaged()
    assert source[0]["image"].shape == (32, 32, 3)
    with pytest.raises(DataError, match=r"image_text_folder/d-\w+/[\d.]+, split train, example 1: "
                                        r".*truncated.*; delete /"):  # fmt: skip
        source[1]


def test_truncated_storage_is_named(tmp_path):
    config = DataConfig(data_dir=str(tmp_path), shapes_train=30, shapes_test=2, batch_size=4)
    directory = Path(prepared_builder(config).data_dir)
    stored = next(directory.glob("*train*"))
    stored.write_bytes(stored.read_bytes()[: stored.stat().st_size // 2])
    with pytest.raises(DataError, match="captioned_shapes.*cannot be read.*delete /"):
        take(start(config), 8)
