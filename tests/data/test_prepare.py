"""sdjax.prepare: what is kept, what is dropped and why, the same bytes after a kill."""

import base64
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdjax.data.named_images import NamedImage
from sdjax.data.prepare.settings import Settings, Workspace, assign_splits
from sdjax.data.raw import mended
from sdjax.data.raw.clean import Rules, ScoreRule
from sdjax.data.raw.rows import Fields, fraction
from sdjax.data.sources import DataConfig, DataError, open_source
from sdjax.errors import UserError
from sdjax.system import locks
from tests.data.test_raw import encoded, write_parquet, write_tar
from tests.fake_gcs import FakeGCS
from tests.odd_names import ODD

SHARED = os.environ.get("SDJAX_TEST_DATA", "")
needs_shared = pytest.mark.skipif(not SHARED, reason="SDJAX_TEST_DATA is not set")
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose name is taken for no pattern, URL or word of a shell."""
    (tmp_path / ODD).mkdir()
    return tmp_path / ODD


def settings(format="image_text_folder", rules=None, **fields):
    rules = rules or Rules()
    columns = tuple(rule.column for rule in rules.scores)
    return Settings(format, Fields(columns=columns), rules, **fields)


def prepare(source, output, chosen):
    """In this process -> the report."""
    pytest.importorskip("apache_beam")
    from sdjax.data.prepare import pipeline

    return pipeline.run(str(source), chosen, Workspace(str(output)), workers=1)


def picture(seed, size=(40, 30)):
    """Smooth noise, which no other seed's looks like."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def dropped(output):
    lines = (Path(output) / "dropped.jsonl").read_text().splitlines()
    return [(entry["name"], entry["reason"]) for entry in map(json.loads, lines)]


def contents(folder):
    """{name: bytes}, without the lock that a killed process leaves, which locks nothing."""
    files = (path for path in Path(folder).iterdir() if not locks.is_lock(path))
    return {path.name: path.read_bytes() for path in files}


