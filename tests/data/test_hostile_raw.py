"""Folders, metadata and parquet from strangers: links, devices, and rows that grow or raise."""

import json
import os
import time
import tracemalloc
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdjax.data.builders.raw_import import prepare, read_skipped
from sdjax.data.raw import clean as cleaning
from sdjax.data.raw import folder as reader
from sdjax.data.raw import formats, metadata, parquet_pages
from sdjax.data.raw.clean import Rules, ScoreRule, clean
from sdjax.data.raw.files import PathGuard
from sdjax.data.raw.limits import MOST_CAPTION_BYTES, MOST_CAPTION_CHARS, MOST_ROW_BYTES
from sdjax.data.raw.rows import BadRow, Fields, Row, Skip
from sdjax.data.sources import DataConfig, DataError
from tests.data.test_raw import grey, outcomes, write_parquet, write_tar


def folder(path, *pictures, captions=True):
    path.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(pictures):
        (path / f"{name}.png").write_bytes(grey(number))
        if captions:
            (path / f"{name}.txt").write_text(name)
    return path


def described(path, *lines, name="metadata.jsonl"):
    """A folder of a.png and b.png with these lines of metadata."""
    folder(path, "a", "b", captions=False)
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    (path / name).write_bytes(data + b"\n")
    return path


def read(path, format="image_text_folder", fields=None, rules=None, outside=False):
    """([names of rows], {name: (reason, detail)} of skips)"""
    fields = fields or Fields()
    names, skips = [], {}
    for shard in formats.survey(str(path), format, fields, outside=outside).shards:
        for item in formats.read(shard, fields):
            item = clean(item, rules or Rules()) if isinstance(item, Row) else item
            if isinstance(item, Skip):
                skips[item.name] = (item.reason, item.detail)
            else:
                names.append(item.name)
    return names, {name: reason for name, (reason, _) in skips.items()}


@pytest.fixture
def secret(tmp_path):
    """A text and a picture outside of the data, and a folder with both."""
    there = tmp_path / "elsewhere"
    there.mkdir()
    (there / "passwd").write_text("root:x:0:0")
    (there / "private.png").write_bytes(grey(7))
    write_tar(there / "t.tar", [("0.png", grey(1)), ("0.txt", b"one")])
    write_parquet(there / "p.parquet", [{"image": grey(1), "text": "one"}])
    return there


def test_link_that_leads_outside_gives_no_caption_and_no_picture(tmp_path, secret):
    data = folder(tmp_path / "data", "good", "stolen")
    (data / "stolen.txt").unlink()
    (data / "stolen.txt").symlink_to(secret / "passwd")
    (data / "picture.png").symlink_to("../elsewhere/private.png")
    (data / "picture.txt").write_text("a private picture")
    (data / "within.png").symlink_to("good.png")
    (data / "within.txt").symlink_to(data / "good.txt")
    (data / "sub").symlink_to(secret)
    names, skips = read(data)
    assert names == ["good.png", "within.png"]
    assert skips == {"picture.png": "leads_outside", "stolen.png": "leads_outside"}
    names, skips = read(data, outside=True)
    assert names == ["good.png", "picture.png", "stolen.png", "within.png"]
    assert skips == {"sub/private.png": "no_caption"}


def test_root_that_is_a_link_itself_is_no_way_out(tmp_path):
    folder(tmp_path / "data", "good")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert read(tmp_path / "link")[0] == ["good.png"]
    write_tar(tmp_path / "t.tar", [("0.png", grey(1)), ("0.txt", b"one")])
    (tmp_path / "l.tar").symlink_to("t.tar")
    assert outcomes(tmp_path / "l.tar", "webdataset") == {"l.tar/0.png": "one"}


@pytest.mark.parametrize("format, file", [("webdataset", "t.tar"), ("parquet", "p.parquet")])
def test_shard_that_a_link_leads_to_is_not_read(tmp_path, secret, format, file):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / file).symlink_to(secret / file)
    assert read(tmp_path / "data", format) == ([], {file: "leads_outside"})
    assert len(read(tmp_path / "data", format, outside=True)[0]) == 1
    config = DataConfig(name=format, path=str(tmp_path / "data"), data_dir=str(tmp_path / "t"))
    with pytest.raises(DataError, match="leads_outside.*\n.*data.outside_links reads what links"):
        prepare(config)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_metadata_that_a_link_leads_to_is_refused_with_the_option(tmp_path, secret, name):
    data = folder(tmp_path / "data", "good", captions=False)
    (secret / "metadata.jsonl").write_text('{"file_name": "good.png", "text": "x"}\n')
    (secret / "metadata.csv").write_text("file_name,text\ngood.png,x\n")
    write_parquet(secret / "metadata.parquet", [{"file_name": "good.png", "text": "x"}])
    (data / name).symlink_to(secret / name)
    with pytest.raises(DataError, match=f"{name}: a link leads out.*outside_links"):
        read(data)
    assert read(data, outside=True)[0] == ["good.png"]


