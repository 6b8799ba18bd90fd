"""A reader of the footer and the page headers of parquet files, as far as limits need them.

For some damaged footers, pyarrow ends the whole process when it reads a column of a row group. Both
are in Thrift's compact protocol:
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

_MAGIC = b"PAR1"
_MOST_STRUCTS = 16  # levels of structs within one another
# Types and codecs by their numbers.
TYPES = ("BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE", "BYTE_ARRAY", "FIXED")
CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")
_REPEATED = 2


class PageError(ValueError):
    """A file that is damaged, or would become too large; the message has the reason."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The place of the pages of a column in a row group. path: names from the top of the schema."""

    path: tuple[str, ...]
    type: str
    codec: str
    repeats: bool
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class RowGroup:
    """A row group."""

    rows: int
    chunks: tuple[Chunk, ...]


def read_footer(file: Any) -> list[RowGroup]:
    """The row groups of a file, read from the file's end.

    Raises:
        PageError: the footer is damaged.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 8))
    end = file.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != _MAGIC or length > size - 8:
        raise PageError("it has no footer")
    file.seek(size - 8 - length)
    try:
        fields, _ = parse(file.read(length))
        leaves = _leaves(fields[2])
        return [_group(group, leaves) for group in fields.get(4, ())]
    except (LookupError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise PageError("its footer is damaged") from error


def _leaves(schema: list[dict[int, Any]]) -> list[bool]:
    """Whether each column repeats within a row: the leaves of the tree that the schema lists."""
    left = [(schema[0].get(5, 0), False)]  # for each level: children to come, whether it repeats
    leaves = []
    for element in schema[1:]:
        while not left[-1][0]:
            left.pop()
        children, above = left[-1]
        left[-1] = (children - 1, above)
        repeats = above or element.get(3) == _REPEATED
        if element.get(5):
            left.append((element[5], repeats))
        else:
            leaves.append(repeats)
    return leaves


def _group(fields: dict[int, Any], leaves: list[bool]) -> RowGroup:
    chunks = []
    for column, repeats in zip(fields[1], leaves, strict=True):
        meta = column[3]
        start, first = meta[9], meta.get(11, 0)
        start = first if 0 < first < start else start
        path = tuple(name.decode() for name in meta[3])
        chunks.append(Chunk(path, TYPES[meta[1]], CODECS[meta[4]], repeats, start, start + meta[7]))
    return RowGroup(fields[3], tuple(chunks))


def parse(data: bytes) -> tuple[dict[int, Any], int]:
    """The fields of a struct by number, and its bytes.

    Raises IndexError: it breaks off.
    """
    return _struct(data, 0, 0)


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    if depth > _MOST_STRUCTS:
        raise PageError("its description is nested too deeply")
    found: dict[int, Any] = {}
    field = 0
    while True:
        first = data[at]
        at += 1
        kind, step = first & 15, first >> 4
        if not first:
            return found, at
        if step:
            field += step
        else:
            field, at = _integer(data, at)
        found[field], at = _value(data, at, kind, depth)


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true and false have no bytes
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:  # bytes
        length, at = _unsigned(data, at)
        return data[at : at + length], at + length
    if kind in (9, 10):
        return _list(data, at, depth + 1)
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise PageError("its description is damaged")


def _list(data: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    """The values of a list or a set, and the position after it."""
    if depth > _MOST_STRUCTS:
        raise PageError("its description is nested too deeply")
    count, kind = data[at] >> 4, data[at] & 15
    at += 1
    if count == 15:
        count, at = _unsigned(data, at)
    found = []
    for _ in range(count):
        if kind in (1, 2):  # true and false have a byte in a list
            value, at = data[at] == 1, at + 1
        else:
            value, at = _value(data, at, kind, depth)
        if at > len(data):
            raise IndexError(at)
        found.append(value)
    return found, at


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise PageError("its description is damaged")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at  # zigzag
