"""Where metrics go: TensorBoard event files and `metrics.jsonl`, both through clu.

Importing this module imports TensorFlow (clu's TensorBoard writer is made of it), so it is imported
by `telemetry` only when a run starts. TensorFlow is kept off every accelerator.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from sdjax import paths

# Read once, when TensorFlow is imported. oneDNN announces itself on stderr whatever the log level.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf  # noqa: E402

try:
    from clu import asynclib, metric_writers  # noqa: E402
except ModuleNotFoundError as missing:
    if missing.name is None or not missing.name.startswith("tensorboard"):
        raise
    raise ModuleNotFoundError(
        "clu writes TensorBoard logs with the package tensorboard, which is not installed: "
        "pip install tensorboard",
        name=missing.name,
    ) from missing

for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)

METRICS_FILE = "metrics.jsonl"
COPY_SECONDS = 300.0  # how far metrics.jsonl in a bucket may lag behind between checkpoints

# What a writer may raise at any of its calls, for itself or for one before.
WRITE_ERRORS = (OSError, asynclib.AsyncError, tf.errors.OpError)


class JsonLinesWriter(metric_writers.MetricWriter):
    """Scalars as one JSON object a line: `{"step": 10, "train/loss": 0.5}`.

    One line a step: scalars that come later for the last step join its line. Written at once.
    NaN and infinities, which JSON does not have, are the strings "NaN", "Infinity" and
    "-Infinity", which `float()` of Python reads. Everything else (images, texts, ...) is left
    to TensorBoard.

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

    def _leave(self, *args: Any, **kwargs: Any) -> None:
        """Not written to this file."""

    write_summaries = write_images = write_videos = write_audios = _leave
    write_texts = write_histograms = write_hparams = _leave


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
        except (ValueError, KeyError, TypeError):
            keep = False
        if keep:
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        with paths.writing(path) as local, open(local, "wb") as file:
            file.writelines(kept)
    return dropped


def open_writer(workdir: paths.PathLike, *, start_step: int) -> metric_writers.AsyncMultiWriter:
    """Writer to `workdir/tensorboard` and `workdir/metrics.jsonl`, each in a thread of its own.

    `start_step` is the step a resumed run continues from (0 for a fresh one): later lines of
    `metrics.jsonl` are dropped; TensorBoard drops its own when it sees the steps come back.
    """
    workdir = paths.to_path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    trim_metrics(workdir / METRICS_FILE, start_step)
    return metric_writers.AsyncMultiWriter(
        [
            JsonLinesWriter(workdir / METRICS_FILE),
            metric_writers.SummaryWriter(str(workdir / "tensorboard")),
        ]
    )
