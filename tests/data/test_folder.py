"""image_text_folder: splits, what is skipped and why, a changed folder imported anew."""

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.data.builders.opening import prepared_builder
from sdjax.data.builders.raw_import import limit_of_test
from sdjax.data.caption_choice import Caption, CaptionConfig
from sdjax.data.raw import formats
from sdjax.data.raw.clean import Rules, clean
from sdjax.data.raw.rows import Fields, Row, fraction
from sdjax.data.sources import DataConfig, DataError, captions, open_source
from tests.odd_names import ODD

SHARED = os.environ.get("SDJAX_TEST_DATA", "")
needs_shared = pytest.mark.skipif(not SHARED, reason="SDJAX_TEST_DATA is not set")


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose name is taken for no pattern, URL or word of a shell."""
    (tmp_path / ODD).mkdir()
    return tmp_path / ODD


def write_images(folder, count, *, first=0, size=(24, 20)):
    """Writes solid PNGs and their metadata; image n is of grey n and is called "number n"."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(first, first + count):
        Image.new("RGB", size, (number, number, number)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def folder_config(path, tmp_path, **fields):
    return DataConfig(
        name="image_text_folder", path=str(path), data_dir=str(tmp_path / "tfds"), **fields
    )


def read_all(folder):
    """([(name, caption)], skips) of a folder, as every way in cleans it."""
    used, left_out = [], []
    for shard in formats.list_shards(str(folder), "image_text_folder", Fields()):
        for item in formats.read(shard, Fields()):
            item = clean(item, Rules()) if isinstance(item, Row) else item
            if hasattr(item, "reason"):
                left_out.append(item)
            else:
                used.append((item.name, item.text))
    return used, left_out


def skipped(config):
    report = json.loads((Path(prepared_builder(config).data_dir) / "skipped.json").read_text())
    return {entry["name"]: entry["reason"] for entry in report}


def test_split_folders(tmp_path):
    write_images(tmp_path / "d" / "train", 5)
    write_images(tmp_path / "d" / "test", 2, first=100)
    write_images(tmp_path / "d" / "val", 1, first=200)
    config = folder_config(tmp_path / "d", tmp_path)
    assert captions(config, "train") == [f"number {n}" for n in range(5)]
    assert captions(config, "test") == ["number 100", "number 101"]
    assert captions(config, "validation") == ["number 200"]
    source = open_source(config, "test")
    assert source[1]["text"] == "number 101"
    assert source[1]["image"].shape == (20, 24, 3) and (source[1]["image"] == 101).all()


def test_flat_folder_is_split_by_a_hash_of_the_names(tmp_path):
    config = folder_config(write_images(tmp_path / "d", 40), tmp_path)
    train, test = captions(config, "train"), captions(config, "test")
    assert sorted(train + test) == sorted(f"number {n}" for n in range(40))
    assert 1 <= len(test) <= 5
    # Growing the folder moves nothing that was in test to train, or the other way round.
    names = [f"{n}.png" for n in range(2000)]
    limit, later = limit_of_test(set(names[:1000])), limit_of_test(set(names))
    assert limit <= later == 0.03
    assert 15 <= sum(fraction(name) <= limit for name in names[:1000]) <= 45
    assert limit_of_test({"0.png"}) == -1
    high = [name for name in names if fraction(name) > 0.5][:2]
    assert limit_of_test(set(high)) == min(map(fraction, high))  # one of them, at least


def test_a_changed_folder_is_imported_anew(tmp_path):
    folder = write_images(tmp_path / "d" / "train", 3)
    config = folder_config(folder.parent, tmp_path)
    first = prepared_builder(config).data_dir
    stamp = os.stat(first).st_mtime_ns
    assert prepared_builder(config).data_dir == first
    assert os.stat(first).st_mtime_ns == stamp  # reused
    Image.new("RGB", (24, 20), (250, 250, 250)).save(folder / "1.png")
    os.utime(folder / "1.png", ns=(1, 1))
    second = prepared_builder(config).data_dir
    assert second != first
    values = {open_source(config, s)[i]["image"][0, 0, 0]
              for s in ("train", "test") for i in range(len(open_source(config, s)))}  # fmt: skip
    assert values == {0, 250, 2}
    with (folder / "metadata.jsonl").open("a") as metadata:
        metadata.write('{"file_name": "0.png", "text": "nought"}\n')
    assert "nought" in captions(config, "train") + captions(config, "test")
    assert prepared_builder(folder_config(folder.parent, tmp_path, min_side=8)).data_dir not in (
        first, second)  # fmt: skip


def test_bad_examples_are_left_out_and_reported(tmp_path):
    folder = write_images(tmp_path / "d" / "train", 4)
    write_images(tmp_path / "d" / "test", 1, first=9)
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)
    Image.fromarray(noise).save(folder / "0.png")
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:9999])
    (folder / "2.png").write_bytes(b"")
    with (folder / "metadata.jsonl").open("a") as metadata:
        metadata.write('{"file_name": "3.png"}\n\n{"file_name": "../x.png", "text": "x"}\n{oops\n')
        metadata.write('{"file_name": "gone.png", "text": "x"}\n')
    config = folder_config(tmp_path / "d", tmp_path)
    assert captions(config, "train") == ["number 1", "number 3"]
    assert skipped(config) == {
        "train/0.png": "truncated",
        "train/2.png": "empty_file",
        "train/metadata.jsonl line 5 (train/3.png)": "no_caption",
        "train/metadata.jsonl line 7 (../x.png)": "unsafe_path",
        "train/metadata.jsonl line 8": "bad_json",
        "train/metadata.jsonl line 9 (train/gone.png)": "missing_file",
    }
    with pytest.raises(DataError, match=r"6 skipped .*max_bad_examples = 5") as caught:
        open_source(folder_config(tmp_path / "d", tmp_path, max_bad_examples=5), "train")
    assert "train/0.png: truncated" in str(caught.value)
    open_source(folder_config(tmp_path / "d", tmp_path, max_bad_examples=6), "train")


