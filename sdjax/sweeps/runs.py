"""One trial's run: `sdjax.main` as a process of its own, and the metrics that it writes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.system import untrusted

LOG = "sweep.log"  # in the workdir: all that the run printed
GRACE = 300.0  # seconds that a run has to save after SIGTERM
_MOST = 2**30  # bytes of metrics.jsonl
# Ask for SIGTERM when the parent dies (prctl(2), PR_SET_PDEATHSIG), and become the command. In a
# process of its own, since code between fork and exec may hang where JAX has threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def start(command: Sequence[str], folder: Path, lock: int, *, log: str = LOG) -> subprocess.Popen:
    """Start a run that prints into the file `log` of a folder.

    It has a session of its own, so that Ctrl-C reaches the sweep alone, which passes it on. On
    Linux it is asked to stop when the sweep dies.

    Args:
        lock: an open file that it inherits, so that a lock on it lasts until both have ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
    with open(folder / log, "ab") as file:
        return subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=[lock],
        )  # fmt: skip


def stop(process: subprocess.Popen, *, grace: float = GRACE) -> None:
    """Send SIGTERM, after which a run saves, and SIGKILL to all it started after `grace` s."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    kill(process)


def kill(process: subprocess.Popen) -> None:
    """End a run at once, with all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _rows(file: Path, word: str = "") -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics.jsonl with a word in them; none if there is no such file."""
    text = untrusted.read_bytes(file, _MOST).decode(errors="replace") if file.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # a line that is being written
            if word in line and isinstance(row := json.loads(line), dict):
                yield row


def read_values(file: Path, metric: str) -> dict[int, float]:
    """Return {step: value} of one number of metrics.jsonl so far, by step."""
    values = {}
    for row in _rows(file, metric):
        with contextlib.suppress(ArithmeticError, LookupError, TypeError, ValueError):
            values[int(row["step"])] = float(row[metric])
    return dict(sorted(values.items()))


def names(file: Path) -> list[str]:
    """Return the names of the numbers that metrics.jsonl has."""
    return sorted({name for row in _rows(file) for name in row} - {"step"})


def best(values: Mapping[int, float], mode: str) -> tuple[int, float] | None:
    """Return (step, value) of the first best; None if none is finite."""
    finite = {step: value for step, value in sorted(values.items()) if math.isfinite(value)}
    if not finite:
        return None
    step = (min if mode == "min" else max)(finite, key=finite.__getitem__)
    return step, finite[step]


def last_words(folder: Path, *, log: str = LOG) -> str:
    """Return the end of a run's output: from its last `error:` on, or its last lines."""
    try:
        lines = (folder / log).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    start = max((i for i, line in enumerate(lines) if line.startswith("error:")), default=-8)
    return "\n".join(lines[start:])[-2000:]
