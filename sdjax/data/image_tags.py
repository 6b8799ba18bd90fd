"""Checks of the tags of TIFF and EXIF before Pillow reads them.

Pillow copies the bytes that every tag points to, and thousands of tags may point to the same ones.
A picture of one megabyte then takes gigabytes. In a sound file no two values overlap.
"""

from __future__ import annotations

import struct
from typing import Literal

# Bytes of a value by its type (TIFF 6.0, section 2; BigTIFF adds 13 and 16 to 18).
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
          16: 8, 17: 8, 18: 8}  # fmt: skip
_BIG = 43  # in the place of TIFF's 42
_WITHIN = (0x8769, 0x8825, 0xA005)  # tags that point to directories: EXIF, GPS, interoperability
_MOST_DIRECTORIES = 8  # directories of one file that are checked; Pillow reads four
_OVERLAP = 2  # the most bytes of all values together, in sizes of the file
_HARMLESS = 1 << 24  # bytes that may be copied without a check of every tag
_EXIF = b"Exif\0\0"
_ALONE = (0x01, *range(0xD0, 0xD9))  # JPEG markers without a length


def is_tiff(data: bytes) -> bool:
    """Whether the bytes begin as a TIFF does."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def check_exif(data: bytes) -> None:
    """Check EXIF, of which Pillow reads the first directory alone. Raises ValueError as `check`."""
    start = data[len(_EXIF) :] if data.startswith(_EXIF) else data
    if len(start) * _count(start) > _HARMLESS:
        check(start)


def _count(data: bytes) -> int:
    """The number of tags of the first directory; for BigTIFF an upper bound."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    at = int.from_bytes(data[4:8], order)
    return len(data) if 43 in data[2:4] else int.from_bytes(data[at : at + 2], order)


def check(data: bytes) -> None:
    """Check the first directory of a TIFF and those within it.

    A file that breaks off passes: Pillow stops there.

    Raises:
        ValueError: its values take more bytes than the file has, so they overlap.
    """
    order = "<" if data[:2] == b"II" else ">"
    total = 0
    try:
        big = struct.unpack(f"{order}H", data[2:4])[0] == _BIG
        pending = list(
            struct.unpack_from(f"{order}Q" if big else f"{order}L", data, 8 if big else 4)
        )
        for at in pending:
            size, below = _directory(data, at, order, big)
            total += size
            pending += below[: _MOST_DIRECTORIES - len(pending)]
    except struct.error:
        pass
    if total > _OVERLAP * len(data):
        raise ValueError(f"its tags announce {total:,} bytes; it has {len(data):,}")


def _directory(data: bytes, at: int, order: str, big: bool) -> tuple[int, list[int]]:
    """The bytes of a directory's values in the file, and the positions of directories in it."""
    head, entry = (f"{order}Q", f"{order}HHQQ") if big else (f"{order}H", f"{order}HHLL")
    if at > len(data):
        return 0, []
    (count,) = struct.unpack_from(head, data, at)
    first, step = at + struct.calcsize(head), struct.calcsize(entry)
    entries = data[first : first + min(count, len(data)) * step]
    total, below = 0, {}
    for tag, kind, number, value in struct.iter_unpack(
        entry, entries[: len(entries) // step * step]
    ):
        size = number * _SIZES.get(kind, 0)
        if size > (8 if big else 4):
            if value + size > len(data):
                break
            total += size
        if tag in _WITHIN:
            below[tag] = value
    return total, list(below.values())


def jpeg_head(data: bytes) -> tuple[bytes, bool]:
    """The EXIF of a JPEG, b"" for none, and whether one scan has all of the picture."""
    exif, sequential, at = b"", 0, 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xE1 and data[at + 4 : at + 10] == _EXIF:
            exif += data[at + 10 : at + 2 + (data[at + 2] << 8 | data[at + 3])]
        elif marker in (0xC0, 0xC1):
            sequential = data[at + 9]  # components of the frame
        elif marker == 0xDA:
            return exif, data[at + 4] == sequential
        elif marker == 0xFF or marker in _ALONE:  # padding, or no segment
            at += 1 if marker == 0xFF else 2
            continue
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return exif, False
