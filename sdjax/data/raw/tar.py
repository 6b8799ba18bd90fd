"""A reader of tar archives from front to back, plain or gzipped: the wanted members alone.

The formats are those of `tarfile` of the standard library: v7, ustar, GNU with long names, and pax
(https://www.gnu.org/software/tar/manual/html_node/Standard.html). `tarfile` trusts headers: it
reads names of any length, fills the holes of sparse members, and recurses for every header that
follows another.
"""

from __future__ import annotations

import dataclasses
import gzip
import os
from collections.abc import Callable, Iterator
from typing import Any

from sdjax.data.raw.limits import (
    EXPANSION_SLACK,
    MOST_EXPANSION,
    MOST_HEADERS,
    MOST_NAME_BYTES,
)

BLOCK = 512
_CHUNK = 1 << 16
_END = bytes(BLOCK)
_FILES = (b"0", b"\0", b"7")  # types of members
_EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_LONG_NAME, _SPARSE, _PAX = b"L", b"S", (b"x", b"X")
_IGNORED = (b"K", b"g")  # the target of a link; settings of all members
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarError(Exception):
    """An archive that cannot be read any further; the message has the reason."""


@dataclasses.dataclass(frozen=True)
class TarMember:
    """A plain file of an archive.

    data: its content; None if it is not wanted, too large, or sparse.
    """

    name: str
    size: int
    data: bytes | None
    is_sparse: bool = False


def members(file: Any, wanted: Callable[[str], int]) -> Iterator[TarMember]:
    """The plain files of an archive, in order.

    Args:
        file: binary, at its beginning.
        wanted: the name of a member -> the most bytes to read of it, 0 to pass over it.

    Raises:
        TarError: it cannot be read any further.
        OSError, EOFError, zlib.error: the same, from gzip.
    """
    stream = _Stream(file)
    first = True
    while True:
        header = stream.read(BLOCK)
        if header == _END:
            return
        if len(header) < BLOCK:
            raise TarError("it is empty" if first and not header else "it breaks off in a header")
        first = False
        yield from _member(stream, _Header.parse(header), wanted)


def _member(stream: _Stream, header: _Header, wanted: Callable[[str], int]) -> Iterator[TarMember]:
    """The member that begins with a header, after more headers; nothing if it is no file."""
    name, size, is_sparse = "", -1, False
    for _ in range(MOST_HEADERS):
        if header.kind == _LONG_NAME:
            name = _text(stream.name(header.size).split(b"\0", 1)[0])
        elif header.kind in _PAX:
            told = _pax(stream.name(header.size))
            is_sparse |= any(key.startswith("GNU.sparse.") for key in told)
            name = told.get("GNU.sparse.name") or told.get("path") or name
            size = _decimal(told["size"]) if "size" in told else size
        elif header.kind in _IGNORED:
            stream.name(header.size)
        else:
            break
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise TarError("it breaks off in a header")
        header = _Header.parse(block)
    else:
        raise TarError(f"more than {MOST_HEADERS} headers in a row tell of one member")
    name, size = name or header.name, header.size if size < 0 else size
    if header.kind == _SPARSE:
        is_sparse = True
        more = header.block[482]
        while more:
            block = stream.read(BLOCK)
            more = block[504] if len(block) == BLOCK else 0
    if header.kind in _EMPTY or (header.kind == b"\0" and name.endswith("/")):
        return
    is_file = header.kind in _FILES or is_sparse
    most = wanted(name) if is_file and not is_sparse else 0
    data = stream.content(size) if most and size <= most else None
    if data is None:
        stream.skip(size)
    if is_file:
        yield TarMember(name, size, data, is_sparse)


