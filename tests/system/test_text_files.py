"""Text of users, whatever program wrote it: marks, line ends, UTF-16, and what git-lfs leaves."""

import argparse
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.data import image_files, pictures, transforms
from sdjax.data.config import DataError
from sdjax.data.raw import formats
from sdjax.data.raw.clean import Rules, clean
from sdjax.data.raw.metadata import read_dialect
from sdjax.data.raw.rows import Fields, Row
from sdjax.data.text.tokenizer import Tokenizer, TokenizerError
from sdjax.errors import UserError
from sdjax.evaluation import audit, reference
from sdjax.formats import torch_file
from sdjax.formats.folders import ModelError
from sdjax.formats.folders import read_json as read_bundle_json
from sdjax.models import weights
from sdjax.models.weights import WeightsError
from sdjax.sampling.inputs import read_latents, read_prompts
from sdjax.sweeps import space
from sdjax.system import text_files
from sdjax.system.text_files import TextError, decode, lines, read_json, read_text

# Breaks of lines to str.splitlines, and to no editor.
NO_BREAKS = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i"
MARKED = ("utf-8-sig", "utf-16", "utf-32")
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md, "The Pointer"
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize("codec", ["utf-8", *MARKED])
def test_prompts_file_of_any_encoding_gives_the_prompts_alone(tmp_path, codec):
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"a red café 猫\r\n\r\n  {NO_BREAKS} \rthe last".encode(codec))
    assert read_prompts([], str(file)) == ["a red café 猫", NO_BREAKS, "the last"]
    assert read_prompts(["first"], str(file))[:2] == ["first", "a red café 猫"]


def test_lines_are_those_of_pythons_text_files(tmp_path):
    file = tmp_path / "a.txt"
    text = f"{NO_BREAKS}\none\r\ntwo\rthree\n\nfour"
    file.write_bytes(text.encode())
    with file.open(encoding="utf-8") as opened:  # its own count, which is not that of splitlines
        assert lines(read_text(file)) == [line.rstrip("\n") for line in opened]
    assert lines("a\n") == ["a", ""] and lines("") == [""]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"one\ncaf\xe9", "it is not UTF-8: byte 0xe9 in line 2; save it as UTF-8"),
        ("text".encode("utf-16-le"), "UTF-16 without a byte order mark; save it as UTF-8"),
        ("text".encode("utf-16-be"), "UTF-16 without a byte order mark; save it as UTF-8"),
        (b"\xff\xfea\0b", "it is not UTF-16: .*save it as UTF-8"),
        (POINTER, "a git-lfs pointer, not the file itself; run `git lfs pull`"),
    ],
)
def test_what_is_no_text_is_said_with_the_file_and_the_remedy(tmp_path, data, message):
    file = tmp_path / "a.txt"
    file.write_bytes(data)
    with pytest.raises(TextError, match=message) as caught:
        read_text(file)
    assert str(caught.value).startswith(f"{file}: ")
    with pytest.raises(UserError, match=rf"^--prompts_file={file}: .*{message}"):
        read_prompts([], str(file))


def test_a_text_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TextError, match=rf"{tmp_path}/gone: cannot be read \(No such file"):
        read_text(tmp_path / "gone")


@pytest.mark.parametrize("codec", ["utf-8", *MARKED])
def test_json_and_yaml_with_a_mark_are_read(tmp_path, codec):
    file = tmp_path / "config.json"
    file.write_bytes(json.dumps({"é": [1]}, ensure_ascii=False).encode(codec))
    assert read_json(file) == read_bundle_json(file) == {"é": [1]}
    file = tmp_path / "audit.yaml"
    file.write_bytes("prompts: [é]\nnonsense: 1\n".encode(codec))
    with pytest.raises(audit.AuditError, match="unknown field nonsense"):  # so it was read
        audit.read_audit(file)
    file.write_bytes("nonsense: 1\n".encode(codec))
    with pytest.raises(ValueError, match="expected a group `fields:`"):
        space.read_space(file, None)


@pytest.mark.parametrize("codec", MARKED)
def test_a_tokenizer_folder_with_marks_is_the_same_tokenizer(tmp_path, codec):
    made = Tokenizer.train(["a red circle", "a blue café"], vocab_size=530)
    made.save(tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_text(encoding="utf-8").replace("\n", "\r\n").encode(codec))
    assert Tokenizer.load(tmp_path).identity == made.identity