def test_bad_bytes_and_marks(tmp_path):
    folder = write_images(tmp_path / "d", 2)
    (folder / "metadata.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b'{"file_name": "0.png", "text": "  a\\n boat \\u200b"}\r\n\r\n'
        b'{"file_name": "1.png", "text": "caf\xe9"}\r\n'
        b'{"file_name": "1.png", "text": "\\ud83d"}\r\n'
        b'{"file_name": "1.png", "text": 42}\n"line"\n{"text": "x"}\n'
        b'{"file_name": "1.png", "text": "b"}'
    )
    used, left_out = read_all(folder)
    assert used == [("0.png", "a boat"), ("1.png", "b")]
    reasons = "bad_encoding bad_encoding caption_not_text bad_record no_file_name".split()
    assert [skip.reason for skip in left_out] == reasons


def test_caption_field_can_be_chosen(tmp_path):
    folder = write_images(tmp_path / "d", 2)
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "prompt": "zero"}\n{"file_name": "1.png", "prompt": "one"}\n'
    )
    config = folder_config(folder, tmp_path, text_key="prompt")
    assert {*captions(config, "train"), *captions(config, "test")} == {"zero", "one"}
    with pytest.raises(DataError, match="not one image can be used: .*no_caption.*'text'"):
        open_source(folder_config(folder, tmp_path), "train")


def test_pictures_without_captions_are_used_where_texts_take_their_place(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 20), (number, number, number)).save(folder / f"{number}.png")
    texts = CaptionConfig(texts=("a <cat>", "my <cat>"))
    config = folder_config(folder, tmp_path, captions=texts, eval_split="train")
    assert captions(config, "train") == ["a <cat>"] * 3
    example = open_source(config, "train")[0]
    assert example["caption"] == Caption("a <cat>", ("my <cat>",), 0.5)
    needing = dataclasses.replace(config, captions=CaptionConfig(texts=("{}, a <cat>",)))
    with pytest.raises(DataError, match="not one image can be used: 3 skipped .3 no_caption"):
        open_source(needing, "train")