@dataclasses.dataclass(frozen=True)
class _Header:
    """The header of a member. kind: its type, a single byte."""

    name: str
    size: int
    kind: bytes
    block: bytes

    @classmethod
    def parse(cls, block: bytes) -> _Header:
        """Parse the header in a block. Raises TarError: it is none."""
        told = _number(block[148:156])
        plain = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
        if plain != told:  # some old programs add up signed bytes
            high = sum(byte > 127 for byte in block[:148] + block[156:])
            if plain - 256 * high != told:
                raise TarError("a header is damaged: its sum is wrong")
        name = _text(block[:100].split(b"\0", 1)[0])
        kind = block[156:157]
        prefix = _text(block[345:500].split(b"\0", 1)[0])
        if block[257:263] == b"ustar\0" and prefix and kind not in (b"L", b"K", b"S"):
            name = f"{prefix}/{name}"
        return cls(name, _number(block[124:136]), kind, block)


def _number(field: bytes) -> int:
    """An octal number, or one of base 256 as GNU tar writes it; below 2^63."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        digits = field.split(b"\0", 1)[0].strip()
        try:
            value = int(digits or b"0", 8)
        except ValueError as error:
            raise TarError(f"a header is damaged: {field!r} is no number") from error
    if not 0 <= value < 1 << 63:
        raise TarError(f"a header is damaged: a number of {value.bit_length()} bits")
    return value


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise TarError(f"a header is damaged: a size of {text[:20]!r}")
    return int(text)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    r"""The records "LENGTH KEY=VALUE\n" of a pax header."""
    found, at = {}, 0
    while at < len(data) and data[at]:
        blank = data.find(b" ", at, at + 20)
        length = _decimal(_text(data[at:blank])) if blank > 0 else 0
        end = at + length
        key, equals, value = data[blank + 1 : end - 1].partition(b"=")
        if not equals or end > len(data) or data[end - 1 : end] != b"\n":
            raise TarError("a pax header is damaged")
        found[_text(key)] = _text(value)
        at = end
    return found


class _Stream:
    """An archive from front to back, unpacked if it is gzipped."""

    def __init__(self, file: Any):
        self._raw = file
        start = file.read(6)
        for mark, name in _OTHERS.items():
            if start.startswith(mark):
                raise TarError(f"it is compressed by {name}; unpack it, or compress it by gzip")
        file.seek(0)
        self._is_packed = start.startswith(b"\x1f\x8b")
        self._file = gzip.GzipFile(fileobj=file) if self._is_packed else file
        self._length = _length(file) if not self._is_packed else None
        self._at = 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end."""
        data = self._file.read(size)
        while len(data) < size:
            more = self._file.read(size - len(data))
            if not more:
                break
            data += more
        self._at += len(data)
        if self._is_packed and self._at > EXPANSION_SLACK + MOST_EXPANSION * self._raw.tell():
            raise TarError(f"it unpacks to more than {MOST_EXPANSION} times its size")
        return data

    def name(self, size: int) -> bytes:
        """The content of a header that holds names."""
        if size > MOST_NAME_BYTES:
            raise TarError(f"a header of {size:,} bytes; at most {MOST_NAME_BYTES:,} are read")
        return self.content(size)

    def content(self, size: int) -> bytes:
        """The content of a member, up to the next header."""
        if self._length is not None and self._at + size > self._length:
            raise TarError("a member breaks off")
        data = self.read(size)
        if len(data) < size:
            raise TarError("a member breaks off")
        self.read(-size % BLOCK)
        return data

    def skip(self, size: int) -> None:
        """Pass over the content of a member."""
        left = size + -size % BLOCK
        if self._length is not None and left > _CHUNK:
            if self._at + size > self._length:
                raise TarError("a member breaks off")
            self._file.seek(left, os.SEEK_CUR)
            self._at += left
            return
        while left:
            data = self.read(min(left, _CHUNK))
            if not data:
                raise TarError("a member breaks off")
            left -= len(data)


def _length(file: Any) -> int | None:
    """The bytes of a file on a disk; None for others, where seeking is slow."""
    try:
        return os.fstat(file.fileno()).st_size
    except (AttributeError, OSError):
        return None
