"""Which worker of a sweep has which trial: one small file for each trial that somebody works on.

A file names host, process and the run it started, and counts a beat every few seconds. On the same
host a worker is dead when its process is gone. On another it is taken for dead when its beat has
stood still for `STALE` seconds by the watcher's own clock, so clocks need not agree.

The files may be a stranger's. So no process that they name gets a signal: a run whose worker has
died is told so by the kernel (`sweep_run.start`), and its trial is free when it has ended.

All changes happen under one lock file, which is made with O_EXCL: exclusive on local disks and on
NFS from version 3. A lock that its owner left behind by dying is broken after 30 s.

Limits: a worker on another host that is suspended, or cut off from the disk, for longer than
`STALE` counts as dead. When it comes back it sees that its trial is another's, kills its run and
leaves; until then two runs may write into one folder. Hosts must have different names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from optuna.storages.journal import JournalFileOpenLock

from sdjax.system import paths, text_files

BEAT, STALE = 10.0, 120.0  # seconds
_MOST = 10_000  # bytes of a file


class Lost(Exception):
    """Another worker has taken this one for dead."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """Who has a trial, as its file says: a worker, and the run that it started.

    started, child_started: see `_started`; None where that is not known, or there is no run.
    """

    token: str
    host: str
    pid: int
    started: str | None
    child: int | None
    child_started: str | None
    beat: int
    time: str


class Claims:
    """The claims of one worker.

    Args:
        folder: for the files, the same for all workers.
    """

    def __init__(self, folder: Path, *, beat: float = BEAT, stale: float = STALE):
        self._folder, self._beat, self._stale = folder, beat, stale
        folder.mkdir(parents=True, exist_ok=True)
        self._token = uuid.uuid4().hex
        self._count = 0
        self._last = 0.0  # when the beat was written
        self._seen: dict[int, tuple[str, float]] = {}  # first sight of another's unchanged claim
        self._alive: set[str] = set()  # tokens of workers that were seen to live

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among the workers; for moments only."""
        lock = JournalFileOpenLock(str(self._folder / "claims"))
        lock.acquire()
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # taken for left behind: we were too slow
                lock.release()

    def take(self, number: int) -> bool:
        """Whether the trial is this worker's now: nobody had it, or somebody dead."""
        with self.locked():
            text = self._read(number)
            if text and not self._is_dead(number, text):
                return False
            self._write(number, None)
            return True

    def undecided(self, number: int) -> bool:
        """Whether it may still turn out that whoever has the trial is dead."""
        text = self._read(number)
        held = _parse(text)
        return bool(text) and (held is None or held.token not in self._alive)

    def holder(self, number: int) -> str:
        """Who has the trial, in words; "" if nobody."""
        held = _parse(self._read(number))
        return f"process {held.pid} on {held.host}" if held else ""

    def beat(self, number: int, child: subprocess.Popen | None, *, now: bool = False) -> None:
        """Say that this worker lives, if it is time; raises Lost if another has the trial."""
        if not now and time.monotonic() - self._last < self._beat:
            return
        with self.locked():
            held = _parse(self._read(number))
            if held is None or held.token != self._token:
                raise Lost
            self._write(number, child)

    def release(self, number: int) -> None:
        """Give the trial up, if it is this worker's."""
        with self.locked():
            held = _parse(self._read(number))
            if held is not None and held.token == self._token:
                self._file(number).unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:04d}.json"

    def _read(self, number: int) -> str:
        """Return the text of a claim, "" if there is none; of one that is no text, what it is."""
        try:
            return text_files.read_text(self._file(number), most=_MOST)
        except text_files.TextError as error:
            return str(error) if self._file(number).exists() else ""

    def _write(self, number: int, child: subprocess.Popen | None) -> None:
        self._count += 1
        self._last = time.monotonic()
        claim = Claim(
            token=self._token,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            child=child.pid if child is not None else None,
            child_started=_started(child.pid) if child is not None else None,
            beat=self._count,
            time=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
        content = json.dumps(dataclasses.asdict(claim), indent=2)
        paths.write_text(self._file(number), content + "\n")

    def _is_dead(self, number: int, text: str) -> bool:
        held = _parse(text)
        token = held.token if held else ""
        if held and held.host == socket.gethostname():
            if _is_running(held.pid, held.started):
                self._alive.add(token)
                return False
            self._alive.discard(token)
            # Its run may outlive it, for as long as it takes to save.
            return held.child is None or not _is_running(held.child, held.child_started)
        seen, since = self._seen.get(number, ("", 0.0))
        if seen != text:
            before = _parse(seen)
            if held and before and before.token == token:
                self._alive.add(token)
            self._seen[number] = (text, time.monotonic())
            return False
        if time.monotonic() - since > self._stale:
            self._alive.discard(token)
            return True
        return False


def _parse(text: str) -> Claim | None:
    """Return a claim's content; None if there is none, or it is not what a worker writes."""
    try:
        claim = Claim(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    numbers, words = [claim.pid, claim.child], [claim.started, claim.child_started]
    good = all(type(n) is int and 0 < n < 2**31 for n in numbers if n is not None)
    good = good and claim.pid is not None and all(type(w) is str for w in words if w is not None)
    named = isinstance(claim.token, str) and isinstance(claim.host, str)
    return claim if good and named and len(claim.host) < 300 and claim.host.isprintable() else None


def _started(pid: int) -> str | None:
    """When a process started, in ticks, so that a number that is used again is told apart."""
    try:
        # proc(5): field 22, counted after the name, which is in parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None  # no Linux, or gone


def _is_running(pid: int, started: str | None) -> bool:
    """Whether the process is there, and the one that had the number then; a zombie is not."""
    try:
        os.kill(pid, 0)  # no signal, a question
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    if started is None:
        return _started(os.getpid()) is None  # where that can be told, every worker tells it
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return _started(pid) == started and state != "Z"