def small_dirty_set(folder):
    """One good picture, its repeats and likenesses, and one of each sort of trouble."""
    folder.mkdir()
    one = picture(1)
    one.save(folder / "one.png")
    one.save(folder / "same.bmp")
    one.resize((80, 60)).save(folder / "larger.png")
    picture(2).save(folder / "two.jpg")
    picture(3).convert("CMYK").save(folder / "cmyk.jpg")
    Image.new("RGBA", (30, 30), (9, 9, 9, 0)).save(folder / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(4).save(folder / "turned.jpg", exif=turned)
    picture(5, (40, 8)).save(folder / "small.png")
    picture(6, (400, 20)).save(folder / "wide.png")
    picture(7, (400, 300)).save(folder / "huge.png")
    (folder / "cut.png").write_bytes(encoded(picture(8, (90, 90)))[:3000])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    picture(9).save(folder / "spam.png")
    names = "one same larger two cmyk clear turned small wide huge cut text empty spam".split()
    files = {path.stem: path.name for path in folder.iterdir()}
    lines = [{"file_name": files[name], "text": f"a {name}"} for name in names]
    lines[-1]["text"] = "buy <b>now</b>"
    lines += [{"file_name": "gone.png", "text": "x"}, {"file_name": "two.jpg", "text": " "}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{\n"
    (folder / "metadata.jsonl").write_text(text)


class Page(HTMLParser):
    """What a page shows; every tag that opens and is no lone one closes."""

    def __init__(self, source):
        super().__init__()
        self.text, self.pictures, self.open = "", [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            data = dict(attributes)["src"].removeprefix("data:image/jpeg;base64,")
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
        elif tag not in ("meta", "br", "td", "tr", "th", "p"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


TROUBLE = {
    "small.png": "too_small", "wide.png": "aspect_ratio", "huge.png": "too_many_pixels",
    "cut.png": "truncated", "text.png": "not_an_image", "empty.png": "empty_file",
    "metadata.jsonl line 14 (spam.png)": "caption_pattern",
    "metadata.jsonl line 15 (gone.png)": "missing_file",
    "metadata.jsonl line 16 (two.jpg)": "no_caption", "metadata.jsonl line 17": "bad_json",
}  # fmt: skip


@pytest.mark.parametrize("mode", ["none", "exact", "near"])
def test_small_dirty_set(tmp_path, mode):
    small_dirty_set(tmp_path / "in")
    rules = Rules(max_pixels=50_000, drop_pattern="^buy")
    chosen = settings(rules=rules, duplicates=mode, test_share=0.0)
    found = prepare(tmp_path / "in", tmp_path / "out", chosen)
    repeats = {"none": {}, "exact": {"same.bmp": "duplicate"},
               "near": {"same.bmp": "duplicate", "larger.png": "near_duplicate"}}[mode]  # fmt: skip
    assert dict(dropped(tmp_path / "out")) == TROUBLE | repeats
    assert found["read"] == 17 and found["usable"] == 7
    assert found["kept"] == 7 - len(repeats) == found["splits"]["train"]
    assert sum(found["dropped"].values()) == found["read"] - found["kept"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(
        json.dumps(found)
    )
    assert found["changed"] == {
        "cmyk": 1, "transparency": 1, "turned_upright": 1,
        "stored_as_png": 4 if mode == "none" else 3,
    }  # fmt: skip
    steps = found["steps"]
    assert steps["colours"] == {"dropped": {}, "changed": {"transparency": 1, "cmyk": 1}}
    assert steps["reading"]["dropped"] == {"bad_json": 1, "missing_file": 1}
    for what in ("dropped", "changed"):
        words = {k: n for step in steps.values() for k, n in step[what].items()}
        assert words == found[what]
    for bins in found["histograms"].values():
        assert sum(count for _, count in bins) == found["kept"]
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert all(name in page.text for name in TROUBLE)
    figures = {"too_small", "aspect_ratio", "caption_pattern", "no_caption", *repeats.values()}
    assert len(page.pictures) == len(figures) + len(repeats)  # of a repeat, both
    assert all(max(picture.size) <= 96 for picture in page.pictures)
    config = DataConfig(name="prepared", path=str(tmp_path / "out"))
    source = open_source(config, "train")
    stored = {source._records[i]["file_name"].decode(): source[i] for i in range(len(source))}
    expected = {"one.png", "same.bmp", "larger.png", "two.jpg", "cmyk.jpg", "clear.png",
                "turned.jpg"}  # fmt: skip
    assert set(stored) == expected - set(repeats)
    assert stored["two.jpg"]["text"] == "a two"
    np.testing.assert_array_equal(stored["one.png"]["image"], np.asarray(picture(1)))
    assert stored["turned.jpg"]["image"].shape == (40, 30, 3)  # upright
    assert (stored["clear.png"]["image"] == 255).all()
    record = next(
        source._records[i]
        for i in range(len(source))
        if source._records[i]["file_name"] == b"turned.jpg"
    )
    assert (record["width"], record["height"]) == (30, 40)


def parquet_set(folder, files=6, rows=25):
    for file in range(files):
        table = []
        for row in range(rows):
            n = file * rows + row
            seed = n - 30 if n % 10 == 7 and n > 30 else n  # repeats across files
            table.append({"image": {"bytes": encoded(picture(seed)), "path": None},
                          "text": f"number {n}" if n % 11 else "", "score": n / 100})  # fmt: skip
        write_parquet(folder / f"train-{file:05}.parquet", table)


def test_scores_splits_and_file_sizes(tmp_path):
    parquet_set(tmp_path / "in", files=3)
    rules = Rules(scores=(ScoreRule("score", low=0.1, high=0.6),))
    chosen = settings("parquet", rules, validation_share=0.2, test_share=0.1)
    found = prepare(tmp_path / "in", tmp_path / "out", chosen)
    kept = [n for n in range(10, 61) if n % 11 and n not in (37, 47, 57)]
    # 37 repeats 7, whose score is too low: it stays.
    assert found["kept"] == len(kept) + 1
    names = {}
    for split in ("train", "validation", "test"):
        source = open_source(DataConfig(name="prepared", path=str(tmp_path / "out")), split)
        for index in range(len(source)):
            record = source._records[index]
            name = record["file_name"].decode()
            at = fraction(name)
            assert split == ("test" if at < 0.1 else "validation" if at < 0.3 else "train")
            number = int(record["text"].decode().split()[1])
            assert record["score"] == np.float32(number / 100)
            names[number] = split
    assert sorted(names) == sorted([*kept, 37])
    assert set(names.values()) == {"train", "validation", "test"}
    assert "score" in found["histograms"]
    with pytest.raises(DataError, match="no dataset_info.json"):
        open_source(DataConfig(name="prepared", path=str(tmp_path)), "train")


def test_pictures_without_a_caption_can_stay(tmp_path):
    members = [("0.png", encoded(picture(0))), ("1.png", encoded(picture(1))), ("1.txt", b"one")]
    write_tar(tmp_path / "in" / "a.tar", members)
    found = prepare(tmp_path / "in", tmp_path / "out", settings("webdataset", test_share=0.0))
    assert found["dropped"] == {"no_caption": 1}
    chosen = settings("webdataset", Rules(min_caption_chars=0), test_share=0.0)
    assert prepare(tmp_path / "in", tmp_path / "all", chosen)["kept"] == 2
    source = open_source(DataConfig(name="prepared", path=str(tmp_path / "all")), "train")
    assert [source[i]["text"] for i in range(2)] == ["", "one"]


def test_mended_captions_take_the_place_of_those_of_the_input(tmp_path):
    members = [("0.png", encoded(picture(0))), ("0.txt", b"zero")]
    members += [("1.png", encoded(picture(1))), ("1.txt", b"one")]
    write_tar(tmp_path / "in" / "a.tar", members)
    first = prepare(tmp_path / "in", tmp_path / "out", settings("webdataset", test_share=0.0))
    source = open_source(DataConfig(name="prepared", path=str(tmp_path / "out")), "train")
    names = {source[i]["text"]: source.key(i) for i in range(2)}
    file = tmp_path / "mended.jsonl"
    rows = [{"file_name": names["one"], "text": "first"}, {"file_name": names["one"], "text": "1!"}]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    chosen = settings(
        "webdataset", test_share=0.0, captions_from=str(file), captions_sha256=mended.digest(file)
    )
    found = prepare(tmp_path / "in", tmp_path / "again", chosen)
    source = open_source(DataConfig(name="prepared", path=str(tmp_path / "again")), "train")
    assert sorted(source.texts()) == ["1!", "zero"]
    assert first["changed"] == {} and found["changed"] == {"caption_mended": 1}
    with pytest.raises(DataError, match="has changed"):
        mended.of_run(str(file), "0" * 64)
    file.write_text("no JSON\n")
    with pytest.raises(DataError, match="line 1: expected"):
        mended.digest(file)


def test_named_pictures_are_stored_and_tell_duplicates_apart(tmp_path):
    """Two rows of one picture stay if their masks differ; a row without a mask is dropped."""
    masks = [picture(seed).convert("L") for seed in (7, 8, 7)]
    main, members = encoded(picture(0)), []
    for i, mask in enumerate(masks):
        members += [(f"{i}.png", main), (f"{i}.txt", b"one"), (f"{i}.matte.png", encoded(mask))]
    write_tar(tmp_path / "in" / "a.tar", [*members, ("3.png", main), ("3.txt", b"one")])
    images = (NamedImage("mask", "matte", "mask"),)
    chosen = settings("webdataset", Rules(images=images), test_share=0.0)
    chosen = dataclasses.replace(chosen, fields=Fields(images=images))
    found = prepare(tmp_path / "in", tmp_path / "out", chosen)
    assert found["dropped"] == {"missing_image": 1, "duplicate": 1} and found["kept"] == 2
    config = DataConfig(name="prepared", path=str(tmp_path / "out"), images=images)
    source = open_source(config, "train")
    for i, mask in enumerate(masks[:2]):
        np.testing.assert_array_equal(source[i]["images"]["mask"][..., 0], np.asarray(mask))
    with pytest.raises(DataError, match="'control', which is read from the feature 'control'"):
        missing = dataclasses.replace(config, images=(NamedImage("control", "edge"),))
        open_source(missing, "train")


def test_a_killed_run_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """Two processes are killed, one at each end of the work; then a third way finishes it."""
    from sdjax.data.prepare import writing

    parquet_set(tmp_path / "in")
    chosen = settings("parquet", shard_mb=1)
    prepare(tmp_path / "in", tmp_path / "whole", chosen)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sdjax.prepare", f"--input={tmp_path / 'in'}",
               f"--output={out}", "--workers=2", "--shard_mb=1"]  # fmt: skip

    def until(pattern):
        process = subprocess.Popen(
            command, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while not list(out.glob(pattern)):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    until("work/clean-*.json")
    assert len(list(out.glob("work/clean-*.json"))) < 6
    first = {path: path.stat().st_mtime_ns for path in out.glob("work/clean-*")}
    until("work/duplicates.json")
    for path, stamp in first.items():
        if path.suffix == ".json":
            assert path.stat().st_mtime_ns == stamp  # not made again
    assert not (out / "report.json").exists()
    prepare(tmp_path / "in", out, chosen)
    assert contents(out) == contents(tmp_path / "whole")
    # Finished, it is left as it is; with other options or input it is refused.
    monkeypatch.setattr(writing, "write_output", None)
    assert prepare(tmp_path / "in", out, chosen)["kept"] > 100
    with pytest.raises(UserError, match="the dataset of a run with other options"):
        prepare(tmp_path / "in", out, settings("parquet", test_share=0.5))


def test_input_and_output_in_a_bucket(tmp_path):
    """The records are those of a run on local files."""
    members = [
        member
        for n in range(12)
        for member in ((f"{n}.png", encoded(picture(n % 9))), (f"{n}.txt", b"number %d" % n))
    ]
    write_tar(tmp_path / "in" / "a.tar", members[:10])
    write_tar(tmp_path / "in" / "b.tar", members[10:])
    prepare(tmp_path / "in", tmp_path / "out", settings("webdataset"))
    local = contents(tmp_path / "out")
    with FakeGCS(tmp_path, "bucket") as gcs:
        for file in (tmp_path / "in").iterdir():
            gcs.write(f"bucket/in/{file.name}", file.read_bytes())
        command = [sys.executable, "-m", "sdjax.prepare", "--input=gs://bucket/in",
                   "--output=gs://bucket/out", "--workers=1"]  # fmt: skip
        run = subprocess.run(
            command, env=gcs.environment, capture_output=True, text=True, timeout=200
        )
        assert run.returncode == 0, run.stderr
        names = [name for name in gcs.objects if name.startswith("bucket/out/")]
        stored = {name.removeprefix("bucket/out/"): gcs.objects[name] for name in names}
    assert "12 rows read, 9 kept" in run.stdout
    assert stored["dropped.jsonl"] == local["dropped.jsonl"]
    assert not [name for name in stored if name.startswith("work/") and name != "work/"]
    for suffix in ("train.array_record-00000-of-00001", "test.array_record-00000-of-00001"):
        (one,) = [data for name, data in local.items() if name.endswith(suffix)]
        (other,) = [data for name, data in stored.items() if name.endswith(suffix)]
        assert one == other


def test_splits_are_by_hash_and_leave_those_of_the_source_alone():
    names = [f"{n}.png" for n in range(1000)]
    chosen = settings(validation_share=0.1, test_share=0.05)
    found = assign_splits(names, ["train"] * 1000, {"train"}, chosen)
    more = assign_splits([*names, "x"], ["train"] * 1001, {"train"}, chosen)
    assert more[:1000] == found
    assert 25 <= found.count("test") <= 80 and 70 <= found.count("validation") <= 130
    found = assign_splits(names, ["train"] * 999 + ["test"], {"train", "test"}, chosen)
    assert found.count("test") == 1 and found[-1] == "test"
    few = assign_splits(["b", "c"], ["train"] * 2, {"train"}, settings(test_share=1e-9))
    assert sorted(few) == ["test", "train"]


@needs_shared
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("mode", ["none", "exact", "near"])
def test_dirty_set(tmp_path, mode):
    """Each case of the manifest ends as it says, by name, reason, size, colours and repeats."""
    folder = Path(SHARED) / "dirty"
    manifest = json.loads((folder / "manifest.json").read_text())
    prepare(folder, tmp_path / "out", settings(duplicates=mode, test_share=0.0))
    source = open_source(DataConfig(name="prepared", path=str(tmp_path / "out")), "train")
    used = {source._records[i]["file_name"].decode(): source[i] for i in range(len(source))}
    gone = dropped(tmp_path / "out")
    reasons = {}
    for name, reason in gone:
        for key in (name, name.split(" (")[0], name.split(" (")[-1].rstrip(")")):
            reasons.setdefault(key, reason)
    repeats = {"duplicate", "near_duplicate"}
    for case in manifest["cases"]:
        name, line = case["file_name"], f"metadata.jsonl line {case['metadata_line']}"
        reason = reasons.get(line, reasons.get(name))
        if case["expect"] == "skip" and "also_ok" not in case:
            assert reason == (None if case["reason"] == "blank_line" else case["reason"]), case
        elif case["expect"] == "use" and name not in used and reason not in repeats:
            assert case.get("also_ok") == "skip", case
        if case["expect"] == "use" and name in used:
            image = used[name]["image"]
            assert list(image.shape[1::-1]) == case.get("expected_size", [*image.shape[1::-1]])
            mean = image.mean((0, 1))
            limit = case.get("mean_tolerance", manifest["mean_tolerance"])
            assert np.abs(mean - case.get("expected_mean_rgb", mean)).max() <= limit, case
    names = [name for name, reason in gone if reason in repeats]
    usable = [case for case in manifest["cases"] if case["expect"] == "use"]
    if mode == "none":
        assert not names
    elif mode == "exact":
        kinds = ("same_file", "exact", "pixels")
        wanted = {c["file_name"] for c in usable if c.get("dedup", {}).get("kind") in kinds}
        assert wanted <= set(names)
        for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if entry["reason"] == "duplicate":  # the manifest does not list all there are
                one, other = (
                    np.asarray(ImageOps.exif_transpose(Image.open(folder / file)))
                    for file in (entry["name"], entry["detail"].removeprefix("of "))
                )
                np.testing.assert_array_equal(one, other)
        pixels = [
            (source[i]["image"].shape, source[i]["image"].tobytes()) for i in range(len(source))
        ]
        assert len(set(pixels)) == len(pixels)
    else:
        groups = defaultdict(set)
        for case in usable:
            groups[case.get("near_group", case["file_name"])].add(case["file_name"])
        for group, members in groups.items():
            assert len(members & set(used)) == 1 or members <= {
                c["file_name"] for c in usable if c.get("also_ok") == "skip"
            }, group
