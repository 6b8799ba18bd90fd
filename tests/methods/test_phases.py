"""A new method is files of its own and one line of METHODS; one of two phases is a method too."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdjax.checkpoints.checkpoint import restore_params
from sdjax.methods.method import Method, Phase

ROOT = Path(__file__).parents[2]


def run(folder, name, *, kill=0, mesh="8,1", accumulation=1):
    script = str(Path(__file__).with_name("toy_gan_run.py"))
    arguments = [str(folder), name, "6", str(kill), mesh, str(accumulation)]
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def rows(folder, name):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if "train/loss" in row}


def state(folder, name):
    return {
        f"{which} {path}": value
        for which in ("params", "ema:0.9")
        for path, value in restore_params(folder / name, which, 6).items()
    }


def loss(trained, frozen, averages, batch, draw):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ((), "called \\[\\]"),
        ((Phase("a", loss, str.islower), Phase("a", loss, str.isupper)), "names that differ"),
        ((Phase("a", loss, str.islower, every=2),), "every 2, from step 0; expected 1 and 0"),
        ((Phase("a", loss, str.islower, first=3),), "every 1, from step 3; expected 1 and 0"),
        ((Phase("a", loss, str.islower), Phase("b", loss, str.isascii)), r"x is trained by .*'b'"),
    ],
)
def test_phases_that_contradict_one_another_are_refused(phases, words):
    nothing = lambda *args: None  # noqa: E731
    with pytest.raises(ValueError, match=words):
        Method({"x": None}, nothing, phases, {}, nothing, None, nothing, nothing)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("gan")
    done = run(place, "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    return place


def test_each_phase_moves_what_it_trains_at_its_steps(folder):
    found = rows(folder, "whole")
    assert sorted(found) == list(range(1, 7))
    for step, row in found.items():
        assert row["train/phases/critic/grad_norm"] > 0
        generator = row["train/phases/generator/grad_norm"]
        # Step 1 is the first multiple of two that the counter of steps done shows: 0.
        assert generator > 0 if step % 2 else generator == "NaN"
    moved = [restore_params(folder / "whole", "params", step) for step in (5, 6)]
    equal = {path: np.array_equal(moved[0][path], moved[1][path]) for path in moved[0]}
    assert equal == {
        "generator.kernel": True, "generator.bias": True, "critic.kernel": False,
        "critic.bias": False,
    }  # fmt: skip


@pytest.mark.parametrize("kill", [4, 5])
def test_resume_after_sigkill_in_either_phase_is_bit_exact(folder, kill):
    """Before a step of the critic alone, and before one of both."""
    name = f"killed {kill}"
    assert run(folder, name, kill=kill).returncode == -signal.SIGKILL
    assert max(rows(folder, name), default=0) < kill
    done = run(folder, name)
    assert done.returncode == 0, done.stderr[-3000:]
    want, have = state(folder, "whole"), state(folder, name)
    assert want.keys() == have.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(value, have[path], err_msg=path)


@pytest.mark.parametrize(("mesh", "accumulation"), [("2,4", 1), ("1,1", 1), ("2,1", 4)])
def test_losses_do_not_depend_on_the_mesh_or_on_accumulation(folder, mesh, accumulation):
    name = f"mesh {mesh} {accumulation}"
    done = run(folder, name, mesh=mesh, accumulation=accumulation)
    assert done.returncode == 0, done.stderr[-3000:]
    for step, row in rows(folder, "whole").items():
        other = rows(folder, name)[step]
        for key in ("train/loss", "train/phases/critic/grad_norm"):
            np.testing.assert_allclose(row[key], other[key], rtol=2e-5)
        if step % 2:
            key = "train/phases/generator/loss"
            np.testing.assert_allclose(row[key], other[key], rtol=2e-5)
