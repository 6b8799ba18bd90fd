"""Where metrics go: `metrics.jsonl`, and TensorBoard's event files.

Each is written by a thread of its own. That of TensorBoard begins with the first scalars: in a
bucket it imports TensorFlow, which takes seconds that no step waits for.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import importlib.util
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from sdjax.system import paths

METRICS_FILE = "metrics.jsonl"
COPY_SECONDS = 300.0  # how far metrics.jsonl in a bucket may lag behind between checkpoints
_EVENT_FILES = "sdjax.train.monitoring.event_files"  # imported by its thread


class MetricsLog:
    """Both files of a run. What a thread could not write is raised by one of the next calls.

    Args:
        workdir: gets `metrics.jsonl` and `tensorboard/`; made if it is not there.
        start_step: the step a resumed run continues from (0 for a fresh one): later lines of
            `metrics.jsonl` are dropped; TensorBoard drops its own when it sees the steps come back.

    All raise OSError for what cannot be written.
    """

    def __init__(self, workdir: paths.PathLike, *, start_step: int):
        if importlib.util.find_spec("tensorboard") is None:
            raise ModuleNotFoundError(
                "TensorBoard's logs are written with the package tensorboard, which is not "
                "installed: pip install tensorboard",
                name="tensorboard",
            )
        workdir = paths.to_path(workdir)
        paths.make_folder(workdir)
        trim_metrics(workdir / METRICS_FILE, start_step)
        lines = JsonLines(workdir / METRICS_FILE)
        self._lines = _Thread(lambda: lines)
        self._folder = str(workdir / "tensorboard")
        self._events: _Thread | None = None
        self._early: list[tuple[Any, ...]] = []  # calls before there was a thread for them

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write scalars of a step to both."""
        self._lines.call("write_scalars", step, values)
        self._begin().call("write_scalars", step, values)

    def event(self, method: str, *args: Any) -> None:
        """Call a method of `event_files.Writer`: what only TensorBoard can show."""
        if self._events is None:
            self._early.append((method, *args))
        else:
            self._events.call(method, *args)

    def flush(self) -> None:
        """Wait until everything is on disk."""
        self._both("flush")

    def close(self) -> None:
        """Flush, and end the threads."""
        self._both("close")

    def _both(self, method: str) -> None:
        try:
            getattr(self._lines, method)()
        finally:
            getattr(self._begin(), method)()

    def _begin(self) -> _Thread:
        """The thread of TensorBoard's files."""
        if self._events is None:
            self._events = _Thread(
                lambda: importlib.import_module(_EVENT_FILES).open_writer(self._folder)
            )
            for call in self._early:
                self._events.call(*call)
        return self._events


class _Thread:
    """Calls of a writer one after the other in a thread, which opens it first."""

    def __init__(self, open_writer: Callable[[], Any]):
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._writer = self._pool.submit(open_writer)
        self._calls = [self._writer]

    def call(self, method: str, *args: Any) -> None:
        """Queue a call; raises what an earlier one raised."""
        self._calls.append(self._pool.submit(lambda: getattr(self._writer.result(), method)(*args)))
        self._settle([call for call in self._calls if call.done()])

    def flush(self) -> None:
        """Wait for all calls."""
        self.call("flush")
        self._settle(self._calls)

    def close(self) -> None:
        """Wait for all calls, and end."""
        try:
            self.call("close")
            self._settle(self._calls)
        finally:
            self._pool.shutdown()

    def _settle(self, calls: list[concurrent.futures.Future]) -> None:
        """Wait for these calls; raises the first error of one, once."""
        self._calls = [call for call in self._calls if call not in calls]
        for call in calls:
            call.result()


class JsonLines:
    """Scalars as one JSON object a line: `{"step": 10, "train/loss": 0.5}`.

    One line a step: scalars that come later for the last step join its line. Written at once.
    NaN and infinities, which JSON does not have, are the strings "NaN", "Infinity" and
    "-Infinity", which `float()` of Python reads.

    In a bucket, where nothing can be appended to, the file is a copy of a local one, renewed by
    `flush` and at the latest after `COPY_SECONDS`.
    """

    def __init__(self, path: paths.PathLike):
        self._path = paths.to_path(path)
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        self._copied = time.monotonic()
        self._temporary: tempfile.TemporaryDirectory | None = None
        if paths.is_remote(self._path):
            self._temporary = tempfile.TemporaryDirectory()
            path = os.path.join(self._temporary.name, self._path.name)
            with open(path, "wb") as file:
                file.writelines(lines)
        self._row: dict[str, Any] = json.loads(lines[-1]) if lines else {"step": None}
        self._start = sum(len(line) for line in lines[:-1])  # of the last line, in bytes
        self._file = open(path, "ab")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        if self._row["step"] == int(step):
            self._file.truncate(self._start)
        else:
            self._row = {"step": int(step)}
            self._start = self._file.seek(0, os.SEEK_END)
        self._row.update({name: _json_number(value) for name, value in scalars.items()})
        self._file.write(json.dumps(self._row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._copied > COPY_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        if self._temporary is not None:
            epath.Path(self._file.name).copy(self._path, overwrite=True)
            self._copied = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._file.close()
        if self._temporary is not None:
            self._temporary.cleanup()


def _json_number(value: Any) -> float | int | str:
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool | int):
        return int(number)
    number = float(number)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def trim_metrics(path: paths.PathLike, last_step: int) -> int:
    """Drop the lines after `last_step`, and a torn last line, so that a resumed run continues.

    Returns:
      The number of lines dropped.
    """
    path = paths.to_path(path)
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            keep = line.endswith(b"\n") and json.loads(line)["step"] <= last_step
        except (ValueError, KeyError, TypeError, RecursionError):
            keep = False
        if keep:
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        with paths.writing(path) as local, open(local, "wb") as file:
            file.writelines(kept)
    return dropped
