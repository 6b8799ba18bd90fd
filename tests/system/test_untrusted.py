"""What damaged files raise, and how it is said: in one short line that names the file."""

import json
import lzma
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import pytest

from sdjax.errors import UserError
from sdjax.system import untrusted
from sdjax.system.text_files import TextError, read_json, read_text
from sdjax.system.untrusted import brief, check_depth, damage, explained, read_bytes, why

LIBRARIES = {
    "PIL.Image": "DecompressionBombError",
    "pyarrow": "ArrowException",
    "safetensors": "SafetensorError",
    "yaml": "YAMLError",
}


def test_every_error_of_the_parsers_is_on_the_list():
    for error in (
        zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, pickle.UnpicklingError,
        tarfile.TarError, RecursionError, MemoryError, OverflowError, UnicodeDecodeError,
        json.JSONDecodeError, KeyError, IndexError, NotImplementedError, EOFError, SyntaxError,
    ):  # fmt: skip
        assert issubclass(error, damage()), error
    assert not issubclass(KeyboardInterrupt, damage()) and not issubclass(SystemExit, damage())


@pytest.mark.parametrize("module", LIBRARIES)
def test_errors_of_libraries_are_on_the_list_once_they_are_loaded(module):
    library = pytest.importorskip(module)
    assert issubclass(getattr(library, LIBRARIES[module]), damage())


def test_an_error_of_a_library_becomes_one_that_names_the_file():
    with pytest.raises(TextError, match=r"^a/b: cannot be read as a zip \(BadZipFile: no\); sigh$"):
        with explained("a/b", "a zip", error=TextError, remedy="sigh"):
            raise zipfile.BadZipFile("no")
    with pytest.raises(UserError, match=r"^a/b: field x$"), explained("a/b", "a zip"):
        raise UserError("field x")
    with pytest.raises(TextError, match=r"^a/b: its own$"), explained("a/b", "a zip"):
        raise TextError("a/b: its own")
    with pytest.raises(KeyboardInterrupt), explained("a/b", "a zip"):
        raise KeyboardInterrupt


def test_causes_are_one_short_line_each():
    assert why(RecursionError("maximum")) == "it is nested too deeply"
    assert why(MemoryError()) == "it takes more memory than there is"
    assert why(KeyError("x")) == "KeyError: 'x'"
    assert why(KeyError(1 << 100_000)) == "KeyError"
    assert why(ValueError("two\n  lines")) == "two lines"
    assert why(FileNotFoundError(2, "No such file", "x")) == "No such file"
    assert len(why(ValueError("x" * 10**6))) < 400
    with pytest.raises(ValueError) as seen:
        json.loads("1" * 5000)
    assert why(seen.value) == "it has a number of more than 4,300 digits"


def test_brief_is_repr_for_what_is_short_and_short_for_the_rest():
    for value in (None, True, 1, -2.5, "a", b"a", [1, "b"], (1,), (), {}, {"a": [1, {"b": 2}]}):
        assert brief(value) == repr(value)
    assert brief(1 << 100_000) == "a number of 100,001 bits"
    assert brief("x" * 1000).endswith("... (1,000 in all)")
    assert brief(list(range(1000))) == "[0, 1, 2, 3, 4, 5, ... 1000 in all]"
    assert brief([[[[1]]]]) == "[[[[...]]]]"
    laughs = ("lol",)
    for _ in range(200):  # 2**200 in the end
        laughs = (laughs, laughs)
    assert len(brief(laughs)) < 200 and len(brief({"a": laughs})) < 200
    mine = []
    mine.append(mine)
    assert len(brief(mine)) < 50


def test_nesting_is_counted_once_for_a_list_in_many_places():
    deep = []
    for _ in range(99):
        deep = [deep, deep]
    check_depth(deep)
    check_depth("a")
    for value in ([deep], {"a": deep}):
        with pytest.raises(ValueError, match="nested more than 100 deep"):
            check_depth(value)
    mine = {}
    mine["a"] = mine
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        check_depth(mine)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ("[" * 500 + "]" * 500, "nested more than 100 deep"),
        ('{"a": ' + "7" * 5000 + "}", "a number of more than 4,300 digits"),
        ('{"a": 1', "delimiter"),
        ("", "Expecting value"),
    ],
    ids=["open", "deep", "deeper than read", "digits", "cut short", "empty"],
)
def test_json_that_no_program_writes_is_refused_in_words(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(TextError, match=rf"config.json: not JSON \(.*{message}"):
        read_json(file)


def test_files_beyond_the_limit_are_not_read(tmp_path):
    file = tmp_path / "config.json"
    with file.open("wb") as opened:
        opened.truncate(untrusted.MOST_JSON + 1)
    tracemalloc.start()
    with pytest.raises(TextError, match="config.json: 8,388,609 bytes; expected at most"):
        read_json(file)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_devices_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, what in {"pipe": "a device, a pipe", "zero": "a device", ".": "a folder"}.items():
        with pytest.raises(TextError, match=f"is {what}"):
            read_text(tmp_path / name)
    with pytest.raises(UserError, match="more bytes; expected at most 1,000"):
        read_bytes("/dev/zero", 1000, pipes=True)


def test_a_list_of_problems_is_bounded_and_shows_every_kind():
    many = [f"mis-shaped: unet.{i}" for i in range(100)] + ["missing: unet.a", "missing: vae.b"]
    lines = untrusted.listed(many).split("\n  ")
    assert lines == [*many[:48], "missing: unet.a", "missing: vae.b", "and 52 more"]
    assert untrusted.listed(many[:50]) == "\n  ".join(many[:50])
    assert untrusted.listed([]) == ""
