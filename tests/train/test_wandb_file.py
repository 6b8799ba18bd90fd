"""What W&B itself writes of a run, offline; skipped where it is not installed."""

import json
import struct

import numpy as np
import pytest

from sdjax.system import paths
from sdjax.train.trackers.tracker import TrackedRun

wandb = pytest.importorskip("wandb", reason="wandb is not installed")

_BLOCK = 32768  # of LevelDB's log format, which a .wandb file has after seven bytes


def records(file):
    """The records of a .wandb file, by W&B's own messages.

    Each chunk has a checksum of 4 bytes, a length of 2 and a type: 1 whole, 2 first, 3 middle, 4
    last. (W&B's own reader is in Go, without a binding.)
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if (left := _BLOCK - place % _BLOCK) < 7:  # the rest of a block is too short for a chunk
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(b"".join(parts))
            parts = []


def rows_of(found):
    """[{name: value}] of the history of a run."""
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json)
         for item in record.history.item}
        for record in found if record.WhichOneof("record_type") == "history"
    ]  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files of a run that stops after step 5 and is resumed from step 3."""
    from sdjax.train.trackers import wandb_runs

    for name, value in {"MODE": "offline", "SILENT": "true", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    said = []
    for steps in (range(1, 6), range(4, 9)):
        tracked = TrackedRun("wandb", paths.to_path(tmp_path), "shapes", "base", {"seed": steps[0]})
        run = wandb_runs.open_tracker(tracked, said.append)
        for step in steps:
            run.scalars(step, {"train/loss": 1 / step})
        run.images(steps[-1], "samples", np.zeros((2, 4, 4, 3), np.uint8), ["a red circle"])
        run.close()
    wandb.teardown()
    return sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_resumed_run_has_all_points_by_step_and_one_id(files):
    read = [list(records(file)) for file in files]
    assert len(read) == 2
    ids = {r.run.run_id for found in read for r in found if r.WhichOneof("record_type") == "run"}
    assert len(ids) == 1
    rows = [row for found in read for row in rows_of(found)]
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(step, 1 / step) for step in (1, 2, 3, 4, 5, 4, 5, 6, 7, 8)]
    pictures = [row for row in rows if any(name.startswith("samples") for name in row)]
    assert [row["step"] for row in pictures] == [5, 8]
    for found in read:
        axes = {(r.metric.glob_name or r.metric.name): r.metric.step_metric for r in found
                if r.WhichOneof("record_type") == "metric"}  # fmt: skip
        assert axes["*"] == "step" and "step" in axes
