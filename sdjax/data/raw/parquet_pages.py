"""Checks the pages of a parquet file before they are decoded, and the cells before they are copied.

A page says in its header how large it is when it is decompressed, and pyarrow believes it; a file
of 33 kB became gigabytes. The headers are Thrift's compact protocol:
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sdjax import untrusted
from sdjax.data.raw.limits import (
    MOST_BATCH_BYTES,
    MOST_PAGE_BYTES,
    MOST_PAGE_EXPANSION,
    MOST_PAGE_VALUES,
    ROWS_BEYOND_BYTES,
)

_HEADS = (1 << 10, 1 << 20)  # bytes in which a header ends; most do in the first
_MOST_STRUCTS = 8  # within one another
_UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8  # fields of PageHeader
_VALUES, _ENCODING, _ENCODING_V2 = 1, 2, 4  # fields of the headers within it
_OF_DICTIONARY = (2, 8)  # encodings: numbers of texts in the dictionary
_DELTA_BYTE_ARRAY = 7  # an encoding in which a value begins as the one before
_OVERHEAD = 64  # bytes of a value as an object of Python


class PageError(ValueError):
    """A file that would become more than may be read; the message says what of it."""


def check_rows(table: Any, size: int) -> int:
    """How many rows a file of so many bytes announces. Raises PageError: more than it can have."""
    rows = table.metadata.num_rows
    if not 0 <= rows <= size + ROWS_BEYOND_BYTES:
        raise PageError(f"it announces {rows:,} rows in {size:,} bytes")
    return rows


def rows_at_once(table: Any, file: Any, columns: Collection[str], most: int) -> int:
    """How many rows are to be decoded at once, `most` or fewer, after a look at every page.

    Args:
        table: a ParquetFile.
        file: the same file, binary; its position is kept.
        columns: names at the top of the schema.

    Raises:
        PageError: a page would become too large.
    """
    place, largest = file.tell(), 1
    try:
        for group in range(table.metadata.num_row_groups):
            chunks = table.metadata.row_group(group)
            for number in range(chunks.num_columns):
                chunk = chunks.column(number)
                if chunk.path_in_schema.split(".")[0] in columns or chunk.path_in_schema in columns:
                    repeats = table.schema.column(number).max_repetition_level > 0
                    largest = max(largest, _largest_page(file, chunk, repeats))
    finally:
        file.seek(place)
    return max(1, min(most, MOST_BATCH_BYTES // largest))


def _largest_page(file: Any, chunk: Any, repeats: bool) -> int:
    """The bytes of the largest page of a column in a row group, decompressed."""
    at, first = chunk.data_page_offset, chunk.dictionary_page_offset
    if first is not None and 0 < first < at:
        at = first
    end, largest, longest = at + chunk.total_compressed_size, 1, 0
    where = f"column {untrusted.brief(chunk.path_in_schema)}: a page"
    while at < end:
        fields, length = _header(file, at)
        unpacked, packed = fields.get(_UNPACKED, 0), fields.get(_PACKED, 0)
        values, encoding = _told(fields)
        if unpacked < 0 or packed < 0:
            raise PageError(f"{where} of {min(unpacked, packed):,} bytes")
        if unpacked > max(MOST_PAGE_BYTES, MOST_PAGE_EXPANSION * packed):
            raise PageError(f"{where} becomes {unpacked:,} bytes out of {packed:,}")
        if values > MOST_PAGE_VALUES:
            raise PageError(f"{where} of {values:,} values; at most {MOST_PAGE_VALUES:,} are read")
        if repeats and chunk.physical_type == "BYTE_ARRAY":
            if _DICTIONARY in fields:
                longest = _longest(file, at + length, packed, unpacked, chunk.compression)
            elif encoding in _OF_DICTIONARY and values * longest > MOST_BATCH_BYTES:
                raise PageError(f"{where} of {values:,} texts, of up to {longest:,} bytes each, in "
                                "lists; write smaller pages")  # fmt: skip
            elif encoding == _DELTA_BYTE_ARRAY:
                raise PageError(f"{where} of lists in DELTA_BYTE_ARRAY; write them without it")
        largest = max(largest, unpacked)
        at += length + packed
    return largest


def _told(fields: Mapping[int, Any]) -> tuple[int, int]:
    """How many values a page has, and in which encoding."""
    for kind, field in ((_DATA, _ENCODING), (_DATA_V2, _ENCODING_V2), (_DICTIONARY, _ENCODING)):
        if isinstance(fields.get(kind), dict):
            return fields[kind].get(_VALUES, 0), fields[kind].get(field, 0)
    return 0, 0


def _longest(file: Any, at: int, packed: int, unpacked: int, compression: str) -> int:
    """The bytes of the longest text of a dictionary; of all where that cannot be told."""
    import pyarrow as pa

    file.seek(at)
    data = file.read(packed)
    if compression != "UNCOMPRESSED":
        try:
            data = pa.Codec(compression.lower()).decompress(data, unpacked, asbytes=True)
        except (ValueError, OSError, pa.ArrowException):  # LZ4 as Hadoop had it, or damaged
            return unpacked
    longest = place = 0
    while place + 4 <= len(data):
        length = int.from_bytes(data[place : place + 4], "little")
        longest, place = max(longest, length), place + 4 + length
    return min(longest, unpacked)


def _header(file: Any, at: int) -> tuple[dict[int, Any], int]:
    """The fields of the page header at a place, and its bytes."""
    for most in _HEADS:
        file.seek(at)
        data = file.read(most)
        try:
            fields, end = _struct(data, 0, 0)
            return fields, end
        except IndexError:
            if len(data) < most:
                break
    raise PageError("the header of a page breaks off")


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """Integers and structs of a struct, by field; all else is passed over.

    Raises IndexError: it breaks off.
    """
    if depth > _MOST_STRUCTS:
        raise PageError("the header of a page is nested too deeply")
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
    if kind in (1, 2):  # true and false, which have no bytes
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:  # bytes
        length, at = _unsigned(data, at)
        return None, at + length
    if kind in (9, 10):  # a list or a set, of which page headers have none
        raise PageError("the header of a page is damaged")
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise PageError("the header of a page is damaged")


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
            raise PageError("the header of a page is damaged")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at  # zigzag


def cell_bytes(cell: Any) -> int:
    """About how many bytes a scalar of pyarrow takes as objects of Python."""
    import pyarrow as pa

    if not cell.is_valid:
        return 0
    if isinstance(cell, pa.StringScalar | pa.BinaryScalar):
        return cell.as_buffer().size
    if isinstance(cell, pa.StructScalar):
        return sum(cell_bytes(cell[number]) for number in range(len(cell.type)))
    values = getattr(cell, "values", None)
    return _array_bytes(values) if isinstance(values, pa.Array) else _OVERHEAD


def _array_bytes(values: Any) -> int:
    import pyarrow as pa

    total = _OVERHEAD * len(values) + values.nbytes
    if isinstance(values, pa.StructArray):
        total += sum(_array_bytes(values.field(n)) for n in range(values.type.num_fields))
    elif isinstance(values, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        total += _array_bytes(values.flatten())
    return total