def test_no_test_split_is_cut_off_where_none_is_asked_for(tmp_path):
    folder = write_images(tmp_path / "d", 5)
    every = [f"number {number}" for number in range(5)]
    assert captions(folder_config(folder, tmp_path, eval_split="train"), "train") == every
    cut = folder_config(folder, tmp_path)
    assert len(captions(cut, "train")) == 4 and len(captions(cut, "test")) == 1


def test_plain_files_are_stored_as_they_are_and_others_as_png(tmp_path):
    folder = write_images(tmp_path / "d" / "train", 1)
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(noise).save(folder / "0.png", "JPEG")  # named wrongly: content decides
    Image.fromarray(noise).convert("CMYK").save(folder / "1.png", "TIFF")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "0"}\n{"file_name": "1.png", "text": "1"}\n'
    )
    write_images(tmp_path / "d" / "test", 1)
    records = open_source(folder_config(tmp_path / "d", tmp_path), "train")._records
    assert records[0]["image"] == (folder / "0.png").read_bytes()
    assert records[1]["image"].startswith(b"\x89PNG")


def test_long_metadata_is_cut_into_shards_that_lose_nothing(tmp_path):
    folder = write_images(tmp_path / "d", 3)
    rows = [(f"{n % 3}.png", f"caption {n}\n, of {n}") for n in range(1203)]
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)
    )
    expected = [(name, " ".join(text.split())) for name, text in rows]
    for _ in range(2):
        shards = formats.list_shards(str(folder), "image_text_folder", Fields())
        assert len(shards) == 3
        used, left_out = read_all(folder)
        assert used == expected and not left_out
        (folder / "metadata.jsonl").unlink(missing_ok=True)  # then the CSV is read


def test_captions_in_files_beside_the_images(tmp_path):
    for folder, count in (("train/a", 3), ("train/b", 2), ("test", 1)):
        write_images(tmp_path / "d" / folder, count)
        for image in (tmp_path / "d" / folder).glob("*.png"):
            image.with_suffix(".txt").write_text(f"{folder} {image.stem}\n")
        (tmp_path / "d" / folder / "metadata.jsonl").unlink()
    (tmp_path / "d" / "train" / "a" / "1.txt").unlink()
    config = folder_config(tmp_path / "d", tmp_path)
    assert captions(config, "train") == ["train/a 0", "train/a 2", "train/b 0", "train/b 1"]
    assert captions(config, "test") == ["test 0"]
    assert skipped(config) == {"train/a/1.png": "no_caption"}
    (tmp_path / "d" / "train" / "a" / "1.txt").write_text("it is back")
    assert "it is back" in captions(config, "train")


def test_several_captions_and_the_size_are_stored(tmp_path):
    folder = write_images(tmp_path / "d" / "train", 2)
    write_images(tmp_path / "d" / "test", 1)
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "zero", "captions": ["nought", " ", "zero", 4, "nil"]}\n'
        '{"file_name": "1.png", "text": ["one", "eins"]}\n'
    )
    records = open_source(folder_config(tmp_path / "d", tmp_path), "train")._records
    assert [list(record["captions"]) for record in records] == [[b"nought", b"nil"], [b"eins"]]
    assert [(record["width"], record["height"]) for record in records] == [(24, 20)] * 2
    assert records[1]["text"] == b"one"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "not there; expected a folder of images with metadata.jsonl"),
        (lambda path: path.write_text(""), "no folder"),
        (lambda path: path.mkdir(), "no metadata.jsonl, nor has a subfolder train"),
        (lambda path: (path.mkdir(), (path / "metadata.jsonl").touch()), "not one image can be"),
        (
            lambda path: (path.mkdir(), (path / "metadata.csv").write_text("a,b\n1,2\n")),
            r"has the columns \['a', 'b'\]; expected file_name",
        ),
    ],
)
def test_missing_or_empty_folder(tmp_path, make, message):
    make(tmp_path / "d")
    with pytest.raises(DataError, match=message) as caught:
        open_source(folder_config(tmp_path / "d", tmp_path), "train")
    assert str(tmp_path / "d") in str(caught.value)


