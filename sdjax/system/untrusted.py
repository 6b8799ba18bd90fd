"""Files of unknown origin: the errors of damaged ones, their messages, and limits of size.

Every reader of such a file reads it within `explained`, and keeps no list of errors of its own.
"""

from __future__ import annotations

import collections
import csv
import lzma
import os
import pickle
import stat
import struct
import sys
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sdjax.errors import UserError
from sdjax.system import paths

# The errors of the parsers of Python, numpy and JAX. An encrypted zip raises a RuntimeError, a
# broken PNG a SyntaxError, and protobuf a SystemError for half a letter.
_DAMAGE: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError,
    MemoryError, OSError, RuntimeError, SyntaxError, SystemError, TypeError, ValueError,
    csv.Error, lzma.LZMAError, pickle.PickleError, struct.error, tarfile.TarError,
    tokenize.TokenError,  # numpy reads its headers as Python
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error,
)  # fmt: skip
# The errors of libraries. A library that is not loaded has raised none.
_LIBRARIES = (
    ("PIL.Image", "DecompressionBombError"),
    ("google.protobuf.json_format", "Error"),
    ("google.protobuf.message", "Error"),
    ("pyarrow", "ArrowException"),
    ("safetensors", "SafetensorError"),
    ("yaml", "YAMLError"),
)
MOST_TEXT = 256 * 2**20  # bytes of a text file
MOST_JSON = 8 * 2**20  # bytes of a JSON file, which may take 45 times as much memory
MOST_DEPTH = 100  # levels of lists and objects within one another
_LONGEST = 300  # letters of a cause that an error shows
_ITEMS, _LEVELS, _LETTERS = 6, 3, 80  # items, levels and letters of a value that an error shows


def damage(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the errors that a damaged file may raise, and `more`, for an `except` clause.

    Call it when the error is handled: the errors of a library count once it is loaded.
    """
    loaded = [getattr(sys.modules.get(module), name, None) for module, name in _LIBRARIES]
    return (*paths.storage_errors(*_DAMAGE), *(kind for kind in loaded if kind), *more)


@contextmanager
def explained(
    path: object,
    kind: str,
    *,
    error: type[UserError] = UserError,
    remedy: str = "get it again, or another",
) -> Iterator[None]:
    """A context for reading a file: an error from damage becomes a UserError that names the file.

    Args:
        path: the file or folder.
        kind: the sort of file that was expected, such as "a tokenizer".
        error: the class of UserError to raise.
        remedy: the end of the message.

    Raises:
        UserError: `error`, with the cause; a UserError from within keeps its words.
    """
    try:
        yield
    except BaseException as found:
        if isinstance(found, UserError):
            named = str(path) in str(found)
            if named and isinstance(found, error):
                raise
            raise error(str(found) if named else f"{path}: {found}") from found
        # A panic in Rust (in tokenizers, safetensors) is a BaseException of pyo3.
        if not isinstance(found, damage()) and type(found).__name__ != "PanicException":
            raise
        raise error(f"{path}: cannot be read as {kind} ({why(found)}); {remedy}") from found


def why(error: BaseException) -> str:
    """Return the cause in an error of a library as one short line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    try:
        text = " ".join(str(getattr(error, "strerror", None) or error).split())
    except ValueError:  # a number has too many digits
        text = ""
    if "integer string conversion" in text:
        return f"it has a number of more than {sys.get_int_max_str_digits():,} digits"
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    plain = isinstance(error, OSError | UserError) or type(error) is ValueError
    return text if plain and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def brief(value: Any) -> str:
    """Return a value for a message: its repr, but short, whatever the value is.

    The repr of a list that holds itself in many places is longer than any memory.
    """
    text = _brief(value, _LEVELS)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def listed(problems: Iterable[object], most: int = 50) -> str:
    """Return problems as lines of a message, `most` of them and how many more there are.

    Of every kind, which is what a line says before its first dot ("missing: unet"), some are shown.
    """
    lines = [str(problem) for problem in problems]
    seen: collections.Counter[str] = collections.Counter()
    rank = []  # of each line among those of its kind
    for line in lines:
        kind = line.partition(".")[0]
        rank.append(seen[kind])
        seen[kind] += 1
    shown = sorted(sorted(range(len(lines)), key=rank.__getitem__)[:most])
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "\n  ".join([*(lines[i] for i in shown), *more])


def is_number(name: str) -> bool:
    """Whether a name is a whole number in ASCII: "²" and "٣" are digits to `str.isdigit`."""
    return name.isascii() and name.isdigit()


def plain(name: Any) -> str:
    """Return a name for a message: without quotes if it is a short text, else as `brief` does."""
    return name if isinstance(name, str) and len(name) <= _LETTERS else brief(name)


def _brief(value: Any, levels: int) -> str:
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        left, right = ("[", "]") if isinstance(value, list) else ("(", ")")
        left, right = ("{", "}") if isinstance(value, Mapping | set | frozenset) else (left, right)
        if not levels and len(value):
            return f"{left}...{right}"
        parts: list[str] = []
        for part in value:
            if len(parts) == _ITEMS:
                parts.append(f"... {len(value)} in all")
                break
            item = f": {_brief(value[part], levels - 1)}" if isinstance(value, Mapping) else ""
            parts.append(_brief(part, levels - 1) + item)
        comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
        return left + ", ".join(parts) + comma + right
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length():,} bits"
    if isinstance(value, str | bytes) and len(value) > _LETTERS:
        return f"{value[:_LETTERS]!r}... ({len(value):,} in all)"
    if isinstance(value, str | bytes | int | float | complex | None):
        return repr(value)
    return f"a {type(value).__name__}"


def check_regular(path: paths.PathLike) -> int:
    """Return the size of a file in bytes.

    Raises:
        UserError: it is a folder, a device, a pipe or a socket.
        OSError: it does not exist.
    """
    path = paths.to_path(path)
    if paths.is_remote(path):
        return int(path.stat().length)  # type: ignore[attr-defined]  # epath's
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, a pipe or a socket"
        raise UserError(f"{path} is {what}; expected a file")
    return found.st_size


def read_bytes(path: paths.PathLike, most: int, *, pipes: bool = False) -> bytes:
    """Return the bytes of a file.

    Args:
        most: the largest size in bytes.
        pipes: whether it may be a pipe or a device, where the user named it.

    Raises:
        UserError: it is no regular file, or has more than `most` bytes.
        OSError: it cannot be read.
    """
    path = paths.to_path(path)
    size = 0 if pipes else check_regular(path)
    if size <= most:
        with path.open("rb") as file:
            data = file.read(size + 1)  # a read allocates all the bytes that it may return
            if len(data) > size:  # it has grown, or has no size, as files of /proc
                data += file.read(most + 1 - len(data))
        if len(data) <= most:
            return data
    has = f"{size:,}" if size > most else "more"
    raise UserError(f"{path}: {has} bytes; expected at most {most:,}")


def check_depth(value: Any, most: int = MOST_DEPTH) -> None:
    """Raise a ValueError if lists and dictionaries are nested more than `most` deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        # By identity: a list of YAML may occur in many places, and in itself.
        inner = {
            id(part): part
            for outer in level
            for part in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(part, dict | list)
        }
        level = list(inner.values())
        if not level:
            return
    raise ValueError(f"lists and groups are nested more than {most} deep")
