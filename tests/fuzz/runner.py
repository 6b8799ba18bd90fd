"""Targets run in processes of their own, which are replaced when an input kills them."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import os
import time
from multiprocessing.connection import Connection

from tests.fuzz import targets
from tests.fuzz.trial import Bounds, Outcome, attempt

# The first input imports libraries: it runs once without being judged.
WARM_UP = Bounds(seconds=300.0, memory=64 * 1024**3)
_GRACE = 10.0  # seconds beyond the bound after which the process is killed
_FAULTS = 5  # of a target, before it is left


@dataclasses.dataclass
class Tally:
    """What a target's inputs have come to."""

    words: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    spent: float = 0.0  # seconds, without the starts of processes
    slowest: Outcome | None = None
    largest: Outcome | None = None
    faults: list[Outcome] = dataclasses.field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        if outcome.fault:
            self.faults.append(outcome)
        self.words["fault" if outcome.fault else outcome.word] += 1
        if self.slowest is None or outcome.seconds > self.slowest.seconds:
            self.slowest = outcome
        if self.largest is None or outcome.memory > self.largest.memory:
            self.largest = outcome

    def line(self) -> str:
        words = ", ".join(f"{count} {word}" for word, count in self.words.most_common())
        if self.slowest is None or self.largest is None:
            return "no input"
        return (
            f"{self.words.total()} inputs: {words}; "
            f"at most {self.largest.memory / 2**20:.0f} MiB (seed {self.largest.seed}) "
            f"and {self.slowest.seconds:.2f} s (seed {self.slowest.seed})"
        )


def run(name: str, seed: int, seconds: float, inputs: int | None, bounds: Bounds) -> Tally:
    """Run one target for so many seconds, in processes that may die."""
    tally = Tally()
    while tally.spent < seconds and (inputs is None or tally.words.total() < inputs):
        left = None if inputs is None else inputs - tally.words.total()
        seed = _one_process(tally, name, seed, seconds, left, bounds)
        if len(tally.faults) >= _FAULTS:
            break
    return tally


def _one_process(
    tally: Tally, name: str, seed: int, seconds: float, inputs: int | None, bounds: Bounds
) -> int:
    """Run inputs until the time is over or the process has died; return the next seed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, name, seed, bounds), daemon=True)
    process.start()
    theirs.close()
    patience = WARM_UP.seconds
    first, asked = True, time.monotonic()
    try:
        while inputs is None or inputs > 0:
            if not ours.poll(patience + _GRACE):
                tally.add(Outcome(seed, "", patience, 0, f"no answer within {patience:g} s"))
                return seed + 1
            try:
                message = ours.recv()
            except EOFError:
                process.join()
                ended = f"the process ended with {process.exitcode}"
                tally.add(Outcome(seed, "", 0.0, 0, ended))
                return seed + 1
            if first:  # warmed up, from here on it counts
                first, patience = False, bounds.seconds
            else:
                tally.add(message)
                tally.spent += time.monotonic() - asked
                seed += 1
                inputs = None if inputs is None else inputs - 1
            if tally.spent > seconds or len(tally.faults) >= _FAULTS:
                break
            asked = time.monotonic()
            ours.send(seed)
    finally:
        process.kill()
        process.join()
    return seed


def _work(connection: Connection, name: str, seed: int, bounds: Bounds) -> None:
    """Run the inputs that the parent asks for, one after another."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # readers may print
    os.dup2(null, 2)
    # TFDS imports it in the middle of some inputs, where it takes as long as an input may take.
    import tensorflow  # noqa: F401

    target = targets()[name]
    attempt(target, seed, WARM_UP)
    connection.send(None)
    while True:
        connection.send(attempt(target, connection.recv(), bounds))