@pytest.mark.parametrize("path", ["../a.png", "/etc/passwd", "sub/../../a.png", "a\\b", "a\0.png"])
def test_file_name_that_leads_outside_is_refused(tmp_path, path):
    data = described(tmp_path / "d", json.dumps({"file_name": path, "text": "x"}))
    assert set(read(data)[1].values()) == {"unsafe_path"}


def test_folder_behind_a_link_is_no_way_for_a_file_name(tmp_path, secret):
    data = described(
        tmp_path / "d", '{"file_name": "way/private.png", "text": "x"}',
        '{"file_name": "a.png", "text": "a"}',
    )  # fmt: skip
    (data / "way").symlink_to(secret)
    names, skips = read(data)
    assert names == ["a.png"] and list(skips.values()) == ["leads_outside"]


@pytest.mark.parametrize("end", ["png", "txt"])
def test_pipe_or_device_is_never_opened(tmp_path, end):
    data = folder(tmp_path / "d", "a", "b", "c")
    for name in ("b", "c"):
        (data / f"{name}.{end}").unlink()
    os.mkfifo(tmp_path / "d" / "pipe")
    (data / f"b.{end}").symlink_to("pipe")
    (data / f"c.{end}").symlink_to("/dev/zero")
    began = time.monotonic()
    for outside in (False, True):
        names, skips = read(data, outside=outside)
        assert names == ["a.png"]
        reason = "not_a_file" if outside else "leads_outside"
        assert skips == {"b.png": "not_a_file", "c.png": reason}
    assert time.monotonic() - began < 5
    with pytest.raises(BadRow, match="missing_file: a folder"):
        PathGuard(str(tmp_path), outside=False).check(data)


def test_pipe_as_a_shard_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.tar").symlink_to("pipe")
    assert read(tmp_path, "webdataset")[1] == {"a.tar": "not_a_file"}
    (tmp_path / "a.tar").rename(tmp_path / "a.parquet")
    assert read(tmp_path, "parquet")[1] == {"a.parquet": "not_a_file"}


def test_links_of_a_folder_to_itself_end_the_walk_at_once(tmp_path):
    data = folder(tmp_path / "d", "a")
    elsewhere = folder(tmp_path / "e", "b")
    for at in (data, elsewhere):
        for name in "xyz":
            (at / name).symlink_to(at)
            (at / f"{name}2").symlink_to(".")
    (data / "away").symlink_to(elsewhere)
    began = time.monotonic()
    assert read(data)[0] == ["a.png"]
    assert read(data, outside=True)[0] == ["a.png", "away/b.png"]
    assert time.monotonic() - began < 5


