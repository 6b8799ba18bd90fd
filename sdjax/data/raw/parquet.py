"""Reads parquet files with image bytes and captions, as Hugging Face `datasets` writes them.

The image column is a struct {"bytes", "path"} (docs: huggingface.co/docs/datasets/image_dataset)
or plain binary; images that are only a path are missing.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sdjax import paths
from sdjax.data.raw.rows import Chosen, Fields, Row, Shard, Skip, Survey, find_shards
from sdjax.data.sources import DataError
from sdjax.text_files import pointer_note

FORMAT = "parquet"
SUFFIXES = (".parquet",)
_ROWS = 64  # read at a time


def survey(path: str) -> Survey:
    """The parquet files of a folder or a pattern. Raises DataError when there is none."""
    return find_shards(path, SUFFIXES, FORMAT)


@contextmanager
def open_file(path: str) -> Iterator[Any]:
    """A file as pyarrow's ParquetFile, which asks more of Python files than those of buckets do."""
    import pyarrow.parquet

    with paths.to_path(path).open("rb") as file:
        whole = _Whole(file) if paths.is_remote(path) else file
        yield pyarrow.parquet.ParquetFile(whole)


class _Whole(io.RawIOBase):
    """A file with all the methods of one, around what can read, seek and tell."""

    def __init__(self, file: Any):
        super().__init__()
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def check_fields(shard: Shard, fields: Fields) -> bool:
    """Whether a file can be opened at all. Raises DataError when it lacks image or captions."""
    import pyarrow

    try:
        with open_file(shard.path) as table:
            columns = table.schema_arrow.names
    except paths.storage_errors(pyarrow.ArrowException):
        return False
    for what, names in (("image", (fields.image,)), ("text", fields.texts)):
        if not set(names) & set(columns):
            raise DataError(
                f"{shard.path} has the columns {columns}, but data.{what}_key is {names[0]!r}; set "
                f"it to the column of the {'images' if what == 'image' else 'captions'} "
                f"(--{what}_key of sdjax.prepare)"
            )
    return True


def read(
    shard: Shard, fields: Fields, chosen: Chosen, passed_over: Counter[str]
) -> Iterator[Row | Skip]:
    """The rows of a file in order; one that cannot be read to its end ends in a skip."""
    wanted = [fields.image, *fields.texts, fields.captions, *fields.handed_on]
    for name, entry in _entries(shard, wanted, chosen):
        if isinstance(entry, Skip):
            yield entry
            continue
        image = entry.get(fields.image)
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes):
            yield Skip(name, "missing_image", "no bytes in the column")
            continue
        columns = {column: entry.get(column) for column in fields.handed_on}
        text, captions = fields.caption(entry), entry.get(fields.captions)
        yield Row(name, shard.split, image, text, captions, columns)


def names(shard: Shard) -> Iterator[str]:
    """The names of a file's rows: its path and their number."""
    import pyarrow

    try:
        with open_file(shard.path) as table:
            count = table.metadata.num_rows
    except paths.storage_errors(pyarrow.ArrowException):
        return
    yield from (f"{shard.name}/{index}" for index in range(count))


def _entries(
    shard: Shard, wanted: list[str], chosen: Chosen
) -> Iterator[tuple[str, dict[str, Any] | Skip]]:
    import pyarrow

    index = 0
    try:
        with open_file(shard.path) as table:
            columns = [name for name in table.schema_arrow.names if name in wanted]
            for batch in table.iter_batches(_ROWS, columns=columns):
                for position in range(batch.num_rows):
                    name = f"{shard.name}/{index}"
                    index += 1
                    if not chosen(name, shard.split):
                        continue
                    try:
                        yield name, {c: batch.column(c)[position].as_py() for c in columns}
                    except UnicodeDecodeError:
                        yield name, Skip(name, "bad_encoding", "not UTF-8")
    except paths.storage_errors(pyarrow.ArrowException) as error:
        if chosen(shard.name, shard.split):
            detail = f"not read beyond row {index}: {str(error)[:200]}"
            yield shard.name, Skip(shard.name, "bad_shard", pointer_note(shard.path) or detail)
