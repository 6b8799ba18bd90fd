"""The reader of parquet files with image bytes and captions, as of Hugging Face `datasets`.

The image column is a struct {"bytes", "path"} (docs: huggingface.co/docs/datasets/image_dataset)
or plain binary; images that are only a path count as missing.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sdjax.data.config import DataError
from sdjax.data.raw import parquet_pages as pages
from sdjax.data.raw.files import PathGuard
from sdjax.data.raw.limits import MOST_PICTURE_BYTES, MOST_ROW_BYTES
from sdjax.data.raw.parquet_footer import read_footer
from sdjax.data.raw.rows import (
    BadRow,
    Chosen,
    Fields,
    Row,
    Shard,
    Skip,
    Survey,
    find_shards,
    raised,
)
from sdjax.system import paths, untrusted
from sdjax.system.text_files import pointer_note

FORMAT = "parquet"
SUFFIXES = (".parquet",)
_ROWS = 64  # read at a time, if they are not large


def survey(path: str, fields: Fields, *, outside: bool) -> Survey:
    """The parquet files of a folder or a pattern. Raises DataError when there is none."""
    return find_shards(path, SUFFIXES, FORMAT, outside=outside)


@contextmanager
def open_file(path: str) -> Iterator[Any]:
    """A context with a file as pyarrow's ParquetFile.
    Raises PageError: it announces more rows than it can have.
    """
    import pyarrow.parquet

    with paths.to_path(path).open("rb") as file:
        whole = _Whole(file) if paths.is_remote(path) else file
        table = pyarrow.parquet.ParquetFile(whole)
        pages.check_rows(table.metadata.num_rows, whole.seek(0, io.SEEK_END))
        yield table


def batches(
    table: Any, path: str, columns: Collection[str], most: int, numbers: Sequence[int] | None = None
) -> Any:
    """The rows of some columns of an opened file, `most` or fewer at once.

    Args:
        numbers: of the row groups; None for all.

    Raises PageError: a page would become too large. The pages of files in buckets are not checked,
    since every page would cost a request; one row of them is decoded at a time.
    """
    rows = 1
    if not paths.is_remote(path):
        with paths.to_path(path).open("rb") as file:
            groups = read_footer(file)
            some = groups if numbers is None else [groups[number] for number in numbers]
            rows = pages.rows_at_once(some, file, columns, most)
    return table.iter_batches(rows, columns=list(columns), row_groups=numbers)


def cell(batch: Any, column: int, position: int, most: int = MOST_ROW_BYTES) -> Any:
    """The value of a cell as an object of Python. Raises BadRow: it is larger than `most` bytes."""
    found = batch.column(column)[position]
    if (size := pages.cell_bytes(found)) > most:
        reason = "too_many_bytes" if most == MOST_PICTURE_BYTES else "caption_too_long"
        name = untrusted.brief(batch.schema.names[column])
        raise BadRow(reason, f"column {name}: {size:,} bytes; at most {most:,} are read")
    return found.as_py()


class _Whole(io.RawIOBase):
    """A file with all methods of one, around an object with read, seek and tell."""

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


@contextmanager
def _opened(shard: Shard) -> Iterator[Any]:
    """A context as `open_file`, for a shard. Raises BadRow unless it is a file of its folder."""
    path = paths.to_path(shard.path)
    PathGuard(shard.root, outside=shard.outside).check(path)
    with open_file(shard.path) as table:
        yield table


def check_fields(shard: Shard, fields: Fields) -> bool:
    """Whether a file can be opened at all. Raises DataError when it lacks image or captions."""
    try:
        with _opened(shard) as table:
            columns = table.schema_arrow.names
    except Exception:  # `read` reports the error
        return False
    for named in fields.images:
        if not named.is_alpha and named.origin not in columns:
            raise DataError(
                f"{shard.path} has the columns {columns}, but data.images reads {named.name!r} "
                f"from {named.origin!r}; set its key to a column of images (--named_image of "
                "sdjax.prepare)"
            )
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
    """The rows of a file in order; a file that cannot be read to its end gives a skip."""
    pictures = [fields.image, *(named.origin for named in fields.images)]
    wanted = [*pictures, *fields.texts, fields.captions, *fields.handed_on]
    for name, entry in _entries(shard, wanted, pictures, chosen):
        if isinstance(entry, Skip):
            yield entry
            continue
        image = _picture(entry.get(fields.image))
        if image is None:
            yield Skip(name, "missing_image", "no bytes in the column")
            continue
        columns = {column: entry.get(column) for column in fields.handed_on}
        text, captions = fields.caption(entry), entry.get(fields.captions)
        images = {named.name: _picture(entry.get(named.origin)) for named in fields.images}
        yield Row(name, shard.split, image, text, captions, columns, images=images)


def _picture(value: Any) -> bytes | None:
    """The bytes of a cell with a picture; None if it has none."""
    value = value.get("bytes") if isinstance(value, dict) else value
    return value if isinstance(value, bytes) else None


def names(shard: Shard, fields: Fields) -> Iterator[str]:
    """The names of a file's rows: its path and their number."""
    try:
        with _opened(shard) as table:
            count = table.metadata.num_rows
    except Exception:  # `read` reports the error
        return
    yield from (f"{shard.name}/{index}" for index in range(count))


def _entries(
    shard: Shard, wanted: list[str], pictures: list[str], chosen: Chosen
) -> Iterator[tuple[str, dict[str, Any] | Skip]]:
    index = 0
    try:
        with _opened(shard) as table:
            # The first of several columns with one name is read.
            columns = [name for name in dict.fromkeys(table.schema_arrow.names) if name in wanted]
            for batch in batches(table, shard.path, columns, _ROWS):
                for position in range(batch.num_rows):
                    name = f"{shard.name}/{index}"
                    index += 1
                    if chosen(name, shard.split):
                        yield name, _entry(name, batch, position, columns, pictures)
    except BadRow as bad:
        if chosen(shard.name, shard.split):
            yield shard.name, Skip(shard.name, bad.reason, bad.detail)
    except Exception as error:
        if chosen(shard.name, shard.split):
            detail = f"not read beyond row {index}: {str(error)[:200]}"
            yield shard.name, Skip(shard.name, "bad_shard", pointer_note(shard.path) or detail)


def _entry(
    name: str, batch: Any, position: int, columns: list[str], pictures: list[str]
) -> dict[str, Any] | Skip:
    """The cells of a row by column, or a skip."""
    numbers = {column: batch.schema.names.index(column) for column in columns}
    try:
        return {
            column: cell(
                batch,
                number,
                position,
                MOST_PICTURE_BYTES if column in pictures else MOST_ROW_BYTES,
            )
            for column, number in numbers.items()
        }
    except UnicodeDecodeError:
        return Skip(name, "bad_encoding", "not UTF-8")
    except Exception as error:
        return Skip(name, *raised(error))
