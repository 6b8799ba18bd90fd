"""Whole runs of an autoencoder with its critic: phases, a kill, and meshes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdjax.checkpoints.checkpoint import restore_params

ROOT = Path(__file__).parents[2]
STEPS = range(1, 7)


def run(folder, name, *, kill=0, mesh="8,1"):
    script = str(Path(__file__).with_name("autoencoder_run.py"))
    return subprocess.run(
        [sys.executable, script, str(folder), name, str(kill), mesh],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def rows(folder, name):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if "train/loss" in row}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("autoencoder")
    done = run(place, "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    return place


def test_the_critic_begins_before_it_counts(folder):
    found = rows(folder, "whole")
    assert sorted(found) == list(STEPS)
    for step, row in found.items():  # step 1 is taken when no step is done
        critic = row["train/phases/critic/grad_norm"]
        assert critic > 0 if step > 1 else critic == "NaN"
        weight = row["train/phases/main/adaptive_weight"]
        assert weight > 0 if step > 2 else weight == 0
        assert row["train/phases/main/grad_norm"] > 0
    params = [restore_params(folder / "whole", "params", step) for step in (1, 2)]
    moved = {path for path in params[0] if not np.array_equal(params[0][path], params[1][path])}
    assert "critic.main.0.kernel" in moved and "loss.logvar" in moved
    assert params[0]["loss.logvar"] != 0


def test_resume_after_sigkill_is_bit_exact(folder):
    name = "killed"
    assert run(folder, name, kill=4).returncode == -signal.SIGKILL
    assert max(rows(folder, name)) < 4
    done = run(folder, name)
    assert done.returncode == 0, done.stderr[-3000:]
    for which in ("params", "ema:0.9"):
        want, have = (restore_params(folder / n, which, 6) for n in ("whole", name))
        assert want.keys() == have.keys()
        assert any(path.startswith("critic.") for path in want)
        for path, value in want.items():
            np.testing.assert_array_equal(value, have[path], err_msg=path)


def test_losses_do_not_depend_on_the_mesh(folder):
    """Batch norm and the adaptive weight are those of the global batch on each."""
    done = run(folder, "mesh", mesh="2,4")
    assert done.returncode == 0, done.stderr[-3000:]
    names = ("main/loss", "main/adaptive_weight", "main/grad_norm", "critic/loss",
             "critic/grad_norm", "critic/logits_made")  # fmt: skip
    for step, row in rows(folder, "whole").items():
        other = rows(folder, "mesh")[step]
        for name in names:
            want, have = row[f"train/phases/{name}"], other[f"train/phases/{name}"]
            if want != "NaN":
                np.testing.assert_allclose(have, want, rtol=2e-4, atol=1e-5, err_msg=name)