def test_a_folder_without_one_usable_image(tmp_path):
    folder = write_images(tmp_path / "d", 3, size=(4, 4))
    with pytest.raises(DataError, match=r"not one image can be used: 3 skipped \(3 too_small\)"):
        open_source(folder_config(folder, tmp_path), "train")
    assert not list((tmp_path / "tfds").rglob("dataset_info.json"))


def test_path_is_required():
    with pytest.raises(ValueError, match="data.path is empty"):
        DataConfig(name="image_text_folder")


def test_unknown_split_is_named(tmp_path):
    config = folder_config(write_images(tmp_path / "d", 4), tmp_path)
    with pytest.raises(DataError, match=r"split 'validation' is not in .*\['test', 'train'\]"):
        open_source(config, "validation")
    assert len(open_source(config, "train[:2]")) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_data_dir(tmp_path):
    folder = write_images(tmp_path / "d", 3)
    (tmp_path / "tfds").mkdir(mode=0o500)
    with pytest.raises(DataError, match="cannot prepare .*data.data_dir"):
        open_source(folder_config(folder, tmp_path), "train")


def test_data_dir_that_is_a_file(tmp_path):
    folder = write_images(tmp_path / "d", 3)
    (tmp_path / "tfds").write_text("")
    with pytest.raises(DataError, match="cannot prepare .*data.data_dir"):
        open_source(folder_config(folder, tmp_path), "train")


@needs_shared
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_dirty_folder(tmp_path):
    """Each case of the manifest is used or skipped as it says, and reads as it should."""
    manifest = json.loads((Path(SHARED) / "dirty" / "manifest.json").read_text())
    config = folder_config(Path(SHARED) / "dirty", tmp_path)
    used: dict[str, list] = {}
    for split in ("train", "test"):
        source = open_source(config, split)
        for index in range(len(source)):
            name = source._records[index]["file_name"].decode()
            used.setdefault(name, []).append(source[index])
    left_out = skipped(config)
    reasons = {name.split(" (")[-1].rstrip(")"): reason for name, reason in left_out.items()}
    reasons |= {name.split(" (")[0]: reason for name, reason in left_out.items()}
    for case in manifest["cases"]:
        if case["expect"] == "skip" and case.get("also_ok") != "use":
            line = f"metadata.jsonl line {case['metadata_line']}"
            reason = reasons.get(case["file_name"], reasons.get(line))
            assert reason == (None if case["reason"] == "blank_line" else case["reason"]), case
        if case["expect"] == "use" and case["file_name"] not in used:
            assert case.get("also_ok") == "skip", case
        if case["expect"] == "use" and case["file_name"] in used:
            example = used[case["file_name"]][0]
            height, width = example["image"].shape[:2]
            assert [width, height] == case.get("expected_size", [width, height]), case
            mean = example["image"].mean((0, 1))
            tolerance = case.get("mean_tolerance", manifest["mean_tolerance"])
            assert np.abs(mean - case.get("expected_mean_rgb", mean)).max() <= tolerance, case
            assert example["text"] == case.get("expected_caption", example["text"])


@needs_shared
def test_metadata_with_a_byte_order_mark(tmp_path):
    shutil.copytree(Path(SHARED) / "dirty", tmp_path / "d", ignore=shutil.ignore_patterns("*.tar"))
    source = tmp_path / "d" / "metadata_bom_crlf.jsonl"
    source.replace(tmp_path / "d" / "metadata.jsonl")
    used, left_out = read_all(tmp_path / "d")
    assert len(used) == 3 and not left_out


@needs_shared
def test_metadata_csv_of_the_dirty_set(tmp_path):
    shutil.copytree(Path(SHARED) / "dirty", tmp_path / "d", ignore=shutil.ignore_patterns("*.tar"))
    (tmp_path / "d" / "metadata.jsonl").unlink()
    used, left_out = read_all(tmp_path / "d")
    assert used == [
        ("good.jpg", "two parrots, side by side"),
        ("good.png", 'caps with a "quoted" word and a line break'),
    ]
    assert [skip.reason for skip in left_out] == ["no_caption"]
