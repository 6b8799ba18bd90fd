"""metrics.jsonl for the report: read whatever state it is in, thinned and smoothed for drawing."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

from sdjax.system import paths, untrusted

METRICS_FILE = "metrics.jsonl"
BLOCK_BYTES = 8 << 20  # parsed at once; a line may be no longer
SMOOTH_FROM = 16  # points: fewer are drawn as they are
BINS = 1000  # means that a long curve is smoothed from

# What `metrics_log.JsonLines` writes for what JSON does not have, and a number in its place that
# every JSON reader takes.
_NONFINITE = re.compile(rb'"([^"\\]+)": ?"(?:NaN|-?Infinity)"')
_SENTINEL = -1.7976931348623157e308


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric: steps int64 [n], strictly rising, and values float64 [n], NaN where not finite"""

    steps: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> Curve:
        """The curve without what is NaN."""
        keep = np.isfinite(self.values)
        return Curve(self.steps[keep], self.values[keep])

    @property
    def last(self) -> float:
        """The newest finite value."""
        return float(self.finite.values[-1])


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The content of metrics.jsonl.

    curves: {name: Curve}, without those that never had a finite value.
    nonfinite: {name: lines on which it was NaN or infinite}.
    lines: read; broken: lines that are no JSON object with a step, a half-written last one aside.
    """

    curves: Mapping[str, Curve]
    nonfinite: Mapping[str, int]
    lines: int
    broken: int

    def get(self, name: str) -> Curve | None:
        """Return the curve of a name with its finite values alone, one at least, or None."""
        curve = self.curves.get(name)
        return None if curve is None else curve.finite

    @property
    def last_step(self) -> int:
        """The newest step; 0 where there is none."""
        return max((int(curve.steps[-1]) for curve in self.curves.values()), default=0)


EMPTY = Metrics({}, {}, 0, 0)
_MOST = 2**30  # bytes of metrics.jsonl


def read_metrics(workdir: paths.PathLike) -> Metrics:
    """Read WORKDIR/metrics.jsonl, which may be missing and may be being written to.

    Raises:
        OSError: the file is there and cannot be read.
    """
    path = paths.to_path(workdir) / METRICS_FILE
    return parse(untrusted.read_bytes(path, _MOST)) if path.exists() else EMPTY


def parse(data: bytes) -> Metrics:
    """Parse the bytes of metrics.jsonl; a last line that is half written is left out."""
    end = data.rfind(b"\n") + 1
    if end < len(data):
        whole = _as_row(data[end:]) is not None
        data = data + b"\n" if whole else data[:end]
    nonfinite: Counter[str] = Counter()
    if b'Infinity"' in data or b'"NaN"' in data:
        names = _NONFINITE.findall(data)
        nonfinite.update(name.decode("utf-8", "replace") for name in names)
        data = _NONFINITE.sub(rb'"\1": ' + repr(_SENTINEL).encode(), data)
    columns = _fast(data)
    if columns is None:
        columns, broken = _careful(data)
    else:
        broken = 0
    steps = columns.pop("step")
    lines = len(steps) + broken
    curves = {name: _curve(steps, values) for name, values in columns.items()}
    curves = {name: curve for name, curve in curves.items() if np.isfinite(curve.values).any()}
    return Metrics(curves, dict(nonfinite), lines, broken)


def _fast(data: bytes) -> dict[str, np.ndarray] | None:
    """Return {name: float64 [lines], NaN where a line lacks it}; None if a line is not right.

    Arrow takes half the time of Python's json, which counts with 100,000 lines of 50 numbers.
    """
    import pyarrow as pa
    from pyarrow import json as arrow_json

    if not data or data.isspace():
        return {"step": np.zeros(0)}
    try:
        table = arrow_json.read_json(
            pa.BufferReader(data), arrow_json.ReadOptions(block_size=BLOCK_BYTES)
        )
    except pa.ArrowException:
        return None
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            columns[name] = column.cast(pa.float64(), safe=False).to_numpy()
    if "step" not in columns or np.isnan(columns["step"]).any():
        return None
    return columns


def _careful(data: bytes) -> tuple[dict[str, np.ndarray], int]:
    """Parse line by line, leaving out those that are broken; also return how many."""
    read = [_as_row(line) for line in data.splitlines() if line.strip()]
    rows = [row for row in read if row is not None]
    names = dict.fromkeys(["step", *(name for row in rows for name in row)])
    columns = {
        name: np.array([row.get(name, np.nan) for row in rows], np.float64) for name in names
    }
    return columns, len(read) - len(rows)


def _as_row(line: bytes) -> dict[str, float] | None:
    """Return the numbers of a line, or None if it is no JSON object with a step."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
        return None
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


def _curve(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Return the curve of a metric. A step that comes twice (a run went back) counts as the last.

    values: NaN where a line does not have it, and the sentinel where it was not finite.
    """
    there = ~np.isnan(values)
    steps, values = steps[there].astype(np.int64), values[there]
    values = np.where(values == _SENTINEL, np.nan, values)
    if len(steps) and (np.diff(steps) <= 0).any():
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        newest = np.append(np.diff(steps) > 0, True)
        steps, values = steps[newest], values[newest]
    return Curve(steps, values)


def thin(curve: Curve, most: int) -> Curve:
    """Return at most `most` points of a curve (at least 4): its ends, and the least and the
    greatest of each stretch, so that no spike is lost."""
    count = len(curve.steps)
    if count <= most:
        return curve
    size = -(-count // max(1, (most - 2) // 2))  # of a stretch
    stretches = -(-count // size)
    padded = np.full(stretches * size, np.nan)
    padded[:count] = curve.values
    table = padded.reshape(stretches, size)
    low = np.where(np.isnan(table), np.inf, table).argmin(1)
    high = np.where(np.isnan(table), -np.inf, table).argmax(1)
    starts = np.arange(stretches) * size
    chosen = np.unique(np.concatenate([starts + low, starts + high, [0, count - 1]]))
    return Curve(curve.steps[chosen], curve.values[chosen])


def smooth(curve: Curve) -> tuple[Curve, float] | None:
    """Return a Gaussian mean of the finite values and its deviation in steps; None if too short.

    The deviation is a hundredth of the curve and at least one point. It looks both ways, so the
    smooth curve does not lag behind, unlike a running mean.
    """
    from scipy.ndimage import gaussian_filter1d

    curve = curve.finite
    count = len(curve.steps)
    if count < SMOOTH_FROM:
        return None
    if count > BINS:
        edges = np.linspace(0, count, BINS + 1).astype(int)[:-1]
        sizes = np.diff(np.append(edges, count))
        curve = Curve(
            (np.add.reduceat(curve.steps, edges) / sizes).astype(np.int64),
            np.add.reduceat(curve.values, edges) / sizes,
        )
    width = max(1.0, len(curve.steps) / 100)
    values = gaussian_filter1d(curve.values, width, mode="nearest")
    per_point = float(curve.steps[-1] - curve.steps[0]) / (len(curve.steps) - 1)
    return Curve(curve.steps, values), width * per_point
