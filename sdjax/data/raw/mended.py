"""Captions that take the place of those in the data: a metadata file of their own.

Each line is {"file_name": the name of a row, "text": its caption}, as in metadata.jsonl.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping

from sdjax.data.config import DataError
from sdjax.data.raw.limits import MOST_CAPTION_CHARS
from sdjax.system import paths, untrusted

MOST_FILE = 256 << 20  # bytes


def read(file: paths.Path) -> dict[str, str]:
    """Return {name of a row: caption}; the later of two lines of a name counts.

    Raises:
        DataError: the file cannot be read, or is another.
    """
    try:
        data = untrusted.read_bytes(file, MOST_FILE).decode()
    except untrusted.damage() as error:
        raise DataError(f"{file} cannot be read: {untrusted.why(error)}") from error
    found = {}
    for number, line in enumerate(data.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(_expected(file, number)) from error
        if not isinstance(name, str) or not isinstance(text, str) or not name:
            raise DataError(_expected(file, number))
        found[name] = text[: MOST_CAPTION_CHARS + 1]
    return found


def _expected(file: paths.Path, line: int) -> str:
    return f'{file}, line {line}: expected {{"file_name": "a.png", "text": "a caption"}}'


def write(file: paths.Path, captions: Mapping[str, str]) -> None:
    """Write captions, whole or not at all, and on the disk when this returns.

    Raises:
        WriteError: it cannot be written.
    """
    rows = ({"file_name": name, "text": text} for name, text in sorted(captions.items()))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with paths.writing(file) as local, open(local, "wb") as opened:
        opened.write(text.encode("utf-8", "replace"))
        opened.flush()
        os.fsync(opened.fileno())


def digest(file: str) -> str:
    """Return the sha256 of a file, which changes with every caption. Raises DataError."""
    read(paths.to_path(file))
    return hashlib.sha256(untrusted.read_bytes(paths.to_path(file), MOST_FILE)).hexdigest()


@functools.lru_cache(maxsize=1)
def of_run(file: str, sha256: str) -> Mapping[str, str]:
    """Return what `read` does, once a process; a file that has changed since is an error.

    Raises:
        DataError: it cannot be read, or changed.
    """
    if digest(file) != sha256:
        raise DataError(f"{file} has changed while the data was prepared; run the command again")
    return read(paths.to_path(file))
