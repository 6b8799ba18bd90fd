"""The reader of `metadata.parquet`: one row for each picture, which is in a file of its own."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Any

from sdjax.data.config import DataError
from sdjax.data.raw.parquet import batches, cell, open_file
from sdjax.data.raw.parquet_footer import read_footer
from sdjax.data.raw.parquet_pages import check_rows
from sdjax.data.raw.rows import BadRow, raised
from sdjax.system import paths, untrusted
from sdjax.system.text_files import pointer_note

NAME = "metadata.parquet"
_PARTS = 64  # most parts of one row group; each part decodes the group up to the part's end


def names_pictures(file: paths.Path) -> bool:
    """Whether a file has the column `file_name`; other files of this name hold other data.

    Raises DataError: it cannot be read.
    """
    try:
        with open_file(str(file)) as table:
            return "file_name" in table.schema_arrow.names
    except untrusted.damage() as error:
        raise _unreadable(file, error) from error


def _unreadable(file: paths.Path, error: Exception) -> DataError:
    why = pointer_note(file) or f"{str(error)[:200]}; copy the file again"
    return DataError(f"{file}: cannot be read as parquet ({why})")


def stretches(file: paths.Path, rows: int) -> Iterator[tuple[int, int]]:
    """The first row, and the row after the last, of each part of about `rows` or more rows.

    Raises:
        DataError: its footer is damaged, or announces more rows than it can have.
    """
    try:
        groups = _sizes(file)
    except untrusted.damage() as error:
        raise _unreadable(file, error) from error
    start = stop = 0
    for group in groups:
        step = max(rows, -(-group // _PARTS))
        end = stop + group
        while stop < end:
            stop = min(max(start + step, stop), end)
            if stop - start >= step:
                yield start, stop
                start = stop
    if start < stop:
        yield start, stop


def parse(file: paths.Path, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """The number, from 1, and the fields of the rows from `start` up to `stop`, counted from 0."""
    number = start
    try:
        for number, row in enumerate(_rows(file, start, stop), start=start + 1):
            yield number, row
    except untrusted.damage() as error:
        yield number + 1, BadRow("bad_shard", f"not read from here on: {str(error)[:200]}")


def _rows(file: paths.Path, start: int, stop: int) -> Iterator[dict[str, Any] | BadRow]:
    with open_file(str(file)) as table:
        sizes = _sizes(file)
        ends = list(itertools.accumulate(sizes))
        groups = [i for i, end in enumerate(ends) if end > start and end - sizes[i] < stop]
        number = ends[groups[0]] - sizes[groups[0]] if groups else 0  # rows before the batch
        names = list(dict.fromkeys(table.schema_arrow.names))
        for batch in batches(table, str(file), names, 1024, groups):
            for position in range(max(0, start - number), min(batch.num_rows, stop - number)):
                yield _row(batch, position)
            number += batch.num_rows
            if number >= stop:
                return


def _sizes(file: paths.Path) -> list[int]:
    """The rows of each row group. Raises PageError: they are more than the file can have."""
    with file.open("rb") as opened:
        sizes = [group.rows for group in read_footer(opened)]
        check_rows(sum(map(abs, sizes)), opened.seek(0, io.SEEK_END))
    return sizes


def _row(batch: Any, position: int) -> dict[str, Any] | BadRow:
    try:
        return {
            name: cell(batch, batch.schema.names.index(name), position)
            for name in dict.fromkeys(batch.schema.names)
        }
    except UnicodeDecodeError:
        return BadRow("bad_encoding", "not UTF-8")
    except Exception as error:
        return BadRow(*raised(error))
