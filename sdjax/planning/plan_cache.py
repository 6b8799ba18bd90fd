"""A cache of compressed JSON on disk, for answers that take minutes to compute."""

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


class CacheEntry:
    """One entry of the cache. value: the answer under the key, or None; set it to keep one."""

    value: Any = None


@contextlib.contextmanager
def entry(folder: Path, key: str) -> Iterator[CacheEntry]:
    """The entry `key` of `folder`; a value that is set inside is written when the block ends well.

    An unreadable file counts as absent and is replaced. If a value cannot be written, a note says
    so and the next plan computes it again.
    """
    path, found = folder / f"{key}.json.gz", CacheEntry()
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
    # Written whole or not at all: two processes may write the same entry.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
