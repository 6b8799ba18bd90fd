"""Reads the metadata of an image folder: JSON Lines, a JSON array, or CSV, and parts of them.

A file is cut into stretches of bytes, each of whole rows, that workers parse by themselves. UTF-8
is the rule; a byte order mark may say UTF-16 or UTF-32, as spreadsheets write it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from sdjax import paths
from sdjax.data.raw.rows import BadRow, Dialect, shown
from sdjax.data.sources import DataError
from sdjax.text_files import BOM, TextError, codec

CSV_SUFFIX = ".csv"
DELIMITERS = ",;\t|"
_HEAD = 1 << 16  # bytes, in which a file shows how it is written
_BETWEEN = re.compile(r"[\s,\[\]]*")  # what stands between the objects of an array
_DECODER = json.JSONDecoder()
Parsed = dict[str, Any] | BadRow


def read_dialect(file: paths.Path) -> Dialect:
    """How a metadata file is written, from its beginning.

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
    # An array, or objects over several lines each, rather than one in every line.
    spread = re.match(r"\s*(\[\s*[{\]]|\{[ \t]*\r?\n)", text)
    return Dialect("values" if spread else "lines", encoding)


def _delimiter(text: str) -> str:
    """The one that gives a column file_name; else the one that gives most columns."""
    headers = {mark: _header(text, mark) for mark in DELIMITERS}
    for mark, header in headers.items():
        if "file_name" in header:
            return mark
    return max(headers, key=lambda mark: len(headers[mark]))


def _header(text: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error:
        return []


def row_ends(file: paths.Path, dialect: Dialect) -> Iterator[tuple[int, int, list[str]]]:
    """(number of its last line, byte after it, the cells of CSV) of each row, the header too.

    Raises:
        DataError: the rows of CSV, or of JSON that is not one object a line, cannot be told apart.
    """
    with file.open("rb") as opened:
        lines = _Lines(opened, dialect.encoding)
        try:
            if dialect.kind == "csv":
                reader = csv.reader(lines, delimiter=dialect.delimiter)
                for cells in reader:
                    yield reader.line_num, lines.offset, cells
            elif dialect.kind == "values":
                text, line, offset, at = "".join(lines), 1, lines.mark, 0
                for _, _, end in _values(text, file):
                    line += text.count("\n", at, end)
                    offset += len(_encoded(text[at:end], dialect.encoding))
                    at = end
                    yield line, offset, []
            else:
                for number, _ in enumerate(lines, start=1):
                    yield number, lines.offset, []
        except csv.Error as error:
            raise DataError(f"{file} line {reader.line_num}: {error}; mend the line") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: it is not {dialect.encoding}; save it as UTF-8") from error


class _Lines:
    """Lines of text with their ends, which knows how many bytes it has handed out.

    Bytes that are not UTF-8 become surrogates: then one row cannot be used, and not the file.
    """

    def __init__(self, file: Any, encoding: str):
        self._file, self._encoding = file, encoding
        self.offset = 0
        self.mark = 0  # bytes of the byte order mark

    def __iter__(self) -> Iterator[str]:
        for text, size in self._texts():
            if not self.offset and text.startswith(BOM):
                self.mark = len(_encoded(BOM, self._encoding))
                text = text.removeprefix(BOM)
            self.offset += size
            yield text

    def _texts(self) -> Iterator[tuple[str, int]]:
        if self._encoding == "utf-8":
            for line in self._file:
                yield line.decode("utf-8", "surrogateescape"), len(line)
            return
        # A byte of a line feed may be half of another character.
        whole = self._file.read().decode(self._encoding, "surrogatepass")
        for text in io.StringIO(whole, newline="\n"):
            yield text, len(_encoded(text, self._encoding))


def _encoded(text: str, encoding: str) -> bytes:
    return text.encode(encoding, "surrogateescape" if encoding == "utf-8" else "surrogatepass")


def _values(text: str, file: Any) -> Iterator[tuple[Any, int, int]]:
    """(value, its position, that after it) of each JSON value. DataError if one is none."""
    at = _BETWEEN.match(text).end()  # type: ignore[union-attr]  # it matches nothing, too
    while at < len(text):
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"{file}: not JSON ({error}); mend it, or write one object in every line"
            ) from error
        yield value, at, end
        at = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]


def parse(stretch: bytes, dialect: Dialect, line: int) -> Iterator[tuple[int, Parsed]]:
    """(line, its object or what is wrong with it) of each row; blank lines are nothing at all.

    Args:
        stretch: bytes of the file, from after a row or from its beginning, to the end of a row.
        line: number of the first.
    """
    lines = _Lines(io.BytesIO(stretch), dialect.encoding)
    if dialect.kind == "csv":
        yield from _parse_csv(lines, dialect, line)
    elif dialect.kind == "values":
        text, at = "".join(lines), 0
        for value, start, end in _values(text, "metadata"):
            line += text.count("\n", at, end)
            at = end
            yield line, _checked(value, text[start:end], dialect)
    else:
        for number, text in enumerate(lines, start=line):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                bad = _no_text(text, dialect) or BadRow("bad_json", str(error))
                yield number, bad
            else:
                yield number, _checked(value, text, dialect)


def _checked(value: Any, text: str, dialect: Dialect) -> Parsed:
    if bad := _no_text(text, dialect):
        return bad
    if not isinstance(value, dict):
        return BadRow("bad_record", f"a JSON {type(value).__name__}, not an object")
    return value


def _no_text(text: str, dialect: Dialect) -> BadRow | None:
    """Why the row is none, where its bytes were no text."""
    return (
        BadRow("bad_encoding", f"not {dialect.encoding.upper()}") if shown(text) != text else None
    )


def _parse_csv(lines: _Lines, dialect: Dialect, first: int) -> Iterator[tuple[int, Parsed]]:
    reader = csv.reader(lines, delimiter=dialect.delimiter)
    for cells in reader:
        if cells:
            number = first + reader.line_num - 1
            if len(cells) == len(dialect.header):
                yield number, dict(zip(dialect.header, cells, strict=True))
            else:
                detail = f"{len(cells)} cells; the header has {len(dialect.header)}"
                yield number, BadRow("bad_record", detail)


def read_rows(file: paths.Path) -> Iterator[tuple[int, Parsed]]:
    """(line, its object or what is wrong with it) of each row of a whole JSON file.

    Raises:
        DataError: the file cannot be read.
    """
    dialect = read_dialect(file)
    try:
        yield from parse(file.read_bytes(), dialect, 1)
    except paths.storage_errors() as error:
        raise DataError(f"{file}: {error}") from error
