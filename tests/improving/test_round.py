"""Whole rounds of `sdjax.improve` on a tiny model: each stage once, stopped and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdjax import improve
from sdjax.config import resolve
from sdjax.improving import judging, rounds, training
from sdjax.train import loop
from tests.conftest import make_tiny_config

ROOT = Path(__file__).parents[2]
FEW = ("--prompts=4", "--least=1", "--target=0.9", "--most=3", "--batch_size=4", "--steps=2")


@pytest.fixture(scope="module")
def base(tiny_vae, shapes_dir, tmp_path_factory):
    config = make_tiny_config(tiny_vae, shapes_dir)
    config.train.update(steps=2, checkpoint_every=1)
    config.validation.update(examples=4, train_examples=0, every=1)
    workdir = tmp_path_factory.mktemp("improve") / "base"
    assert loop.run(resolve(config), str(workdir)) == loop.DONE
    return workdir


@pytest.fixture
def in_place_of_training(base, monkeypatch):
    """The next run is a copy of the base's, so that before and after are the same."""
    trained = []

    def train(folder, tell):
        trained.append(folder)
        shutil.copytree(base, folder / "run", dirs_exist_ok=True)

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr("sdjax.train.startup.enable_compilation_cache", lambda given: None)
    return trained


def test_a_round_goes_from_the_proposal_to_the_verdict(
    base, in_place_of_training, tmp_path, capsys, monkeypatch
):
    options = [f"--workdir={base}", f"--output={tmp_path / 'round'}", *FEW]
    assert improve.main([*options, "--propose_only"]) == 0
    out = capsys.readouterr().out
    assert "judged by fidelity, grouped by attributes" in out and "more. " in out
    folder = tmp_path / "round"
    lines = (folder / "collect.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["examples"] <= 3 for line in lines)
    assert not (folder / "recipe.py").exists() and not in_place_of_training
    drawn = {file: file.stat().st_mtime_ns for file in folder.rglob("*.png")}

    # Gone on with: what was drawn stays, the rest is done.
    assert improve.main(options) == 0
    assert all(file.stat().st_mtime_ns == drawn[file] for file in drawn)
    assert in_place_of_training == [folder]
    out = capsys.readouterr().out
    assert "No difference can be told: of what failed 0.00 before, 0.00 after" in out
    content = json.loads((folder / "improve.json").read_text())
    assert content["comparison"]["verdict"] == "undecided"
    assert content["step"] == training.best_step(str(base))
    page = (folder / "improve.html").read_text()
    assert "Before and after" in page and page.count("data:image/webp") >= 2
    assert "<script" not in page

    # Once more: every stage is there.
    monkeypatch.setattr(rounds, "load", None)
    assert improve.main(options) == 0
    assert improve.main([*options, "--seed=3"]) == 2
    assert "seed: 0 there, 3 here" in capsys.readouterr().err


def test_examples_are_judged_by_their_loss(
    base, in_place_of_training, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(judging, "WORST", 0.75)  # so that some of the few fail in each half
    options = [f"--workdir={base}", f"--output={tmp_path / 'round'}", *FEW, "--judge=loss",
               "--group_by=words", "--how=reweight"]  # fmt: skip
    assert improve.main(options) == 0
    assert "grouped by words" in capsys.readouterr().out
    folder = tmp_path / "round"
    assert (folder / "weights.jsonl").exists() and "c.data.importance" in (
        folder / "recipe.py"
    ).read_text()
    content = json.loads((folder / "improve.json").read_text())
    assert content["comparison"]["all"]["difference"]["value"] == 0
    assert "No difference" in (folder / "improve.html").read_text()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--prompts=1"], "--prompts=1; expected 4 or more"),
        (["--shows=hats"], "--shows=hats; expected one of colour, shape"),
        (["--target=2"], "--target=2.0; expected a share"),
        (["--rate=0"], "--rate=0.0; expected 1 or more, and a number above 0"),
        (["--split=train"], "of the split 'train', which the run trains on"),
        (["--judge=clip"], "--judge=clip needs the folder of a CLIP"),
        (["--how=more"], "--how=more takes the folder"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_drawn(
    options, words, base, tmp_path, capsys, in_place_of_training
):
    folder = tmp_path / "round"
    assert improve.main([f"--workdir={base}", f"--output={folder}", *options]) == 2
    assert words in capsys.readouterr().err
    assert not folder.exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert improve.main([f"--workdir={tmp_path}"]) == 2
    assert "expected the --workdir of a run of sdjax.main" in capsys.readouterr().err
    assert not (tmp_path / "improve").exists()


@pytest.mark.slow
def test_a_round_that_is_killed_goes_on_where_it_was(base, tmp_path):
    """By SIGTERM while it trains, and then by SIGKILL; the next run resumes to its end."""
    folder = tmp_path / "round"
    command = [sys.executable, "-m", "sdjax.improve", f"--workdir={base}", f"--output={folder}",
               *FEW[:-1], "--steps=400"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def until(step, number):
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        file, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 600
        while not (file.exists() and f'"step": {step}, "train/loss"' in file.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        return process.wait()

    assert until(5, signal.SIGTERM) == 75
    assert until(60, signal.SIGKILL) == -signal.SIGKILL
    assert subprocess.run(command, env=env, check=False).returncode == 0
    steps = [json.loads(x)["step"] for x in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 400
    assert json.loads((folder / "improve.json").read_text())["comparison"]["verdict"]
