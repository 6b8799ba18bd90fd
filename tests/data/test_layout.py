"""Layouts of folders: which files are read, which split each row has, what is passed over.

The right answers of `LAYOUTS` are those of Hugging Face datasets 5.2.0,
`load_dataset("imagefolder", data_dir=...)`, but where a comment says otherwise.
"""

import json
import os
import zlib
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdjax.data.raw import formats, metadata_parquet
from sdjax.data.raw.clean import Rules, clean
from sdjax.data.raw.layout import split_folders
from sdjax.data.raw.remedies import unusable
from sdjax.data.raw.rows import Fields, Row, Skip, passed_over
from sdjax.data.raw.tree import Links, walk
from sdjax.data.sources import DataConfig, DataError, captions, open_source
from sdjax.data.summary import summarise
from sdjax.errors import UserError
from tests.data.test_prepare import prepare, settings
from tests.data.test_raw import grey, outcomes, write_tar


def write(root, *names):
    """Writes a picture for each name, all different."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        seed = zlib.crc32(name.encode())
        colour = (seed % 256, seed // 256 % 256, seed // 65536 % 256)
        Image.new("RGB", (24, 20), colour).save(root / name, "PNG")


def describe(folder, *names, kind="jsonl"):
    """Writes metadata: the caption of a picture is its name and the folder that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"file_name": name, "text": f"{name} in {folder.name}"} for name in names]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet", row_group_size=5)


def rows(path):
    """{split: {name: caption}} of all usable rows; none comes twice."""
    found = {}
    for shard in formats.list_shards(str(path), "image_text_folder", Fields()):
        for item in formats.read(shard, Fields()):
            row = clean(item, Rules(min_caption_chars=0)) if isinstance(item, Row) else item
            if hasattr(row, "text"):
                assert row.name not in found.setdefault(row.split, {})
                found[row.split][row.name] = row.text
    return found


def names_by_split(path):
    return {split: set(of_split) for split, of_split in rows(path).items()}


def numbered(folder, *numbers):
    return [f"{folder}/{number}.png" for number in numbers]


