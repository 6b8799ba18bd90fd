"""Compressed JSON on disk by key, for answers that take minutes to get."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Entry:
    """value: what is kept under the key, None if nothing is; set it to keep it."""

    value: Any = None


@contextlib.contextmanager
def entry(folder: Path, key: str) -> Iterator[Entry]:
    """The entry `key` of `folder`; a value that is set inside is written when the block ends well.

    An unreadable file counts as absent and is written anew.
    """
    path, found = folder / f"{key}.json.gz", Entry()
    with contextlib.suppress(OSError, EOFError, ValueError):
        found.value = json.loads(gzip.decompress(path.read_bytes()))
    before = found.value
    yield found
    if found.value is before:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Complete or not at all: two plans may be made at once.
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=key)
    with os.fdopen(handle, "wb") as file:
        file.write(gzip.compress(json.dumps(found.value).encode(), mtime=0))
    os.replace(temporary, path)
