"""The contract of a tracker, such as W&B, and the thread that keeps a run free of its troubles."""

from __future__ import annotations

import dataclasses
import json
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sdjax.system import paths, text_files

QUEUE = 1000  # calls that may wait; what comes then is dropped
CLOSE_SECONDS = (
    120.0  # for what still waits at the end of a run; opening a tracker may take a minute
)


class Tracker(Protocol):
    """A run in a tracker. Its methods may raise anything, and take any time."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step; a step may come again, after a resume or a rollback."""

    def images(self, step: int, name: str, images: np.ndarray, captions: Sequence[str]) -> None:
        """Log images uint8 [N, H, W, 3] of a step."""

    def close(self) -> None:
        """Send what is left and end."""


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """A run as it is shown in a tracker.

    folder: the workdir.
    config: all fields, nested.
    tracker: the tracker's name; it names the file that keeps the run's id there.
    """

    tracker: str
    folder: paths.Path
    project: str
    name: str
    config: Mapping[str, Any]

    @property
    def _file(self) -> paths.Path:
        return self.folder / "trackers" / f"{self.tracker}.json"

    def id(self) -> str | None:
        """Return the id that the tracker knows the run by; None before there is one."""
        if not self._file.exists():
            return None
        found = text_files.read_object(self._file).get("id")
        # A workdir may be a stranger's; ids become parts of paths and of addresses.
        return found if isinstance(found, str) and re.fullmatch(r"[\w-]{1,64}", found) else None

    def remember(self, id: str) -> None:
        """Keep an id in the workdir, for when the run is resumed."""
        paths.make_folder(self._file.parent)
        paths.write_text(self._file, json.dumps({"id": id}) + "\n")


class OpenTracker(Protocol):
    """Opens a run in a tracker, the one it has been in before if `run.id()` says so."""

    def __call__(self, run: TrackedRun, say: Callable[[str], None], /) -> Tracker: ...


class TrackerThread:
    """Calls of a tracker one after the other in a thread, which opens it first.

    Nothing of it reaches the run: an error is one warning, and what does not fit into the queue, as
    that of a tracker that hangs, is dropped and counted.

    Args:
        say: prints a line; called by the thread that calls this object alone.
    """

    def __init__(
        self,
        run: TrackedRun,
        open_tracker: OpenTracker,
        say: Callable[[str], None],
        *,
        size: int = QUEUE,
    ):
        self._name, self._say = run.tracker, say
        self._size = size
        self._queue: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._calls = self._dropped = self._failed = 0
        self._dead = False
        self._thread = threading.Thread(
            target=self._work, args=(run, open_tracker), name=run.tracker, daemon=True
        )
        self._thread.start()

    def call(self, method: str, *args: Any) -> None:
        """Queue a call of a method of `Tracker`; returns at once."""
        self._tell()
        self._calls += 1
        if self._dead:
            self._dropped += 1
            return
        if self._queue.qsize() < self._size:
            self._queue.put((method, args))
            return
        if not self._dropped:
            self._say(
                f"warning: {self._name} does not keep up: {self._size} calls wait, what comes "
                "before there is room is dropped; the run goes on"
            )
        self._dropped += 1

    def end(self) -> None:
        """Let the thread end after what is queued."""
        self._queue.put(("close", ()))

    def wait(self, deadline: float) -> None:
        """Wait for its end, at most until then (time.monotonic()); say what the tracker lacks."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._tell()
        left = max(self._queue.qsize() - 1, 0) if self._thread.is_alive() else 0
        lost = self._dropped + self._failed + left
        if lost or self._thread.is_alive():
            self._say(
                f"{self._name} has not got {lost} of {self._calls} calls "
                f"({self._dropped} dropped, {self._failed} failed, {left} not sent in "
                f"time); metrics.jsonl has all numbers"
            )

    def _tell(self) -> None:
        while not self._news.empty():
            self._say(self._news.get())

    def _work(self, run: TrackedRun, open_tracker: OpenTracker) -> None:
        try:
            tracker = open_tracker(run, self._news.put)
        except (Exception, SystemExit) as error:
            self._dead = True
            self._news.put(
                f"warning: {self._name} cannot be opened: {_brief(error)}; the run goes on "
                "without it"
            )
            while self._queue.get()[0] != "close":
                self._failed += 1
            return
        method = ""
        while method != "close":
            method, args = self._queue.get()
            try:
                getattr(tracker, method)(*args)
            except (Exception, SystemExit) as error:
                if not self._failed:
                    self._news.put(
                        f"warning: {self._name} failed: {_brief(error)}; the run goes on, and goes "
                        "on trying"
                    )
                self._failed += method != "close"


def close_all(trackers: Sequence[TrackerThread], seconds: float | None = None) -> None:
    """Wait so long (`CLOSE_SECONDS`) for all together, until they have sent what is queued."""
    deadline = time.monotonic() + (CLOSE_SECONDS if seconds is None else seconds)
    for tracker in trackers:
        tracker.end()
    for tracker in trackers:
        tracker.wait(deadline)


def _brief(error: BaseException) -> str:
    """Return the first line of an error, as it is shown to a reader of logs."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else '(no message)'}"