TWELVE = [*numbered("train", *range(9)), *numbered("test", 9, 10, 11)]
# name: (pictures, {folder: what its metadata name}, {split: what is read})
LAYOUTS = {
    "a root file that names folders of splits": (
        TWELVE, {".": TWELVE}, {"train": TWELVE[:9], "test": TWELVE[9:]}),
    "a file in each split": (
        TWELVE, {"train": [f"{n}.png" for n in range(9)], "test": ["9.png", "10.png", "11.png"]},
        {"train": TWELVE[:9], "test": TWELVE[9:]}),
    "a file in each class": (
        ["cat/0.png", "dog/0.png"], {"cat": ["0.png"], "dog": ["0.png"]},
        {"train": ["cat/0.png", "dog/0.png"]}),
    "a file in each class of each split": (
        [f"{split}/{kind}/0.png" for split in ("train", "test") for kind in ("cat", "dog")],
        {f"{split}/{kind}": ["0.png"] for split in ("train", "test") for kind in ("cat", "dog")},
        {"train": ["train/cat/0.png", "train/dog/0.png"],
         "test": ["test/cat/0.png", "test/dog/0.png"]}),
    "a file in a folder of pictures": (
        ["images/0.png", "images/1.png"], {"images": ["0.png", "1.png"]},
        {"train": ["images/0.png", "images/1.png"]}),
    # datasets does not read root.png, nor its file: that is lost without a word.
    "files in the splits beside a root one": (
        ["root.png", "train/0.png", "test/1.png"],
        {".": ["root.png"], "train": ["0.png"], "test": ["1.png"]},
        {"train": ["root.png", "train/0.png"], "test": ["test/1.png"]}),
    "files in the splits that name what the root one does": (
        ["train/0.png", "test/1.png"],
        {".": ["train/0.png", "test/1.png"], "train": ["0.png"], "test": ["1.png"]},
        {"train": ["train/0.png"], "test": ["test/1.png"]}),
    # datasets fails: "Instruction "test" corresponds to no data!"
    "a file of one split beside a root one of the other": (
        ["train/0.png", "test/1.png"], {".": ["test/1.png"], "train": ["0.png"]},
        {"train": ["train/0.png"], "test": ["test/1.png"]}),
    "splits without metadata": (
        ["train/0.png", "test/1.png"], {}, {"train": ["train/0.png"], "test": ["test/1.png"]}),
    "splits in a folder": (
        ["data/train/0.png", "data/test/1.png"], {},
        {"train": ["data/train/0.png"], "test": ["data/test/1.png"]}),
    "other names of splits": (
        ["training/0.png", "dev/1.png", "my-test/2.png", "testing/3.png", "eval/4.png"], {},
        {"train": ["training/0.png"], "validation": ["dev/1.png"],
         "test": ["my-test/2.png", "testing/3.png", "eval/4.png"]}),
    # datasets makes a split validation of it, and reads neither cat nor dog.
    "a class called val": (
        ["cat/0.png", "dog/1.png", "val/2.png"], {},
        {"train": ["cat/0.png", "dog/1.png", "val/2.png"]}),
    # datasets reads train/val/2.png in both splits.
    "a class called val in train": (
        ["train/cat/0.png", "train/dog/1.png", "train/val/2.png"], {},
        {"train": ["train/cat/0.png", "train/dog/1.png", "train/val/2.png"]}),
    # datasets makes a split test of it, and reads nothing else.
    "a picture called test 1": (
        ["a.png", "pets/b.png", "pets/test 1.png"], {},
        {"train": ["a.png", "pets/b.png", "pets/test 1.png"]}),
    # datasets reads the test split only.
    "a test folder beside pictures": (
        ["a.png", "test/b.png"], {".": ["a.png", "test/b.png"]},
        {"train": ["a.png"], "test": ["test/b.png"]}),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, kind",
    [(name, kind) for name, (_, metadata, _) in LAYOUTS.items()
     for kind in (("jsonl", "csv", "parquet") if metadata else ("jsonl",))],
)  # fmt: skip
def test_layout_gives_each_row_its_split(tmp_path, name, kind):
    pictures, metadata, expected = LAYOUTS[name]
    write(tmp_path, *pictures)
    for folder, named in metadata.items():
        describe(tmp_path / folder, *named, kind=kind)
    found = rows(tmp_path)
    assert {split: set(of) for split, of in found.items()} == {
        split: set(names) for split, names in expected.items()
    }
    survey = formats.survey(str(tmp_path), "image_text_folder", Fields())
    for split, names in expected.items():  # what is said of it
        assert sum(survey.made[split].values()) == len(names)
    assert formats.detect(str(tmp_path)) == "image_text_folder"


def test_caption_is_that_of_the_metadata_nearest_to_the_picture(tmp_path):
    write(tmp_path, "train/0.png", "train/1.png")
    describe(tmp_path, "train/0.png", "train/1.png")
    describe(tmp_path / "train", "0.png")
    assert rows(tmp_path) == {
        "train": {"train/0.png": "0.png in train", "train/1.png": f"train/1.png in {tmp_path.name}"}
    }
    (shard, *_) = formats.list_shards(str(tmp_path), "image_text_folder", Fields())
    (skip,) = [item for item in formats.read(shard, Fields()) if not isinstance(item, Row)]
    assert (skip.name, skip.reason) == ("metadata.jsonl line 1 (train/0.png)", "named_twice")
    assert "train/metadata.jsonl" in skip.detail


def test_import_and_prepare_train_on_no_row_of_the_test_folder(tmp_path):
    write(tmp_path / "d", *TWELVE)
    describe(tmp_path / "d", *TWELVE)
    config = DataConfig(
        name="image_text_folder", path=str(tmp_path / "d"), data_dir=str(tmp_path / "tfds")
    )
    wanted = {"train": TWELVE[:9], "test": TWELVE[9:]}
    for split, names in wanted.items():
        assert captions(config, split) == [f"{name} in d" for name in names]
    notes = summarise([open_source(config, "train")], [], 1).lines[1:]
    assert notes == (
        "  split train: 9 rows, by the folder train/", "  split test: 3 rows, by the folder test/"
    )  # fmt: skip
    found = prepare(tmp_path / "d", tmp_path / "out", settings(duplicates="none"))
    assert found["splits"] == {"train": 9, "test": 3}
    assert found["notes"] == [note.strip() for note in notes]
    prepared = DataConfig(name="prepared", path=str(tmp_path / "out"))
    for split, names in wanted.items():
        assert captions(prepared, split) == [f"{name} in d" for name in names]
    assert "by the folder test/" in " ".join(open_source(prepared, "train").notes)