# ---- metadata of image folders ---------------------------------------------------------------

CAPTIONS = ["plain", 'café; 猫, "quoted"\tand more', "two\nlines", NO_BREAKS]


def as_csv(delimiter):
    text = io.StringIO()
    rows = [(f"{n}.png", caption) for n, caption in enumerate(CAPTIONS)]
    csv.writer(text, delimiter=delimiter).writerows([("file_name", "text"), *rows])
    return text.getvalue()


def as_json(indent=None, *, lines=False, end="\n"):
    entries = [{"file_name": f"{n}.png", "text": caption} for n, caption in enumerate(CAPTIONS)]
    if lines:
        dumped = [json.dumps(entry, ensure_ascii=False, indent=indent) for entry in entries]
        return end.join(dumped) + end
    return json.dumps(entries, ensure_ascii=False, indent=indent)


WRITTEN = {
    "comma": ("metadata.csv", as_csv(",")),
    "semicolon": ("metadata.csv", as_csv(";")),
    "tab": ("metadata.csv", as_csv("\t")),
    "lines": ("metadata.jsonl", as_json(lines=True)),
    "windows lines": ("metadata.jsonl", as_json(lines=True, end="\r\n")),
    "array": ("metadata.jsonl", as_json()),
    "indented array": ("metadata.jsonl", as_json(2)),
    "indented objects": ("metadata.jsonl", as_json(2, lines=True)),
}


def image_folder(folder, name, data):
    folder.mkdir(exist_ok=True)
    for number in range(len(CAPTIONS)):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / name).write_bytes(data)
    return folder


def read_all(folder):
    """[(name, caption), ...] and skips, as prepare and training read them."""
    used, left_out = [], []
    for shard in formats.list_shards(str(folder), "image_text_folder", Fields()):
        for item in formats.read(shard, Fields()):
            (used if isinstance(item, Row) else left_out).append(item)
    return [(item.name, item.text) for item in used], left_out


@pytest.mark.parametrize("rows_per_shard", [500, 1, 3])
@pytest.mark.parametrize("codec", ["utf-8", *MARKED])
@pytest.mark.parametrize("written", WRITTEN)
def test_metadata_as_programs_write_it_gives_every_caption(
    tmp_path, monkeypatch, written, codec, rows_per_shard
):
    monkeypatch.setattr("sdjax.data.raw.folder.ROWS_PER_SHARD", rows_per_shard)
    name, text = WRITTEN[written]
    folder = image_folder(tmp_path / "d", name, text.encode(codec))
    used, left_out = read_all(folder)
    assert used == [(f"{n}.png", caption) for n, caption in enumerate(CAPTIONS)]
    assert not left_out


@pytest.mark.parametrize("codec", ["utf-8", "utf-16"])
@pytest.mark.parametrize("written", ["lines", "indented array", "semicolon"])
def test_lines_of_rows_that_cannot_be_used_are_counted_in_the_file(tmp_path, written, codec):
    name, text = WRITTEN[written]
    text = text.replace("0.png", "../0.png").replace("3.png", "")
    folder = image_folder(tmp_path / "d", name, text.encode(codec))
    _, left_out = read_all(folder)
    assert [skip.reason for skip in left_out] == ["unsafe_path", "no_file_name"]
    # The line on which the row ends.
    expected = {"lines": (1, 4), "indented array": (5, 17), "semicolon": (2, 6)}[written]
    got = [int(skip.name.split(" line ")[1].split()[0]) for skip in left_out]
    assert tuple(got) == expected


def test_pictures_to_judge_have_the_captions_of_such_metadata(tmp_path):
    for written in ("lines", "indented array"):
        name, text = WRITTEN[written]
        folder = image_folder(tmp_path / written, name, text.encode("utf-8-sig"))
        assert pictures.open_folder(folder).captions == tuple(CAPTIONS)
    (folder / name).write_bytes(b'{"file_name": "0.png", "text": "x"}\n{oops\n')
    with pytest.raises(UserError, match=r"metadata.jsonl line 2: bad_json"):
        pictures.open_folder(folder)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("metadata.jsonl", b'[{"file_name": "0.png", "text": "x"},\n{oops}]', "not JSON .*line 2"),
        ("metadata.jsonl", POINTER, "git-lfs pointer"),
        ("metadata.csv", POINTER, "git-lfs pointer"),
        ("metadata.csv", "file_name,text".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("metadata.csv", b"name;text\n0.png;x\n", r"columns \['name', 'text'\]; expected file_n"),
    ],
)
def test_metadata_that_cannot_be_read_is_named_with_the_cause(tmp_path, name, data, message):
    folder = image_folder(tmp_path / "d", name, data)
    with pytest.raises(DataError, match=message) as caught:
        formats.list_shards(str(folder), "image_text_folder", Fields())
    assert str(folder / name) in str(caught.value)


