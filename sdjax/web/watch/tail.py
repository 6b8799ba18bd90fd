"""Lines added to metrics.jsonl since the last look, and whether the file was written anew.

A run appends lines, and writes its last line again when more numbers of that step come. A run that
resumes, or goes back to a checkpoint, drops lines and writes others in their place.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zlib
from typing import Any

from etils import epath

from sdjax.system import paths
from sdjax.web.report.metrics import METRICS_FILE

MOST_BYTES = 1 << 20  # read at a time; more is a reason to send the curves anew
_LONGEST = 1 << 18  # bytes of a line
_MARK = re.compile(r"(\d{1,15})(?:-([0-9a-f]{8}))?")
_NOT_FINITE = {"NaN", "Infinity", "-Infinity"}  # as `metrics_log` writes them


@dataclasses.dataclass(frozen=True)
class Seen:
    """A place in the file: the byte after the last whole line, and that line.

    file: the number of the file, which differs from that of the file in its place later; 0 where
    the storage has none.
    """

    offset: int = 0
    line: bytes = b""
    file: int = 0

    @property
    def mark(self) -> str:
        """The place as a text: the byte offset, and a checksum of the line before it."""
        return f"{self.offset}-{zlib.crc32(self.line):08x}"


@dataclasses.dataclass(frozen=True)
class Added:
    """The rows since a place, oldest first; the first may be a known row with more numbers.

    seen: the place behind them. anew: the file is another than it was, and so are all rows.
    """

    rows: list[dict[str, Any]]
    seen: Seen
    anew: bool = False


def find(workdir: paths.Path, mark: str) -> Seen | None:
    """Return the place that a mark names; None if the file has no such place any more.

    A bare offset is believed if a line ends there.
    """
    match = _MARK.fullmatch(mark)
    if match is None:
        return None
    offset, file = int(match[1]), workdir / METRICS_FILE
    if offset == 0:
        return Seen(file=_number(file))
    try:
        if not file.exists() or epath.Path(file).stat().length < offset:
            return None
        begin = max(0, offset - _LONGEST)
        data = _read(file, begin, offset - begin)
    except paths.storage_errors():
        return None
    if not data.endswith(b"\n"):
        return None
    line = data[data.rfind(b"\n", 0, -1) + 1 :]
    if match[2] and match[2] != f"{zlib.crc32(line):08x}":
        return None
    return Seen(offset, line, _number(file))


def read(workdir: paths.Path, seen: Seen) -> Added:
    """Return what came after a place; nothing while the run is writing its last line again.

    Raises:
        OSError: the file is there and cannot be read.
    """
    file = workdir / METRICS_FILE
    if not file.exists():
        return Added([], Seen(), anew=seen.offset > 0)
    number, begin = _number(file), seen.offset - len(seen.line)
    length = epath.Path(file).stat().length
    if length < begin or (seen.file and number != seen.file):
        return Added([], Seen(file=number), anew=True)
    if length - begin > MOST_BYTES:
        return Added([], Seen(file=number), anew=True)
    data = _read(file, begin, MOST_BYTES)
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    if not lines:
        return Added([], dataclasses.replace(seen, file=number))
    if seen.line and lines[0] == seen.line:
        lines = lines[1:]
    elif seen.line and _step(lines[0]) != _step(seen.line):
        return Added([], Seen(file=number), anew=True)
    rows = [row for row in map(_row, lines) if row is not None]
    if not lines:
        return Added([], dataclasses.replace(seen, file=number))
    end = begin + data.rfind(b"\n") + 1
    return Added(rows, Seen(end, lines[-1], number))


def end_of(workdir: paths.Path) -> Seen:
    """Return the place behind the last whole line."""
    file = workdir / METRICS_FILE
    if not file.exists():
        return Seen()
    number, length = _number(file), epath.Path(file).stat().length
    begin = max(0, length - _LONGEST)
    data = _read(file, begin, length - begin)
    data = data[: data.rfind(b"\n") + 1]
    return Seen(begin + len(data), data[data.rfind(b"\n", 0, -1) + 1 :], number)


def _read(file: paths.Path, begin: int, count: int) -> bytes:
    with epath.Path(file).open("rb") as opened:
        opened.seek(begin)
        return opened.read(count)


def _number(file: paths.Path) -> int:
    if paths.is_remote(file):
        return 0
    try:
        return os.stat(file).st_ino
    except OSError:
        return 0


def _step(line: bytes) -> Any:
    row = _row(line)
    return None if row is None else row["step"]


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the numbers of a line, None for what is not finite; None if it has no step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, str) and value in _NOT_FINITE:
            found[name] = None
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value if abs(value) < 1e300 else None
    return found
