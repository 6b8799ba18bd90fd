"""The one interface over raw data: its shards, their rows, and what tells that they changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from sdjax import paths
from sdjax.data.raw import folder, parquet, webdataset
from sdjax.data.raw.rows import IMAGE_SUFFIXES, Chosen, Fields, Row, Shard, Skip, find, stamp
from sdjax.data.sources import DataError

_READERS = {folder.FORMAT: folder, webdataset.FORMAT: webdataset, parquet.FORMAT: parquet}
FORMATS = tuple(_READERS)


def all_rows(name: str) -> bool:
    """The `chosen` that leaves nothing out."""
    return True


def list_shards(path: str, format: str, fields: Fields) -> list[Shard]:
    """All shards of a source, in the order in which they are read.

    Raises DataError when there is none, or parquet files have no such columns.
    """
    shards = _READERS[format].shards(path)
    if format == parquet.FORMAT:
        any(parquet.check_fields(shard, fields) for shard in shards)
    return shards


def read(shard: Shard, fields: Fields, chosen: Chosen = all_rows) -> Iterator[Row | Skip]:
    """The rows of a shard, or why one is left out, in order; those whose name is `chosen`."""
    return _READERS[shard.format].read(shard, fields, chosen)


def names(shard: Shard) -> Iterator[str]:
    """The names of all rows of a shard, without decoding anything."""
    return _READERS[shard.format].names(shard)


def fingerprint(shards: list[Shard], fields: Fields) -> str:
    """Changes whenever a file of the source does, by its size or time, or what is read of it."""
    digest = hashlib.sha256(repr(fields).encode())
    for shard in shards:
        of_folder = shard.format == folder.FORMAT
        marks = folder.marks(shard) if of_folder else [stamp(paths.to_path(shard.path))]
        digest.update(f"{shard.name} {shard.split} {shard.start}\n".encode("utf-8", "replace"))
        for mark in marks:
            digest.update(f"{mark}\n".encode("utf-8", "replace"))
    return digest.hexdigest()


def detect(path: str) -> str:
    """Which format lies in a folder or a file. Raises DataError when none is recognised."""
    root = paths.to_path(path)
    for format, reader in ((webdataset.FORMAT, webdataset), (parquet.FORMAT, parquet)):
        if path.lower().endswith(reader.SUFFIXES):
            return format
    if root.is_dir():
        if folder.has_metadata(root) or next(find(root, IMAGE_SUFFIXES), None):
            return folder.FORMAT
        for format, reader in ((webdataset.FORMAT, webdataset), (parquet.FORMAT, parquet)):
            if next(find(root, reader.SUFFIXES), None):
                return format
    elif not root.exists() and not any(sign in path for sign in "*?["):
        raise DataError(f"--input is {path!r}, which is not there")
    raise DataError(
        f"--input is {path!r}, where there is neither {folder.METADATA}, nor images, nor files "
        f"that end in {', '.join(webdataset.SUFFIXES + parquet.SUFFIXES)}; set --input to a "
        f"folder that has them, or --format to one of {FORMATS}"
    )
