"""Text and JSON files that users wrote, in any program.

UTF-8 is expected. A byte order mark announces another encoding, or UTF-8, and is never part of the
text. Lines end at a line feed, a carriage return, or both. `str.splitlines` also breaks them at
form feeds, U+0085 and U+2028, which texts contain within a line.
"""

from __future__ import annotations

import codecs
import json
from typing import Any

from sdjax.errors import UserError
from sdjax.system import paths, untrusted

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
BOM = "\ufeff"
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md; hawser is the older name of git-lfs.
_POINTERS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
)
POINTER = (
    "it is a git-lfs pointer, not the file itself; run `git lfs pull` where it was cloned, or "
    "download the file"
)


class TextError(UserError):
    """A text file that cannot be read; the message names it, the reason and the remedy."""


def is_pointer(start: bytes) -> bool:
    """Whether a file that begins with `start` is a pointer in place of a git-lfs file."""
    return start.startswith(_POINTERS)


def pointer_note(path: paths.PathLike) -> str:
    """The text `POINTER` if the file is a git-lfs pointer, else ""; for messages of errors."""
    try:
        with paths.to_path(path).open("rb") as file:
            return POINTER if is_pointer(file.read(64)) else ""
    except paths.storage_errors():
        return ""


def codec(start: bytes) -> str:
    """The codec of a text that begins with these bytes, by its byte order mark.

    Raises:
        TextError: it is a git-lfs pointer, or UTF-16 without a mark.
    """
    if is_pointer(start):
        raise TextError(POINTER)
    for mark, name in _MARKS:
        if start.startswith(mark):
            return name
    if b"\0" in start[:2]:
        raise TextError("it seems to be UTF-16 without a byte order mark; save it as UTF-8")
    return "utf-8"


def decode(data: bytes) -> str:
    """The text in the bytes of a file, without its byte order mark.

    Raises:
        TextError: it is no text in UTF-8, or in the encoding of its mark.
    """
    name = codec(data)
    try:
        return data.decode(name).removeprefix(BOM)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TextError(
            f"it is not {name.upper().removesuffix('-LE').removesuffix('-BE')}: byte "
            f"0x{data[error.start]:02x} in line {line}; save it as UTF-8"
        ) from error


def read_text(path: paths.PathLike, *, most: int = untrusted.MOST_TEXT, pipes: bool = False) -> str:
    """The text of a file.

    Args:
        most: the largest size in bytes.
        pipes: whether it may be a pipe, where the user named it.

    Raises:
        TextError: the file is missing, cannot be read, is no regular file, is too large, or is no
            text.
    """
    path = paths.to_path(path)
    try:
        return decode(untrusted.read_bytes(path, most, pipes=pipes))
    except TextError as error:
        raise TextError(f"{path}: {error}") from error
    except UserError as error:
        raise TextError(str(error)) from error
    except paths.storage_errors() as error:
        why = getattr(error, "strerror", None) or error
        raise TextError(f"{path}: cannot be read ({why})") from error


def lines(text: str) -> list[str]:
    """The lines of a text, without their ends, as editors count them."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_json(path: paths.PathLike, *, most: int = untrusted.MOST_JSON) -> Any:
    """The value in a JSON file.

    Args:
        most: the largest size in bytes.

    Raises:
        TextError: it cannot be read, is larger than `most`, is not JSON, or is nested more than 100
            deep.
    """
    text = read_text(path, most=most)
    try:
        value = json.loads(text)
        untrusted.check_depth(value)
    except untrusted.damage() as error:
        raise TextError(f"{paths.to_path(path)}: not JSON ({untrusted.why(error)})") from error
    return value


def read_object(path: paths.PathLike, *, most: int = untrusted.MOST_JSON) -> dict[str, Any]:
    """The object in a JSON file, such as the notes that a verb left for the next start.

    Raises:
        TextError: as `read_json`, or it holds another value.
    """
    value = read_json(path, most=most)
    if not isinstance(value, dict):
        raise TextError(
            f"{paths.to_path(path)} is {untrusted.brief(value)}; expected a JSON object"
        )
    return value