def test_start_says_that_a_hash_of_the_names_makes_the_split(tmp_path):
    write(tmp_path / "d", "a.png", "b.png")
    describe(tmp_path / "d", "a.png", "b.png")
    config = DataConfig(
        name="image_text_folder", path=str(tmp_path / "d"), data_dir=str(tmp_path / "tfds")
    )
    assert open_source(config, "train").notes == (
        "split train: 2 rows, in folders that make no split",
        "split test: 3% of them, by a hash of the name",
    )


@pytest.mark.parametrize(
    "folders, made",
    [
        (["train", "test", "extra"], {"train": "train", "test": "test"}),
        (["train2017", "val2017"], {"train2017": "train", "val2017": "validation"}),
        (["cat/train", "cat/test", "dog/train", "dog/test"],
         {"cat/train": "train", "cat/test": "test", "dog/train": "train", "dog/test": "test"}),
        (["images", "test"], {"test": "test"}),  # rather held out than trained on
        (["cat", "dog", "test"], {}),
        (["places/hill/a", "places/val/b", "places/lake"], {}),
        (["contest", "latest", "training-wheels", "devices"], {"training-wheels": "train"}),
        ([""], {}),
    ],
)  # fmt: skip
def test_folders_that_make_splits(folders, made):
    assert split_folders(folders)[0] == made


def test_class_named_like_a_split_is_said(tmp_path):
    write(tmp_path, "cat/0.png", "dog/1.png", "val/2.png", "test_0.png", "train_0.png")
    remarks = formats.survey(str(tmp_path), "image_text_folder", Fields()).remarks
    assert any("val/ is taken for a class, not for a split validation" in r for r in remarks)
    assert any(
        "names of pictures make no splits, though there are test_0.png" in r for r in remarks
    )


def test_names_make_splits_of_shards(tmp_path):
    for name in ("cc-train-00.tar", "cc-validation-00.tar", "test/0.tar"):
        write_tar(tmp_path / name, [("0.png", grey(1)), ("0.txt", b"one")])
    survey = formats.survey(str(tmp_path), "webdataset", Fields())
    assert [shard.split for shard in survey.shards] == ["train", "validation", "test"]
    assert survey.lines() == [
        "split train: 1 file, by names such as cc-train-00.tar",
        "split validation: 1 file, by names such as cc-validation-00.tar",
        "split test: 1 file, by names such as test/0.tar",
    ]


