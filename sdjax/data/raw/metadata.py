"""The reader of an image folder's metadata: JSON Lines, a JSON array, or CSV, and parts of them.

A file is cut into stretches of bytes, each of whole rows, which workers parse independently. UTF-8
is the rule; a byte order mark may announce UTF-16 or UTF-32, as spreadsheets write it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from sdjax.data.config import DataError
from sdjax.data.raw.limits import MOST_ROW_BYTES, MOST_WHOLE_BYTES
from sdjax.data.raw.rows import BadRow, Dialect, shown
from sdjax.system import paths, untrusted
from sdjax.system.text_files import BOM, TextError, codec

CSV_SUFFIX = ".csv"
DELIMITERS = ",;\t|"
_HEAD = 1 << 16  # bytes of the beginning that show the dialect of a file
_BETWEEN = re.compile(r"[\s,\[\]]*")  # the text between the objects of an array
_DECODER = json.JSONDecoder()
Parsed = dict[str, Any] | BadRow


def read_dialect(file: paths.Path) -> Dialect:
    """The dialect of a metadata file, from its beginning.

    Raises:
        DataError: it is no text, or no column of its CSV is called file_name.
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD)
        encoding = codec(head)
    except paths.storage_errors(TextError) as error:
        raise DataError(f"{file}: {error}") from error
    text = head.decode(encoding, "ignore").removeprefix(BOM)
    if file.name.lower().endswith(CSV_SUFFIX):
        return Dialect("csv", encoding, _delimiter(text))
    # An array, or objects over several lines each, instead of one in every line.
    spread = re.match(r"\s*(\[\s*[{\]]|\{[ \t]*\r?\n)", text)
    return Dialect("values" if spread else "lines", encoding)


def _delimiter(text: str) -> str:
    """The delimiter that gives a column file_name; else the one that gives most columns."""
    headers = {mark: _header(text, mark) for mark in DELIMITERS}
    for mark, header in headers.items():
        if "file_name" in header:
            return mark
    return max(headers, key=lambda mark: len(headers[mark]))


def _header(text: str, delimiter: str) -> list[str]:
    """The first row of a CSV."""
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error:
        return []


def row_ends(file: paths.Path, dialect: Dialect) -> Iterator[tuple[int, int, list[str]]]:
    """The last line, the byte after it, and the cells (of CSV) of each row, the header included.

    A row of CSV that cannot be read has no cells.

    Raises:
        DataError: the rows of JSON with several lines an object cannot be separated.
    """
    with file.open("rb") as opened:
        try:
            if dialect.kind == "values":
                text, mark = _whole(opened, dialect.encoding)
                line, offset, at = 1, mark, 0
                for _, _, end in _values(text, file):
                    line += text.count("\n", at, end)
                    offset += len(_encoded(text[at:end], dialect.encoding))
                    at = end
                    yield line, offset, []
                return
            lines = _Lines(opened, dialect.encoding)
            if dialect.kind == "csv":
                for cells in _csv_rows(lines, dialect.delimiter):
                    yield lines.number, lines.offset, [] if isinstance(cells, BadRow) else cells
            else:
                for _ in lines:
                    yield lines.number, lines.offset, []
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: it is not {dialect.encoding}; save it as UTF-8") from error
        except BadRow as bad:
            raise DataError(f"{file}: {bad.detail}") from bad


class _Long(str):
    """A line that is too long to be kept; its text is empty."""


class _Lines:
    """Lines of text with their ends, and the counts of lines and bytes so far.

    Bytes that are not UTF-8 become surrogates: then one row cannot be used, instead of the file.

    Args:
        size: bytes of the file to be read; -1 for all.
    """

    def __init__(self, file: Any, encoding: str, size: int = -1):
        self._file, self._encoding, self._size = file, encoding, size
        self._whole: Iterator[str] | None = None
        self.number = self.offset = 0
        self.begin: int | None = None  # the offset of a row of CSV, which may have many lines
        if encoding != "utf-8":  # a byte of a line feed may be half of another character
            text, self.offset = _whole(file, encoding, size)
            self._whole = io.StringIO(text, newline="\n")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.begin is not None and self.offset - self.begin > MOST_ROW_BYTES:
            raise BadRow("caption_too_long", f"a row of more than {MOST_ROW_BYTES:,} bytes")
        if self._whole is not None:
            text = next(self._whole)
            self.offset += len(_encoded(text, self._encoding))
        else:
            text = self._line()
        self.number += 1
        if isinstance(text, _Long) and self.begin is not None:
            raise BadRow("caption_too_long", f"a line of more than {MOST_ROW_BYTES:,} bytes")
        return text

    def _line(self) -> str:
        if 0 <= self._size <= self.offset:
            raise StopIteration
        line = self._file.readline(MOST_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        first, self.offset = not self.offset, self.offset + len(line)
        if len(line) > MOST_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = self._file.readline(_HEAD)
                self.offset += len(line)
            return _Long()
        text = line.decode("utf-8", "surrogateescape")
        return text.removeprefix(BOM) if first else text


def _whole(file: Any, encoding: str, size: int = -1) -> tuple[str, int]:
    """The text of a file, or of `size` bytes of it, and the bytes of its byte order mark.

    Raises BadRow: it is too large.
    """
    data = file.read(MOST_WHOLE_BYTES + 1 if size < 0 else size)
    if len(data) > MOST_WHOLE_BYTES:
        raise BadRow("too_many_bytes", f"more than {MOST_WHOLE_BYTES:,} bytes, which are read as a "
                     "whole; write one object in every line, in UTF-8")  # fmt: skip
    text = data.decode(encoding, "surrogateescape" if encoding == "utf-8" else "surrogatepass")
    mark = len(_encoded(BOM, encoding)) if text.startswith(BOM) else 0
    return text.removeprefix(BOM), mark


def _encoded(text: str, encoding: str) -> bytes:
    return text.encode(encoding, "surrogateescape" if encoding == "utf-8" else "surrogatepass")


def _values(text: str, file: Any) -> Iterator[tuple[Any, int, int]]:
    """Each JSON value, its position, and the position after it. DataError if one is none."""
    at = _BETWEEN.match(text).end()  # type: ignore[union-attr]  # it matches "" too
    while at < len(text):
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError, MemoryError) as error:
            raise DataError(
                f"{file}: not JSON ({untrusted.why(error)}); mend it, or write one object in "
                "every line"
            ) from error
        yield value, at, end
        at = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]