def test_dialects_are_told_from_the_beginning_of_the_file(tmp_path):
    file = tmp_path / "metadata.jsonl"
    for data, kind in ((b'["a"]\n["b"]\n', "lines"), (b"\n [ {}]", "values"), (b"[]", "values")):
        file.write_bytes(data)
        assert read_dialect(file).kind == kind


@pytest.mark.parametrize("codec", ["utf-8", *MARKED])
def test_captions_beside_pictures_are_read_whatever_their_encoding(codec):
    encoded = io.BytesIO()
    Image.new("RGB", (16, 16)).save(encoded, "PNG")
    row = Row("a.png", "train", encoded.getvalue(), "un café\n".encode(codec))
    assert clean(row, Rules()).text == "un café"


# ---- what git-lfs leaves ---------------------------------------------------------------------


def openers(file, folder):
    """{what the file is: what opens it}; each raises its own error."""
    return {
        "safetensors": (WeightsError, lambda: weights.load_file(file)),
        "header": (WeightsError, lambda: weights.read_header(file)),
        "torch": (WeightsError, lambda: torch_file.read_tensors(file)),
        "index": (WeightsError, lambda: weights.load_file(folder / "a.safetensors.index.json")),
        "config": (ModelError, lambda: read_bundle_json(file)),
        "tokenizer": (TokenizerError, lambda: Tokenizer.load(folder)),
        "picture": (UserError, lambda: pictures.open_folder(folder)),
        "statistics": (UserError, lambda: reference.read(file)),
        "latents": (UserError, lambda: read_latents(str(file), 1, (8, 8, 4))),
        "prompts": (UserError, lambda: read_prompts([], str(file))),
        "audit": (UserError, lambda: audit.read_audit(file)),
        "space": (UserError, lambda: space.read_space(file, argparse.Namespace())),
    }


NAMES = {"safetensors": "a.safetensors", "header": "a.safetensors", "torch": "a.pth",
         "index": "a.safetensors.index.json", "tokenizer": "vocab.json", "picture": "a.png",
         "statistics": "a.npz", "latents": "a.npy"}  # fmt: skip


@pytest.mark.parametrize("what", openers("", Path()))
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, what):
    file = tmp_path / NAMES.get(what, "a.txt")
    file.write_bytes(POINTER)
    if what == "tokenizer":
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    kind, opens = openers(file, tmp_path)[what]
    with pytest.raises(kind, match=r"git-lfs pointer, not the file itself; run `git lfs") as caught:
        opens()
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_a_shard_that_is_a_pointer_of_git_lfs_is_reported_as_one(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    format = formats.detect(str(tmp_path))
    (shard,) = formats.list_shards(str(tmp_path), format, Fields())
    (skip,) = formats.read(shard, Fields())
    assert skip.reason == "bad_shard" and "git-lfs pointer" in skip.detail


def test_pictures_and_captions_that_are_pointers_are_dropped_as_such():
    encoded = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(encoded, "PNG")
    skip = clean(Row("a.png", "train", POINTER, "x"), Rules())
    assert skip.reason == "git_lfs_pointer" and "git lfs pull" in skip.detail
    skip = clean(Row("a.png", "train", encoded.getvalue(), POINTER), Rules())
    assert skip.reason == "git_lfs_pointer" and "git lfs pull" in skip.detail
    with pytest.raises(image_files.ImageError, match="git_lfs_pointer"):
        transforms.decode(POINTER)


def test_decode_leaves_a_text_without_marks_as_it_is():
    for text in ("", "é", "\u200b", "a\ufeffb", "and a\0b "):
        assert decode(text.encode()) == text
    assert not text_files.is_pointer(b"version 1\n")
