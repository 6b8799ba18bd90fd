"""Checks of a parquet file's pages before they are decoded, and of cells before they are copied.

The header of a page states its decompressed size, and pyarrow believes it. A file of 33 kB then
takes gigabytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sdjax.data.raw.limits import (
    MOST_BATCH_BYTES,
    MOST_PAGE_BYTES,
    MOST_PAGE_EXPANSION,
    MOST_PAGE_VALUES,
    ROWS_BEYOND_BYTES,
)
from sdjax.data.raw.parquet_footer import Chunk, PageError, RowGroup, parse
from sdjax.system import untrusted

_HEADS = (1 << 10, 1 << 20)  # bytes to read of a header; the first suffice for most
_UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8  # fields of PageHeader
_VALUES, _ENCODING, _ENCODING_V2 = 1, 2, 4  # fields of the headers within it
_OF_DICTIONARY = (2, 8)  # encodings: numbers of texts in the dictionary
_DELTA_BYTE_ARRAY = 7  # an encoding in which a value shares the beginning of the previous one
_OVERHEAD = 64  # bytes of a value as an object of Python


def check_rows(rows: int, size: int) -> None:
    """Raise a PageError if a file of `size` bytes announces more rows than it can have."""
    if not 0 <= rows <= size + ROWS_BEYOND_BYTES:
        raise PageError(f"it announces {rows:,} rows in {size:,} bytes")


def rows_at_once(groups: Iterable[RowGroup], file: Any, columns: Collection[str], most: int) -> int:
    """The number of rows to decode at once, `most` or fewer, after a check of every page.

    Args:
        file: binary.
        columns: names at the top of the schema.

    Raises:
        PageError: a page would become too large.
    """
    largest = 1
    for group in groups:
        for chunk in group.chunks:
            if chunk.path[0] in columns:
                largest = max(largest, _largest_page(file, chunk))
    return max(1, min(most, MOST_BATCH_BYTES // largest))


def _largest_page(file: Any, chunk: Chunk) -> int:
    """The bytes of the largest page of a column in a row group, decompressed."""
    at, largest, longest = chunk.start, 1, 0
    where = f"column {untrusted.brief('.'.join(chunk.path))}: a page"
    while at < chunk.end:
        fields, length = _header(file, at)
        unpacked, packed = fields.get(_UNPACKED, 0), fields.get(_PACKED, 0)
        values, encoding = _values_and_encoding(fields)
        if unpacked < 0 or packed < 0:
            raise PageError(f"{where} of {min(unpacked, packed):,} bytes")
        if unpacked > max(MOST_PAGE_BYTES, MOST_PAGE_EXPANSION * packed):
            raise PageError(f"{where} becomes {unpacked:,} bytes out of {packed:,}")
        if values > MOST_PAGE_VALUES:
            raise PageError(f"{where} of {values:,} values; at most {MOST_PAGE_VALUES:,} are read")
        if chunk.repeats and chunk.type == "BYTE_ARRAY":
            if _DICTIONARY in fields:
                longest = _longest(file, at + length, packed, unpacked, chunk.codec)
            elif encoding in _OF_DICTIONARY and values * longest > MOST_BATCH_BYTES:
                raise PageError(f"{where} of {values:,} texts, of up to {longest:,} bytes each, in "
                                "lists; write smaller pages")  # fmt: skip
            elif encoding == _DELTA_BYTE_ARRAY:
                raise PageError(f"{where} of lists in DELTA_BYTE_ARRAY; write them without it")
        largest = max(largest, unpacked)
        at += length + packed
    return largest


def _values_and_encoding(fields: Mapping[int, Any]) -> tuple[int, int]:
    """The number of values of a page, and their encoding."""
    for kind, field in ((_DATA, _ENCODING), (_DATA_V2, _ENCODING_V2), (_DICTIONARY, _ENCODING)):
        if isinstance(fields.get(kind), dict):
            return fields[kind].get(_VALUES, 0), fields[kind].get(field, 0)
    return 0, 0


def _longest(file: Any, at: int, packed: int, unpacked: int, compression: str) -> int:
    """The bytes of the longest text of a dictionary; of all texts if that cannot be found."""
    import pyarrow as pa

    file.seek(at)
    data = file.read(packed)
    if compression != "UNCOMPRESSED":
        try:
            data = pa.Codec(compression.lower()).decompress(data, unpacked, asbytes=True)
        except (ValueError, OSError, pa.ArrowException):  # Hadoop's LZ4, or damaged
            return unpacked
    longest = place = 0
    while place + 4 <= len(data):
        length = int.from_bytes(data[place : place + 4], "little")
        longest, place = max(longest, length), place + 4 + length
    return min(longest, unpacked)


def _header(file: Any, at: int) -> tuple[dict[int, Any], int]:
    """The fields of the page header at a position, and its bytes."""
    for most in _HEADS:
        file.seek(at)
        data = file.read(most)
        try:
            return parse(data)
        except IndexError:
            if len(data) < most:
                break
    raise PageError("the header of a page breaks off")


def cell_bytes(cell: Any) -> int:
    """The approximate bytes of a scalar of pyarrow as objects of Python."""
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