def test_links_to_folders_give_no_picture_twice(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    write(inside, "a.png", "sub/b.png", "sub/deep/c.png")
    write(outside, "d.png", "more/e.png")
    (inside / "parent").symlink_to(inside)
    (inside / "sub" / "up").symlink_to("..")
    (inside / "sub" / "above").symlink_to(tmp_path)
    (inside / "again").symlink_to(inside / "sub")
    (inside / "itself").symlink_to("itself")
    (inside / "broken.png").symlink_to("gone.png")
    (inside / "other").symlink_to(outside)
    (inside / "other2").symlink_to(outside / "more")
    (outside / "back").symlink_to(inside)
    (outside / "more" / "up").symlink_to(outside)
    here, there = {"a.png", "sub/b.png", "sub/deep/c.png"}, {"other/d.png", "other/more/e.png"}
    for outside_links, read in ((False, here), (True, here | there)):
        found = formats.survey(str(inside), "image_text_folder", Fields(), outside=outside_links)
        found_rows = [row for shard in found.shards for row in formats.read(shard, Fields())]
        assert {row.name for row in found_rows if isinstance(row, Row)} == read
        assert {row.name: row.reason for row in found_rows if isinstance(row, Skip)} == {
            "broken.png": "missing_file"}  # fmt: skip
    links = Links()
    files = [name for _, names in walk(inside, links, outside=True) for name in names]
    assert Counter(files) == Counter(
        ["a.png", "b.png", "c.png", "d.png", "e.png", "itself", "broken.png"]
    )
    assert links.out == [] and sorted(links.back) == [
        "again", "other/back", "other/more/up", "other2", "parent", "sub/above", "sub/up"
    ]  # fmt: skip
    assert found.remarks[0].startswith("7 link(s) to folders that are read already, not followed: ")
    links = Links()
    assert sum(len(names) for _, names in walk(inside, links)) == 5
    assert links.out == ["other", "other2"]
    assert sorted(links.back) == ["again", "parent", "sub/above", "sub/up"]
    remarks = formats.survey(str(inside), "image_text_folder", Fields()).remarks
    assert (
        "2 link(s) to folders outside of this one" in remarks[1] and "--outside_links" in remarks[1]
    )
    write_tar(outside / "t.tar", [("0.png", grey(1)), ("0.txt", b"one")])
    assert list(outcomes(outside, "webdataset")) == ["t.tar/0.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_folder_that_may_not_be_read_is_an_error(tmp_path):
    write(tmp_path, "a.png", "b/c.png")
    (tmp_path / "b").chmod(0)
    with pytest.raises(DataError, match="b: the folder cannot be listed"):
        formats.list_shards(str(tmp_path), "image_text_folder", Fields())
    (tmp_path / "b").chmod(0o700)


def test_every_ending_is_read_or_counted(tmp_path):
    readable = ["a.jpg", "b.jfif", "c.jpe", "d.JPEG", "e.tiff", "f.jp2", "g.bmp"]
    write(tmp_path, *readable)
    for name in readable:
        (tmp_path / name).with_suffix(".txt").write_text(name)
    for name in ("h.heic", "i.heic", "j.heic", "k.jxl", "l.jxl", "m.raw"):
        (tmp_path / name).write_bytes(b"?")
        (tmp_path / name).with_suffix(".txt").write_text("a picture that cannot be read")
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "alone.txt").write_text("without a picture")
    assert rows(tmp_path) == {"train": {name: name for name in sorted(readable)}}
    survey = formats.survey(str(tmp_path), "image_text_folder", Fields())
    assert survey.passed_over == {".heic": 3, ".jxl": 2, ".raw": 1, ".txt": 1}
    assert "7 files passed over: 3 .heic, 2 .jxl, 1 .raw, 1 .txt" in survey.lines()


def test_pictures_that_no_metadata_names_are_counted(tmp_path):
    write(tmp_path, "a.png", "b.png", "c.jpg", "sub/d.png")
    describe(tmp_path, "a.png", "sub/d.png", "gone.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,b\n")
    (tmp_path / "README.md").touch()
    survey = formats.survey(str(tmp_path), "image_text_folder", Fields())
    assert survey.unnamed == {".png": 1, ".jpg": 1}
    assert survey.passed_over == {".csv": 1, ".md": 1}
    assert "2 pictures that no metadata file names: 1 .jpg, 1 .png" in survey.lines()
    assert "metadata.csv is not read, for metadata.jsonl beside it is" in survey.lines()


def test_captions_of_kohya_are_read(tmp_path):
    write(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "a.caption").write_text("of .caption")
    (tmp_path / "b.cap").write_text("of .cap")
    (tmp_path / "c.caption").write_text("not this")
    (tmp_path / "c.TXT").write_text("of .txt")
    (tmp_path / "d.tags").write_text("not read")
    found = outcomes(tmp_path, "image_text_folder")
    assert found == {
        "a.png": "of .caption", "b.png": "of .cap", "c.png": "of .txt", "d.png": "no_caption"
    }  # fmt: skip
    (shard,) = formats.list_shards(str(tmp_path), "image_text_folder", Fields())
    sought = [row.sought for row in formats.read(shard, Fields()) if row.text is None]
    assert sought == ["no d.txt, d.caption or d.cap beside it, but d.tags"]
    survey = formats.survey(str(tmp_path), "image_text_folder", Fields())
    assert survey.passed_over == {".caption": 1, ".tags": 1}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_field_called_caption_is_found(tmp_path, kind):
    write(tmp_path, "a.png")
    describe(tmp_path, "a.png", kind=kind)
    if kind == "parquet":
        table = pa.table({"file_name": ["a.png"], "caption": ["one"]})
        pq.write_table(table, tmp_path / "metadata.parquet")
    else:
        file = tmp_path / f"metadata.{kind}"
        file.write_text(file.read_text().replace("text", "caption"))
    assert len(rows(tmp_path)["train"]["a.png"]) > 2
    assert outcomes(tmp_path, "image_text_folder", Fields("image", "prompt"))["metadata." + (
        f"{kind} line {2 if kind == 'csv' else 1} (a.png)")] == "no_caption"  # fmt: skip


def test_dotted_names_in_tars_are_read_or_counted(tmp_path):
    caption = b"a caption"
    write_tar(
        tmp_path / "a.tar",
        [
            *((f"v1.{n}.{end}", data) for n in range(20)  # one key for webdataset
              for end, data in (("png", grey(n)), ("txt", b"%d" % n))),
            ("b.input.jpg", grey(30)), ("b.txt", caption),
            ("c.jpg", grey(31)), ("c.mask.png", grey(32)), ("c.txt", caption), ("c.cls", b"1"),
            ("d.jpg", grey(33)), ("d.caption", caption), ("d.txt", b"first"),
            ("e.x.heic", b"?"), ("._c.jpg", b"?"), ("f.jfif", grey(34)),
            ("f.json", b'{"text": "f"}'),
        ],
    )  # fmt: skip
    found = outcomes(tmp_path / "a.tar", "webdataset")
    assert found == {
        **{f"a.tar/v1.{n}.png": str(n) for n in range(20)},
        "a.tar/b.input.jpg": "a caption", "a.tar/c.jpg": "a caption", "a.tar/d.jpg": "first",
        "a.tar/f.jfif": "f",
    }  # fmt: skip
    (shard,) = formats.list_shards(str(tmp_path), "webdataset", Fields())
    counts = Counter()
    read = list(formats.read(shard, Fields(), passed_over=counts))
    assert len(read) == 24 and counts == {".mask.png": 1, ".cls": 1, ".heic": 1}
    assert passed_over(counts) == "3 files passed over: 1 .cls, 1 .heic, 1 .mask.png"
    found = prepare(tmp_path, tmp_path / "out", settings("webdataset", duplicates="none"))
    assert found["passed_over"] == counts and found["kept"] == 24
    config = DataConfig(
        name="webdataset", path=str(tmp_path / "a.tar"), data_dir=str(tmp_path / "t")
    )
    assert "in tars, 3 files passed over: 1 .cls, 1 .heic, 1 .mask.png" in (
        open_source(config, "train").notes
    )


def test_parts_of_metadata_parquet_lose_no_row(tmp_path):
    names = [f"{n}.png" for n in range(103)]
    file = tmp_path / "metadata.parquet"
    table = pa.table({"file_name": names, "size": list(range(103))})
    for group, step in ((103, 10), (7, 10), (10, 10), (50, 3), (103, 1000)):
        pq.write_table(table, file, row_group_size=group)
        parts = list(metadata_parquet.stretches(file, step))
        assert [parts[0][0], parts[-1][1]] == [0, 103]
        assert all(a[1] == b[0] for a, b in zip(parts, parts[1:], strict=False))
        read = [item for part in parts for item in metadata_parquet.parse(file, *part)]
        assert read == [(n + 1, {"file_name": f"{n}.png", "size": n}) for n in range(103)]
    pq.write_table(pa.table({"url": ["x"]}), file)  # of something else
    write(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a")
    assert rows(tmp_path) == {"train": {"a.png": "a"}}


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda d: write(d, "a.png", "b.png"),
         ["2 no_caption, first a.png (no a.txt, a.caption or a.cap beside it)",
          "--min_caption_chars of 0 keeps pictures without one"]),
        (lambda d: (write(d, "a.png"),
                    (d / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "x"}\n')),
         ["1 no_caption, first metadata.jsonl line 1 (a.png)", "it has 'file_name', 'prompt'",
          "--text_key names the field of the caption"]),
        (lambda d: (write(d, "a.png"), (d / "metadata.jsonl").write_text("{}\n[]\n{}\n")),
         ["2 no_file_name, first metadata.jsonl line 1 (the row has nothing)", "1 bad_record"]),
        (lambda d: (write(d, "a.png"), (d / "metadata.jsonl").touch(), (d / "b.heic").touch()),
         ["there is not one row", "2 files passed over: 1 .heic, 1 .png"]),
        (lambda d: (write(d, "pics/a.png"), describe(d, "a.png")),
         ["1 missing_file, first metadata.jsonl line 1 (a.png)",
          "file_name is a path below the folder of the metadata file"]),
    ],
)  # fmt: skip
def test_first_row_of_each_reason_is_named_with_what_helps(tmp_path, make, said):
    make(tmp_path)
    survey = formats.survey(str(tmp_path), "image_text_folder", Fields())
    items = [item for shard in survey.shards for item in formats.read(shard, Fields())]
    skips = [clean(item, Rules()) if isinstance(item, Row) else item for item in items]
    others = Counter(survey.passed_over) + Counter(survey.unnamed)
    message = unusable(skips, others, pipeline_options())
    for words in said:
        assert words in message


