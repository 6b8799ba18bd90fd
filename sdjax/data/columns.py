"""Facts about every record that need no decoding: size, hashes of its key, lack of a caption.

They take one pass over the records, and are kept beside the dataset.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import time
import uuid
import zipfile
from collections.abc import Callable

import numpy as np
from absl import logging

from sdjax.system import paths, untrusted

CHUNK = 4096  # records a thread reads at once
_HEADER = 1 << 14  # bytes of the header of a file of numpy, at most
PROGRESS = 60.0  # seconds between two lines about a long pass


@dataclasses.dataclass(frozen=True)
class Columns:
    """Arrays with one entry for each record.

    height, width: int32 of the upright picture, 0 where its header cannot be read.
    share, fold: uint64, see `splits.hashes`.
    empty: bool, there is no caption.
    score: float32, of data.score_key; 0 without.
    """

    height: np.ndarray
    width: np.ndarray
    share: np.ndarray
    fold: np.ndarray
    empty: np.ndarray
    score: np.ndarray

    def take(self, numbers: np.ndarray) -> Columns:
        """The columns of some records."""
        return Columns(*(getattr(self, f.name)[numbers] for f in dataclasses.fields(self)))


TYPES = (np.int32, np.int32, np.uint64, np.uint64, np.bool_, np.float32)
Row = tuple[int, int, int, int, bool, float]


def load(
    count: int, read: Callable[[int], Row], *, directory: str, identity: str, threads: int
) -> Columns:
    """The columns of a dataset, from its directory, or from `read` and then kept there.

    read: number of a record -> its row. identity: identifies the dataset and the settings.
    """
    key = hashlib.sha256(f"{identity} {count}".encode()).hexdigest()[:16]
    path = paths.to_path(directory) / f"columns-{key}.npz"
    found = _read(path, count)
    if found is not None:
        return found
    logging.info("reading the sizes and keys of the %d records of %s, once", count, directory)

    def chunk(first: int) -> list[np.ndarray]:
        rows = [read(number) for number in range(first, min(first + CHUNK, count))]
        # Arrays, not lists: as Python's numbers the rows of a large dataset would take gigabytes.
        return [np.array([row[i] for row in rows], kind) for i, kind in enumerate(TYPES)]

    chunks, spoke = [], time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        for done in pool.map(chunk, range(0, count, CHUNK)):
            chunks.append(done)
            if time.monotonic() - spoke > PROGRESS:
                spoke, ready = time.monotonic(), min(len(chunks) * CHUNK, count)
                logging.warning("%s: sizes and keys of %d of %d records are read, once",
                                directory, ready, count)  # fmt: skip
    columns = Columns(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))
    _write(path, columns)
    return columns


def _read(path: paths.Path, count: int) -> Columns | None:
    """The columns in a file; None if it is missing or damaged."""
    names = [field.name for field in dataclasses.fields(Columns)]
    try:
        with paths.reading(path) as local:
            untrusted.check_regular(local)
            with zipfile.ZipFile(local) as archive:
                if any(part.file_size > _HEADER + 8 * count for part in archive.infolist()):
                    return None
            with np.load(local, allow_pickle=False) as arrays:
                columns = Columns(*(arrays[name] for name in names))
    except untrusted.damage():
        return None
    whole = all(
        getattr(columns, name).shape == (count,) and getattr(columns, name).dtype == kind
        for name, kind in zip(names, TYPES, strict=True)
    )
    return columns if whole else None


def _write(path: paths.Path, columns: Columns) -> None:
    """Write the columns into a file, or warn that this is not possible."""
    # Hosts that share the disk may all write at once: each writes a file of its own first.
    own = path.parent / f"{path.stem}-{os.getpid()}-{uuid.uuid4().hex[:8]}.npz"
    try:
        with paths.writing(own) as local, open(local, "wb") as file:
            np.savez(file, **dataclasses.asdict(columns))
        own.replace(path)
    except paths.storage_errors() as error:
        logging.warning("%s cannot be written (%s): sizes and keys are read at each start",
                        path, error)  # fmt: skip