def test_files_that_are_too_large_are_counted_and_not_read(tmp_path, monkeypatch):
    data = folder(tmp_path / "d", "a", "b", "c")
    with open(data / "b.png", "wb") as file:
        file.truncate(1 << 40)  # which takes no room
    with open(data / "c.txt", "wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(reader, "MOST_PICTURE_BYTES", 1 << 20)
    assert read(data) == (["a.png"], {"b.png": "too_many_bytes", "c.png": "caption_too_long"})


def test_caption_beyond_the_limit_is_counted(tmp_path):
    long, most = "x" * (MOST_CAPTION_CHARS + 1), "é" * MOST_CAPTION_CHARS
    assert clean(Row("a", "train", grey(1), long), Rules()).reason == "caption_too_long"
    assert clean(Row("a", "train", grey(1), b"x" * (MOST_CAPTION_BYTES + 1)), Rules()).reason == (
        "caption_too_long")  # fmt: skip
    assert clean(Row("a", "train", grey(1), most), Rules()).text == most
    others = clean(Row("a", "train", grey(1), ["a", long, "b"]), Rules()).captions
    assert others == ("b",)


DIGITS = "9" * 5_000
BAD_LINES = {
    "a number of 5,000 digits": (f'{{"file_name": "b.png", "score": {DIGITS}}}', "bad_json"),
    "a number of 4,000 digits": (f'{{"file_name": "b.png", "text": "b", "score": {DIGITS[:4000]}}}',
                                 "no_score"),
    "brackets 100,000 deep": ("[" * 100_000, "bad_json"),
    "objects 500 deep": ('{"file_name": "b.png", "x":' + "[" * 500 + "]" * 500 + "}", "bad_json"),
    "no object": ("[1, 2]", "bad_record"),
    "no JSON": ("}{", "bad_json"),
    "a caption that is an object": ('{"file_name": "b.png", "text": {"a": 1}}', "caption_not_text"),
    "a file name that is a number": ('{"file_name": 5, "text": "b"}', "no_file_name"),
    "a file name of a million letters": (json.dumps({"file_name": "n" * 10**6}), "unsafe_path"),
    "half a surrogate": ('{"file_name": "\\ud800.png", "text": "b"}', "bad_encoding"),
    "no UTF-8": (b'{"file_name": "b.png", "text": "\xff"}', "bad_encoding"),
    "zeros": (b"\0" * 100, "bad_json"),
    "a score that is infinite": ('{"file_name": "b.png", "text": "b", "score": 1e999}', "score"),
    "a score that is none": ('{"file_name": "b.png", "text": "b", "score": NaN}', "score"),
    "a line beyond the limit": ('{"file_name": "b.png", "text": "' + "x" * MOST_ROW_BYTES + '"}',
                                "caption_too_long"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_line_is_counted_and_the_others_are_read(what, tmp_path):
    line, reason = BAD_LINES[what]
    good = '{"file_name": "a.png", "text": "a", "score": 1}'
    data = described(tmp_path / "d", good, line, good.replace("a.png", "c.png"))
    (data / "c.png").write_bytes(grey(3))
    rules = Rules(scores=(ScoreRule("score", high=10),))
    names, skips = read(data, fields=Fields(columns=("score",)), rules=rules)
    assert names == ["a.png", "c.png"]
    assert list(skips.values()) == [reason]
    assert all(len(name) < 500 for name in skips)


def test_very_long_line_is_passed_over_within_little_memory(tmp_path):
    data = described(tmp_path / "d", '{"file_name": "a.png", "text": "a"}')
    with open(data / "metadata.jsonl", "r+b") as file:
        file.seek(40 << 20, os.SEEK_END)
        file.write(b'\n{"file_name": "b.png", "text": "b"}\n')
    tracemalloc.start()
    names, skips = read(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert names == ["a.png", "b.png"] and skips == {"metadata.jsonl line 2": "caption_too_long"}
    assert peak < 5 * MOST_ROW_BYTES


BAD_CELLS = {
    "a cell beyond the limit of csv": (f"b.png,{'x' * 200_000}", "caption_too_long"),
    "too many cells": ("b.png,b,c", "bad_record"),
    "a quote that never ends": ('b.png,"' + "x\n" * 100_000, "caption_too_long"),
    "a line beyond the limit": ("b.png," + "x" * (MOST_ROW_BYTES + 10), "caption_too_long"),
    "quotes over many lines": ("b.png," + '"\n",' * 20_000, "caption_too_long"),
    "no UTF-8": (b"b.png,\xff", "bad_encoding"),
}


@pytest.mark.parametrize("what", BAD_CELLS)
def test_bad_row_of_csv_is_counted_and_the_others_are_read(what, tmp_path, monkeypatch):
    row, reason = BAD_CELLS[what]
    if "many lines" in what:
        monkeypatch.setattr(metadata, "MOST_ROW_BYTES", 50_000)
    data = described(
        tmp_path / "d", "file_name,text", "a.png,a", row, "c.png,c", name="metadata.csv"
    )
    (data / "c.png").write_bytes(grey(3))
    names, skips = read(data)
    assert reason in skips.values()
    assert names == ["a.png", "c.png"] or "many lines" in what


def test_rows_of_csv_after_a_bad_one_are_not_lost_at_the_end_of_a_stretch(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "ROWS_PER_SHARD", 2)
    lines = ["file_name,text", "a.png,a", f"b.png,{'x' * 200_000}", "a.png,a2", "b.png,b"]
    data = described(tmp_path / "d", *lines, name="metadata.csv")
    names, skips = read(data)
    assert names == ["a.png", "a.png", "b.png"]
    assert skips == {"metadata.csv line 3": "caption_too_long"}


def test_array_beyond_the_limit_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "MOST_WHOLE_BYTES", 1000)
    data = described(tmp_path / "d", "[", *['{"file_name": "a.png", "text": "a"},'] * 100, "]")
    with pytest.raises(DataError, match="1,000 bytes.*write one object in every line"):
        read(data)
    monkeypatch.undo()
    with pytest.raises(DataError, match="a number of more than 4,300 digits"):
        read(described(tmp_path / "e", "[", f'{{"file_name": {DIGITS}}}', "]"))


def parquet_file(path, table, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def repeated(value, times, kind=None):
    """A column of one value so often, as the writer would store a dictionary of it."""
    return pa.array([value], kind).dictionary_encode().take(pa.array(np.zeros(times, np.int32)))


def images(count):
    return pa.array([grey(n) for n in range(count)])


def bombs():
    """{name: (table, options)} of files of a few kilobytes that pyarrow makes gigabytes of."""
    long = "x" * (20 << 20)
    lists = pa.ListArray.from_arrays(pa.array([0, 10_000], pa.int32()), repeated(long, 10_000))
    zeros = pa.array([bytes(80 << 20)])
    return {
        "a caption of 20 MB a hundred times": (
            {"image": images(100), "text": repeated(long, 100)}, "caption_too_long"),
        "a picture of 20 MB a hundred times": (
            {"image": repeated(bytes(20 << 20), 100), "text": repeated("a", 100)}, "not_an_image"),
        "a list of 10,000 captions of 20 MB": (
            {"image": images(1), "text": pa.array(["a"]), "captions": lists}, "bad_shard"),
        "a list of 10 million numbers": (
            {"image": images(1), "text": pa.array(["a"]),
             "captions": pa.array([np.zeros(10_000_000, np.int8)])}, "caption_too_long"),
        "a picture of 80 MB of zeros": ({"image": zeros, "text": pa.array(["a"])}, "bad_shard"),
    }  # fmt: skip


@pytest.mark.parametrize("what", bombs())
def test_parquet_bomb_is_counted_within_its_limit(what, tmp_path):
    columns, reason = bombs()[what]
    path = parquet_file(tmp_path / "a.parquet", pa.table(columns), compression="zstd")
    del columns
    assert path.stat().st_size < 200_000
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        _, skips = read(tmp_path, "parquet")
    finally:
        pa.set_memory_pool(before)
    assert set(skips.values()) == {reason}
    assert pool.max_memory() < 300e6


def test_parquet_pages_are_read_as_pyarrow_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"image": {"bytes": rng.bytes(int(rng.integers(1, 3000))), "path": f"{n}"},
             "text": ["a", f"text {n}", None][n % 3], "captions": [f"{n}", "b"] * (n % 3),
             "other": [float(n)] * 5} for n in range(300)]  # fmt: skip
    for number, options in enumerate([
        {}, {"row_group_size": 7}, {"use_dictionary": False}, {"data_page_size": 100},
        {"data_page_version": "2.0"}, {"compression": "gzip"}, {"compression": "none"},
        {"compression": "lz4"}, {"compression": "brotli"}, {"write_statistics": False},
        {"write_page_checksum": True}, {"dictionary_pagesize_limit": 10},
    ]):  # fmt: skip
        path = tmp_path / f"{number}" / "a.parquet"
        parquet_file(path, pa.Table.from_pylist(rows), **options)
        (shard,) = formats.list_shards(str(path), "parquet", Fields())
        found = list(formats.read(shard, Fields()))
        assert [row.image for row in found] == [row["image"]["bytes"] for row in rows], options
        assert [row.text for row in found] == [row["text"] for row in rows]
        assert [row.captions for row in found] == [row["captions"] for row in rows]
        assert list(formats.names(shard)) == [f"a.parquet/{n}" for n in range(300)]


def test_cell_that_python_cannot_have_is_a_bad_record(tmp_path):
    days = pa.array([0, 10_000_000, 1], pa.int32()).cast(pa.date32())
    texts = pa.array(["a", "b", "c"])
    parquet_file(tmp_path / "p" / "a.parquet", pa.table(
        {"image": images(3), "text": texts, "original_width": days}))  # fmt: skip
    assert read(tmp_path / "p", "parquet") == (
        ["a.parquet/0", "a.parquet/2"], {"a.parquet/1": "bad_record"})  # fmt: skip
    folder(tmp_path / "f", "a", "b", "c", captions=False)
    names = pa.array(["a.png", "b.png", "c.png"])
    table = pa.table({"file_name": names, "text": texts, "day": days})
    parquet_file(tmp_path / "f" / "metadata.parquet", table)
    assert read(tmp_path / "f") == (["a.png", "c.png"], {"metadata.parquet line 2": "bad_record"})
    assert days[0].as_py() == date(1970, 1, 1)


def test_first_of_columns_of_one_name_is_read(tmp_path):
    table = pa.Table.from_arrays([images(2), pa.array(["a", "b"]), pa.array(["x", "y"])],
                                 ["image", "text", "text"])  # fmt: skip
    parquet_file(tmp_path / "a.parquet", table)
    assert outcomes(tmp_path, "parquet") == {"a.parquet/0": "a", "a.parquet/1": "b"}


def test_parquet_that_announces_more_rows_than_bytes_is_a_bad_shard(tmp_path, monkeypatch):
    parquet_file(tmp_path / "a.parquet", pa.table({"image": images(3), "text": ["a", "b", "c"]}))
    size = (tmp_path / "a.parquet").stat().st_size
    monkeypatch.setattr(parquet_pages, "ROWS_BEYOND_BYTES", 2 - size)
    (shard,) = formats.list_shards(str(tmp_path), "parquet", Fields())
    assert list(formats.names(shard)) == []
    assert [skip.reason for skip in formats.read(shard, Fields())] == ["bad_shard"]


def test_damaged_parquet_never_raises(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"image": grey(n), "text": f"{n}", "captions": ["a"] * n} for n in range(9)]
    write_parquet(tmp_path / "whole.parquet", rows)
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "d").mkdir()
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data))] = rng.integers(256)
        (tmp_path / "d" / "a.parquet").write_bytes(bytes(data))
        try:
            read(tmp_path / "d", "parquet")
        except DataError as error:
            assert "columns" in str(error)


