"""A few hostile inputs for every reader, and the fuzzing runner itself."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.fuzz import targets
from tests.fuzz.runner import WARM_UP, Tally, run
from tests.fuzz.trial import Bounds, attempt

SECONDS = 5.0  # for all targets together


@pytest.mark.parametrize("name", targets())
def test_target_with_hostile_inputs_finds_no_fault(name):
    target = targets()[name]
    attempt(target, 0, WARM_UP)  # which imports what it needs
    tally, end = Tally(), time.monotonic() + SECONDS / len(targets())
    seed = 0
    while seed < 2 or time.monotonic() < end:
        tally.add(attempt(target, seed, Bounds(seconds=60.0)))  # others use the cores meanwhile
        seed += 1
    assert not tally.faults, f"seed {tally.faults[0].seed}: {tally.faults[0].fault}"
    print(tally.line())


def test_same_seed_makes_the_same_input():
    drawn = []
    for seed in (3, 4, 3):
        attempt(lambda rng, _: drawn.append(rng.integers(1 << 60)), seed, Bounds())
    assert drawn[0] == drawn[2] != drawn[1]


def test_input_that_is_refused_is_no_fault():
    outcome = attempt(lambda rng, folder: "refused", 0, Bounds())
    assert outcome.word == "refused" and not outcome.fault


def raises(rng, folder):
    raise KeyError("a bug")


def hangs(rng, folder):
    time.sleep(60)


def fills_memory(rng, folder):
    return str(np.ones(2**24).sum())  # 128 MiB, freed when it returns


def asks_for_all_memory(rng, folder):
    return str(bytearray(2**40)[0])


def starts_a_process(rng, folder):
    subprocess.run([sys.executable, "--version"], check=True)


def starts_a_process_and_hides_it(rng, folder):
    try:
        os.system("true")
    except Exception:
        return "refused"


def sends_a_signal(rng, folder):
    os.kill(2**22, 15)


def writes_outside(rng, folder):
    (folder / ".." / "escaped").write_text("")


@pytest.mark.parametrize(
    "target, said",
    [
        (raises, "a bug"),
        (hangs, "ran longer than 2 s"),
        (fills_memory, "are allowed"),
        (asks_for_all_memory, "MemoryError"),
        (starts_a_process, "subprocess.Popen"),
        (starts_a_process_and_hides_it, "os.system"),
        (sends_a_signal, "os.kill"),
        (writes_outside, "escaped"),
    ],
)
def test_input_that_does_harm_is_a_fault(target, said):
    outcome = attempt(target, 0, Bounds(seconds=2.0, memory=64 * 1024**2))
    assert said in outcome.fault


def test_question_whether_a_process_lives_is_no_fault():
    assert not attempt(lambda rng, folder: os.kill(os.getpid(), 0), 0, Bounds()).fault


def test_nothing_is_refused_between_inputs(tmp_path):
    attempt(starts_a_process, 0, Bounds())
    assert subprocess.run([sys.executable, "--version"], capture_output=True).returncode == 0


def test_files_of_an_input_are_kept_where_wanted(tmp_path):
    attempt(lambda rng, folder: (folder / "file").write_text("x"), 0, Bounds(), tmp_path)
    assert (tmp_path / "input" / "file").read_text() == "x"


@pytest.mark.slow
def test_runner_counts_inputs_in_a_process_of_its_own():
    tally = run("json", seed=0, seconds=60.0, inputs=20, bounds=Bounds())
    assert tally.words.total() == 20 and not tally.faults
    assert tally.words["read"] + tally.words["refused"] == 20
