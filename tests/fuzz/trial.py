"""One input of a target, watched: its time, its memory, and what it does outside its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from tests.fuzz import Target

# Beyond the bound on resident memory, so that what is asked for and never touched does not count.
_HEADROOM = 8 * 1024**3  # bytes of address space


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The time and the memory that one input may take."""

    seconds: float = 20.0
    memory: int = 512 * 1024**2  # bytes of resident memory above those before the input


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    seed: int
    word: str  # of the target: "read", "refused", ...
    seconds: float
    memory: int  # bytes, at its peak
    fault: str = ""  # in words, "" for none


class TooSlow(BaseException):
    """The input has used its time up. No reader catches it by accident."""


def attempt(target: Target, seed: int, bounds: Bounds, folder: Path | None = None) -> Outcome:
    """Run the input that `seed` makes.

    Args:
        folder: empty, for the input, and kept afterwards; None takes a temporary one.
    """
    outer = Path(tempfile.mkdtemp(prefix="sdjax-fuzz-")) if folder is None else folder
    place, temporary = outer / "input", outer / "temporary"
    place.mkdir()
    temporary.mkdir()
    word, fault = "", ""
    gc.collect(0)
    before = _reset_peak()
    began = perf_counter()
    try:
        with _watched(place, temporary) as escapes, _space(bounds), _alarm(bounds.seconds):
            word = target(np.random.default_rng(seed), place) or "done"
    except TooSlow:
        fault = f"ran longer than {bounds.seconds:g} s"
    except (Exception, SystemExit):
        fault = traceback.format_exc()
    seconds, memory = perf_counter() - began, max(0, _peak() - before)
    if folder is None:
        shutil.rmtree(outer, ignore_errors=True)
    if escapes:
        fault = "\n".join(["did what a reader never does:", *escapes, fault])
    elif not fault and memory > bounds.memory:
        fault = f"took {memory / 2**20:.0f} MiB; at most {bounds.memory / 2**20:.0f} are allowed"
    return Outcome(seed, word, seconds, memory, fault)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the main thread after so long; elsewhere nobody is woken."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _space(bounds: Bounds) -> Iterator[None]:
    """Bound the address space, so that a bomb raises MemoryError before the machine suffers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = _status("VmSize")
    if not used:  # no Linux
        yield
        return
    wanted = used + bounds.memory + _HEADROOM
    resource.setrlimit(
        resource.RLIMIT_AS,
        (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard),
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS; 0 where there is none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _reset_peak() -> int:
    """Let the peak of resident memory begin anew, and return the bytes that are resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    """Bytes of resident memory at the highest since `_reset_peak`."""
    peak = _status("VmHWM")
    if peak:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Events of sys.audit that no reader of a file has a reason for.
_NEVER = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.forkpty", "pty.spawn", "socket.connect", "socket.bind", "os.kill", "os.killpg",
    "signal.pthread_kill", "ctypes.dlopen",
}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_MOVES = {"os.remove", "os.rename", "os.rmdir", "os.truncate", "os.chmod", "os.mkdir", "os.link",
          "os.symlink", "shutil.rmtree"}  # fmt: skip


class _Guard:
    """Refuses and notes what leaves an input's folder. An audit hook cannot be taken out again."""

    def __init__(self) -> None:
        self.folders: tuple[str, ...] = ()  # of the input that runs, () between them
        self.escapes: list[str] = []
        self.installed = False

    def __call__(self, event: str, args: tuple) -> None:
        if not self.folders:
            return
        if event in _NEVER:
            if event.startswith("os.kill") and args[1] == 0:
                return  # a question whether the process is there
            self._refuse(event, args)
        elif event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & _WRITES and self._is_outside(path):
                self._refuse(event, args)
        elif event in _MOVES:
            where = args[1:] if event == "os.symlink" else args  # a link may say what it likes
            if any(self._is_outside(path) for path in where if isinstance(path, str | bytes)):
                self._refuse(event, args)

    def _is_outside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes):
            return False  # a descriptor that is open already
        where = os.path.abspath(os.fsdecode(path))
        allowed = (*self.folders, "/dev/null", "/dev/shm", "/proc/self")
        if any(where == p or where.startswith(p + os.sep) for p in allowed):
            return False
        return not where.endswith(".pyc") and "__pycache__" not in where

    def _refuse(self, event: str, args: tuple) -> None:
        said = f"{event}{args!r}"[:500]
        self.escapes.append(said)
        raise PermissionError(f"a fuzzed input: {said}")


_guard = _Guard()


@contextlib.contextmanager
def _watched(place: Path, temporary: Path) -> Iterator[list[str]]:
    """Note processes, signals, connections and writes outside the folders, and refuse them."""
    if not _guard.installed:
        sys.addaudithook(_guard)
        _guard.installed = True
    _guard.escapes = []
    before, tempfile.tempdir = tempfile.tempdir, str(temporary)
    _guard.folders = (str(place), str(temporary))
    try:
        yield _guard.escapes
    finally:
        _guard.folders = ()
        tempfile.tempdir = before