def pipeline_options():
    return {name: f"--{name}" for name in ("text_key", "min_caption_chars", "min_side")}


def test_prepare_that_can_use_nothing_writes_its_report(tmp_path):
    write(tmp_path / "in", "a.png", "b.png")
    (tmp_path / "in" / "metadata.jsonl").write_text('7\n{"file_name": "b.png", "prompt": "x"}\n')
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not one image can be used: .*'bad_record': 1") as caught:
        prepare(tmp_path / "in", out, settings())
    for words in ("metadata.jsonl line 1 (a JSON int, not an object)", "--text_key names",
                  "1 file passed over: 1 .png", str(out / "report.html")):  # fmt: skip
        assert words in str(caught.value)
    assert {file.name for file in out.iterdir()} == {
        "report.html", "report.json", "dropped.jsonl"
    }  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["kept"] == 0 and report["dropped"] == {"bad_record": 1, "no_caption": 1}
    # The report stands in the way of no other run.
    found = prepare(tmp_path / "in", out, settings(rules=Rules(min_caption_chars=0)))
    assert found["kept"] == 1


def test_picture_of_a_format_that_cannot_be_read_is_named(tmp_path):
    for name, start in (("a.heic", b"\0\0\0\x18ftypheic"), ("b.jxl", b"\xff\x0a" + b"\0" * 20)):
        (tmp_path / name).write_bytes(start + b"\0" * 100)
    describe(tmp_path, "a.heic", "b.jxl")
    (shard,) = formats.list_shards(str(tmp_path), "image_text_folder", Fields())
    skips = [clean(row, Rules()) for row in formats.read(shard, Fields())]
    assert [(skip.reason, skip.detail) for skip in skips] == [
        ("unsupported_format", "HEIC; convert it to PNG"),
        ("unsupported_format", "JPEG XL; convert it to PNG"),
    ]


def test_format_is_found_by_what_lies_anywhere_in_the_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.heic").touch()
    with pytest.raises(DataError, match=r"neither metadata.jsonl, nor images.*there are 1 \.heic"):
        formats.detect(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"no file that ends in \.parquet, but 1 \.heic"):
        formats.list_shards(str(tmp_path / "empty"), "parquet", Fields())
    write_tar(tmp_path / "t" / "deep" / "0.tar", [("0.png", grey(1))])
    assert formats.detect(str(tmp_path / "t")) == "webdataset"
    write(tmp_path, "p/x.tar/a.png")  # a folder called so
    assert formats.detect(str(tmp_path / "p" / "x.tar")) == "image_text_folder"
