"""The common interface to raw data: its shards, their rows, and a fingerprint of their content."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

from sdjax.data.config import DataError
from sdjax.data.raw import folder, parquet, webdataset
from sdjax.data.raw.files import PathGuard
from sdjax.data.raw.rows import (
    IMAGE_SUFFIXES,
    Chosen,
    Fields,
    Row,
    Shard,
    Skip,
    Survey,
    by_ending,
    ending,
    raised,
    stamp,
)
from sdjax.data.raw.tree import walk
from sdjax.errors import UserError
from sdjax.system import paths

_READERS = {folder.FORMAT: folder, webdataset.FORMAT: webdataset, parquet.FORMAT: parquet}
FORMATS = tuple(_READERS)
_IMAGES = frozenset(IMAGE_SUFFIXES)
_PLAIN = Fields()


def all_rows(name: str, split: str) -> bool:
    """The `chosen` that leaves nothing out."""
    return True


def survey(path: str, format: str, fields: Fields, *, outside: bool = False) -> Survey:
    """The shards of a source, and the origin of its splits.

    outside: links may lead out of the folder.

    Raises DataError when there is none, or parquet files lack the columns of `fields`.
    """
    found = _READERS[format].survey(path, fields, outside=outside)
    if format == parquet.FORMAT:
        any(parquet.check_fields(shard, fields) for shard in found.shards)
    return found


def list_shards(path: str, format: str, fields: Fields) -> list[Shard]:
    """All shards of a source, in the order in which they are read. Raises DataError as `survey`."""
    return survey(path, format, fields).shards


def read(
    shard: Shard,
    fields: Fields,
    chosen: Chosen = all_rows,
    passed_over: Counter[str] | None = None,
) -> Iterator[Row | Skip]:
    """The rows of a shard in order, or skips with the reason, of those that are `chosen`.

    `passed_over` counts the members of tars without a row, by ending.
    """
    counts = Counter[str]() if passed_over is None else passed_over
    try:
        yield from _READERS[shard.format].read(shard, fields, chosen, counts)
    except UserError:
        raise
    except Exception as error:  # a damaged shard raises any error; the rows before it are read
        if chosen(shard.name, shard.split):
            yield Skip(shard.name, "bad_shard", f"not read from here on: {raised(error)[1]}")


def names(shard: Shard, fields: Fields = _PLAIN) -> Iterator[str]:
    """The names of all rows of a shard, without decoding anything."""
    try:
        yield from _READERS[shard.format].names(shard, fields)
    except UserError:
        raise
    except Exception:  # `read` reports the error
        return


def fingerprint(shards: list[Shard], fields: Fields) -> str:
    """A digest that changes with the size or time of any file of the source, or with the fields."""
    digest = hashlib.sha256(repr(fields).encode())
    if fields.images:
        digest.update(repr(fields.images).encode())
    for shard in shards:
        of_folder = shard.format == folder.FORMAT
        marks = folder.marks(shard, fields) if of_folder else [stamp(paths.to_path(shard.path))]
        digest.update(f"{shard.name} {shard.split} {shard.start}\n".encode("utf-8", "replace"))
        for mark in marks:
            digest.update(f"{mark}\n".encode("utf-8", "replace"))
    return digest.hexdigest()


def detect(path: str, *, outside: bool = False) -> str:
    """The format of a folder or a file. Raises DataError when none is recognised.

    outside: links may lead out of the folder.
    """
    root = paths.to_path(path)
    there: Counter[str] = Counter()
    if root.is_dir():
        shards = None
        inside = PathGuard(str(root), outside=outside)
        for below, files in walk(root, outside=outside):
            there.update(map(ending, files))
            if folder.metadata_of(root / below, files, inside) or not _IMAGES.isdisjoint(there):
                return folder.FORMAT
            shards = shards or next(filter(None, map(_format_of, files)), None)
        if shards:
            return shards
    elif found := _format_of(path):
        return found
    elif not root.exists() and not any(sign in path for sign in "*?["):
        raise DataError(f"--input is {path!r}, which is not there")
    there_is = f" (there are {by_ending(there)})" if there else ""
    raise DataError(
        f"--input is {path!r}, where there is neither {folder.METADATA}, nor images, nor files "
        f"that end in {', '.join(webdataset.SUFFIXES + parquet.SUFFIXES)}{there_is}; set --input "
        f"to a folder that has them, or --format to one of {FORMATS}"
    )


def _format_of(file: str) -> str:
    """The format of a shard by its name; "" for other files."""
    for reader in (webdataset, parquet):
        if file.lower().endswith(reader.SUFFIXES):
            return reader.FORMAT
    return ""
