"""One trial's run: `sdjax.main` as a process of its own, and the metrics that it writes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LOG = "sweep.log"  # what the run printed, in its workdir
GRACE = 300.0  # seconds that a run has to save after SIGTERM
# Ask for SIGTERM when the parent dies (prctl(2), PR_SET_PDEATHSIG), and become the command. In a
# process of its own, since code between fork and exec may hang where JAX has threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def start(command: Sequence[str], folder: Path) -> subprocess.Popen:
    """Start a run that prints into `folder`/sweep.log.

    It has a session of its own, so that Ctrl-C reaches the sweep alone, which passes it on. On
    Linux it is told to stop when the sweep dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
    with open(folder / LOG, "ab") as log:
        return subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def stop(process: subprocess.Popen, alive: Callable[[], object], *, grace: float = GRACE) -> None:
    """SIGTERM, after which a run saves; SIGKILL to all it started if it has not after `grace` s.

    Args:
        alive: called while waiting.
    """
    process.terminate()
    waited = 0.0
    while waited < grace:
        try:
            process.wait(0.5)
            return
        except subprocess.TimeoutExpired:
            waited += 0.5
            alive()
    kill(process)


def kill(process: subprocess.Popen) -> None:
    """At once, with all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_values(file: Path, metric: str) -> dict[int, float]:
    """{step: value} of one number of metrics.jsonl so far, by step; {} if there is no such file."""
    if not file.exists():
        return {}
    values = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if metric not in line:
            continue
        try:
            row = json.loads(line)
            values[int(row["step"])] = float(row[metric])
        except (ValueError, KeyError, TypeError):
            continue  # a line that is being written, or of another metric
    return dict(sorted(values.items()))


def names(file: Path) -> list[str]:
    """The numbers that metrics.jsonl has."""
    found: set[str] = set()
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            found |= json.loads(line).keys() - {"step"}
        except (ValueError, AttributeError):
            continue
    return sorted(found)


def best(values: Mapping[int, float], mode: str) -> tuple[int, float] | None:
    """(step, value) of the first best; None if none is finite."""
    finite = {step: value for step, value in values.items() if math.isfinite(value)}
    if not finite:
        return None
    step = (min if mode == "min" else max)(sorted(finite), key=finite.__getitem__)
    return step, finite[step]


def last_words(folder: Path) -> str:
    """What a run said before it ended: from its last `error:` on, or its last lines."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    start = max((i for i, line in enumerate(lines) if line.startswith("error:")), default=-8)
    return "\n".join(lines[start:])[-2000:]