def parse(file: Any, size: int, dialect: Dialect, line: int) -> Iterator[tuple[int, Parsed]]:
    """The line of each row, and its object or a BadRow; blank lines are skipped.

    Args:
        file: binary, after a row or at its beginning.
        size: bytes from there to the end of a row; -1 for all.
        line: number of the first line.
    """
    if dialect.kind == "values":
        text, at = _whole(file, dialect.encoding, size)[0], 0
        for value, start, end in _values(text, "metadata"):
            line += text.count("\n", at, end)
            at = end
            yield line, _checked(value, text[start:end], dialect)
        return
    lines = _Lines(file, dialect.encoding, size)
    if dialect.kind == "csv":
        yield from _parse_csv(lines, dialect, line)
        return
    for number, text in enumerate(lines, start=line):
        if isinstance(text, _Long):
            detail = f"a line of more than {MOST_ROW_BYTES:,} bytes"
            yield number, BadRow("caption_too_long", detail)
        elif text.strip():
            yield number, _json(text, dialect)


def _json(text: str, dialect: Dialect) -> Parsed:
    try:
        value = json.loads(text)
        untrusted.check_depth(value)
    except (ValueError, RecursionError, MemoryError) as error:
        return _no_text(text, dialect) or BadRow("bad_json", untrusted.why(error))
    return _checked(value, text, dialect)


def _checked(value: Any, text: str, dialect: Dialect) -> Parsed:
    if bad := _no_text(text, dialect):
        return bad
    if not isinstance(value, dict):
        return BadRow("bad_record", f"a JSON {type(value).__name__}, not an object")
    return value


def _no_text(text: str, dialect: Dialect) -> BadRow | None:
    """A BadRow if the bytes of a row were no text; else None."""
    return (
        BadRow("bad_encoding", f"not {dialect.encoding.upper()}") if shown(text) != text else None
    )


def _parse_csv(lines: _Lines, dialect: Dialect, first: int) -> Iterator[tuple[int, Parsed]]:
    for cells in _csv_rows(lines, dialect.delimiter):
        number = first + lines.number - 1
        if isinstance(cells, BadRow):
            yield number, cells
        elif len(cells) == len(dialect.header):
            yield number, dict(zip(dialect.header, cells, strict=True))
        elif cells:
            detail = f"{len(cells)} cells; the header has {len(dialect.header)}"
            yield number, BadRow("bad_record", detail)


def _csv_rows(lines: _Lines, delimiter: str) -> Iterator[list[str] | BadRow]:
    """The cells of each row, or a BadRow; the reader continues with the next line."""
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        lines.begin = lines.offset
        try:
            cells: list[str] | BadRow = next(reader)
        except StopIteration:
            return
        except BadRow as bad:
            cells = bad
        except csv.Error as error:
            is_long = "field larger" in str(error)
            cells = BadRow("caption_too_long" if is_long else "bad_record", str(error))
        yield cells


def read_rows(file: paths.Path) -> Iterator[tuple[int, Parsed]]:
    """The line of each row of a whole JSON file, and its object or a BadRow.

    Raises:
        DataError: the file cannot be read.
    """
    dialect = read_dialect(file)
    try:
        untrusted.check_regular(file)
        with file.open("rb") as opened:
            yield from parse(opened, -1, dialect, 1)
    except BadRow as bad:
        raise DataError(f"{file}: {bad.detail}") from bad
    except paths.storage_errors(UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from error
