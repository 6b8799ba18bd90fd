"""Compressed JSON on disk by key, for answers that take minutes to get."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdjax.errors import write_error


class Entry:
    """value: what is kept under the key, None if nothing is; set it to keep it."""

    value: Any = None


@contextlib.contextmanager
def entry(folder: Path, key: str) -> Iterator[Entry]:
    """The entry `key` of `folder`; a value that is set inside is written when the block ends well.

    An unreadable file counts as absent and is written anew. A value that cannot be written is lost
    to the next who asks, and that is told.
    """
    path, found = folder / f"{key}.json.gz", Entry()
    with contextlib.suppress(OSError, EOFError, ValueError):
        found.value = json.loads(gzip.decompress(path.read_bytes()))
    before = found.value
    yield found
    if found.value is before:
        return
    try:
        _write(path, gzip.compress(json.dumps(found.value).encode(), mtime=0))
    except OSError as error:
        print(f"note: {write_error(path, error)}; the next plan takes as long", file=sys.stderr)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Complete or not at all: two plans may be made at once.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