def test_row_that_raises_anything_is_counted_and_not_the_end(tmp_path, monkeypatch):
    data = folder(tmp_path / "d", "a", "b", "c")
    original = cleaning.checked

    def odd(image, rules):
        if image == grey(1):
            raise ZeroDivisionError("of its own")
        return original(image, rules)

    monkeypatch.setattr(cleaning, "checked", odd)
    assert read(data) == (["a.png", "c.png"], {"b.png": "bad_record"})
    monkeypatch.undo()

    def endless(shard, fields, chosen, passed_over):
        yield Row("a.png", "train", grey(1), "a")
        raise KeyError("of its own")

    monkeypatch.setattr(reader, "read", endless)
    names, skips = read(data)
    assert names == ["a.png"] and list(skips.values()) == ["bad_shard"]


def test_import_of_hostile_rows_keeps_the_good_ones(tmp_path):
    """All of it through the import that training begins with."""
    lines = [line for line, _ in BAD_LINES.values() if len(line) < 200_000]
    data = described(tmp_path / "d", '{"file_name": "a.png", "text": "a"}', *lines,
                     '{"file_name": "b.png", "text": "b"}')  # fmt: skip
    os.symlink("/dev/zero", data / "zero.png")
    config = DataConfig(name="image_text_folder", path=str(data), data_dir=str(tmp_path / "t"))
    builder = prepare(config)
    assert sum(split.num_examples for split in builder.info.splits.values()) >= 2
    assert len(read_skipped(builder)) >= len(lines) - 4


def test_long_name_is_not_said_whole(tmp_path):
    folder(tmp_path / "f", "a", captions=False)
    long = "bbbbbbbbb/" * 300 + "c.png"
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": long, "text": "b"}]
    (tmp_path / "f" / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    names, skips = read(tmp_path / "f")
    assert names == ["a.png"]
    assert skips == {f"metadata.jsonl line 2 ({long[:200]})": "missing_file"}


def test_a_footer_that_pyarrow_reads_and_limits_do_not_is_named(tmp_path):
    """Our reader of footers is stricter: what it refuses must not be taken for a bug."""
    folder(tmp_path, "a", captions=False)
    file = tmp_path / "metadata.parquet"
    write_parquet(file, [{"file_name": "a.png", "text": "x"}])
    whole = file.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for at in range(len(whole) - 8 - length, len(whole) - 8):
        file.write_bytes(whole[:at] + b"\x0d" + whole[at + 1 :])  # a kind that Thrift has not
        try:
            formats.survey(str(tmp_path), "image_text_folder", Fields())
        except DataError as error:
            assert "metadata.parquet: cannot be read as parquet" in str(error)
            refused += "its description is damaged" in str(error)
    assert refused
