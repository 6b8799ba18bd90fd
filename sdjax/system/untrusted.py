"""Files that strangers made: what their damage may raise, how it is said, and how much is read.

Whoever reads such a file does so within `explained`. No reader keeps a list of its own.
"""

from __future__ import annotations

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sdjax.errors import UserError
from sdjax.system import paths

# What Python's own parsers raise, and numpy's and JAX's, which raise nothing else. An encrypted zip
# is a RuntimeError, a broken PNG a SyntaxError, half a letter for protobuf a SystemError.
_DAMAGE: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError,
    MemoryError, OSError, RuntimeError, SyntaxError, SystemError, TypeError, ValueError,
    csv.Error, lzma.LZMAError, pickle.PickleError, struct.error, tarfile.TarError,
    tokenize.TokenError,  # of numpy, which reads its headers as Python
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error,
)  # fmt: skip
# Those of libraries, which have raised none unless they are loaded.
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
MOST_DEPTH = 100  # of lists and objects within one another
_LONGEST = 300  # letters of a cause that an error shows
_ITEMS, _LEVELS, _LETTERS = 6, 3, 80  # of a value that an error shows


def damage(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return what a damaged file may raise, and `more`: for `except`, which asks when one is up."""
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
    """In here a file is read: whatever its damage raises becomes a UserError that names it.

    Args:
        path: of the file or folder.
        kind: the sort of file that was expected, as "a tokenizer".
        error: which UserError to raise.
        remedy: for the end of the message.

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
        # What pyo3 makes of a panic in Rust (in tokenizers, safetensors) is no Exception.
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
    except ValueError:  # of a number with too many digits
        text = ""
    if "integer string conversion" in text:
        return f"it has a number of more than {sys.get_int_max_str_digits():,} digits"
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    plain = isinstance(error, OSError | UserError) or type(error) is ValueError
    return text if plain and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def brief(value: Any) -> str:
    """Return a value for a message: as repr has it, but short, whatever the value is.

    The repr of a list that holds itself in many places is longer than any memory.
    """
    text = _brief(value, _LEVELS)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def is_number(name: str) -> bool:
    """Whether a name is a whole number in ASCII: "²" and "٣" are digits to `str.isdigit`."""
    return name.isascii() and name.isdigit()


def plain(name: Any) -> str:
    """Return a name for a message as it is, without quotes; short, and whatever it is."""
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
        OSError: it is not there.
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
        most: bytes that it may have.
        pipes: it may be a pipe or a device, as the user named it.

    Raises:
        UserError: it is no regular file, or has more than `most` bytes.
        OSError: it cannot be read.
    """
    path = paths.to_path(path)
    size = 0 if pipes else check_regular(path)
    if size <= most:
        with path.open("rb") as file:
            data = file.read(size + 1)  # no more: a read makes room for all that it is asked for
            if len(data) > size:  # it grew, or has no size, as those of /proc
                data += file.read(most + 1 - len(data))
        if len(data) <= most:
            return data
    has = f"{size:,}" if size > most else "more"
    raise UserError(f"{path}: {has} bytes; expected at most {most:,}")


def check_depth(value: Any, most: int = MOST_DEPTH) -> None:
    """Raise a ValueError if lists and dictionaries are nested more than `most` deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        # By identity: in YAML the same list may stand in many places, and in itself.
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
