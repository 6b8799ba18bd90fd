"""The progress of a verb's work: a bar on a terminal, plain lines elsewhere.

    with progress.work("drawing", 64, unit="pictures") as work:
        for batch in batches:
            ...
            work.advance(len(batch))

Everything goes to standard error. Work that ends within `DELAY` seconds prints nothing. Nothing is
printed outside of `shown`, which the verbs enter and libraries do not.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from sdjax.system import paths

T = TypeVar("T")

DELAY = 3.0  # seconds of silence
LINES = (10.0, 300.0)  # least and most seconds between plain lines; a tenth of the time so far
_BAR, _POLL = 0.25, 1.0  # seconds between updates of a bar, and between calls of a `poll`

_enabled = threading.Event()
_busy = threading.Lock()  # one work at a time is shown: the outermost


@contextlib.contextmanager
def shown(here: bool = True) -> Iterator[None]:
    """A context in which the progress of works is shown.

    Args:
        here: whether this process shows it; one of the processes of a run does.
    """
    before = _enabled.is_set()
    (_enabled.set if here else _enabled.clear)()
    try:
        yield
    finally:
        (_enabled.set if before else _enabled.clear)()


def bytes_read() -> Callable[[], float]:
    """A `poll` that counts the bytes this process reads from now on; always 0 except on Linux."""
    return _moved("rchar")


def bytes_written() -> Callable[[], float]:
    """A `poll` that counts the bytes this process writes from now on; always 0 except on Linux."""
    return _moved("wchar")


def _moved(counter: str) -> Callable[[], float]:
    """A count of the bytes that a counter of /proc/self/io (man 5 proc) gains from now on.

    Libraries that read and write report no progress of their own.
    """

    def count() -> int:
        with open("/proc/self/io", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(counter))

    before = None
    with contextlib.suppress(OSError):
        before = count()
    return lambda: 0.0 if before is None else count() - before


@contextlib.contextmanager
def work(
    name: str,
    total: float | None = None,
    *,
    unit: str = "",
    poll: Callable[[], float] | None = None,
) -> Iterator[Work]:
    """A context that shows how much of the work inside is done, and how long the rest will take.

    Args:
        name: the work, such as "drawing".
        total: the amount of work; None if it is not known, and the time alone is shown.
        unit: the unit of `total`, such as "pictures"; without one, percents are shown.
        poll: returns the amount done, for work that cannot call `advance`; may fail as storage
            does.
    """
    made = Work(name, total, unit, poll)
    if not _enabled.is_set() or not _busy.acquire(blocking=False):
        yield made
        return
    thread = threading.Thread(target=made.show, name="progress", daemon=True)
    thread.start()
    try:
        yield made
        made.finished = True
    finally:
        made.ended.set()
        thread.join()
        _busy.release()


def track(items: Sequence[T], name: str, *, unit: str = "") -> Iterator[T]:
    """The items one by one, with the progress of the loop over them."""
    with work(name, len(items), unit=unit) as made:
        for item in items:
            yield item
            made.advance()


class Work:
    """A piece of work, and the amount of it that is done."""

    def __init__(self, name: str, total: float | None, unit: str, poll: Callable[[], float] | None):
        self.name, self.total, self._unit, self._poll = name, total, unit, poll
        self.done = 0.0
        self.ended, self.finished = threading.Event(), False
        self._began = time.monotonic()
        self._polled = -_POLL
        self._first: tuple[float, float] | None = None  # time and amount of the first progress

    def advance(self, count: float = 1.0) -> None:
        """Add `count` to the amount done."""
        self.done += count
        self._note()

    def _note(self) -> None:
        """Keep the time of the first progress."""
        if self._first is None and self.done:
            self._first = time.monotonic(), self.done

    def look(self) -> None:
        """Update `done` from the `poll`, which may cost a request to a bucket."""
        now = time.monotonic()
        if self._poll is not None and now >= self._polled + _POLL:
            self._polled = now
            with contextlib.suppress(*paths.storage_errors()):
                self.done = max(self.done, self._poll())
                self._note()

    def left(self) -> float | None:
        """The seconds that the rest takes at the speed so far; None if that cannot be estimated.

        The time of the first part includes compilation or the start of workers. It is left out as
        soon as there is a second part.
        """
        if not self.total or self._first is None or self.done >= self.total:
            return None
        now, (when, first) = time.monotonic(), self._first
        rest = self.total - self.done
        if self.done > first:
            return rest * (now - when) / (self.done - first)
        return rest * (when - self._began) / first

    def amount(self) -> str:
        """The amount done, as "3 of 64 pictures" or "5 %"; "" if the total is not known."""
        if not self.total:
            return ""
        if not self._unit:
            return f"{min(100, int(100 * self.done / self.total))} %"
        return f"{int(self.done):,} of {int(self.total):,} {self._unit}"

    def line(self) -> str:
        """A plain line, such as "drawing: 3 of 64 pictures, 0:40 left"."""
        left = self.left()
        passed = duration(time.monotonic() - self._began)
        parts = [self.amount(), f"{passed} so far" if left is None else f"{duration(left)} left"]
        return f"{self.name}: {', '.join(filter(None, parts))}"

    def last_line(self) -> str:
        """The line at the end, such as "drawing: 64 pictures in 1:20"."""
        what = f"{int(self.total):,} {self._unit} in " if self.total and self._unit else "took "
        return f"{self.name}: {what}{duration(time.monotonic() - self._began)}"

    def show(self) -> None:
        """Show the progress until the work has ended; runs in a thread of its own."""
        if self.ended.wait(DELAY):
            return
        with contextlib.suppress(OSError, ValueError):  # standard error is closed
            (self._bar if _on_terminal() else self._lines)()

    def _lines(self) -> None:
        while True:
            self.look()
            print(self.line(), file=sys.stderr, flush=True)
            passed = time.monotonic() - self._began
            if self.ended.wait(min(max(LINES[0], passed / 10), LINES[1])):
                break
        if self.finished:
            print(self.last_line(), file=sys.stderr, flush=True)

    def _bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True),
            redirect_stdout=False,  # other programs may read it
        )
        with bar:
            task = bar.add_task(self.name, total=self.total or None, amount="", left="")
            ended = False
            while not ended:
                ended = self.ended.wait(_BAR)
                self.look()
                if ended and self.finished and self.total:
                    self.done = self.total
                left = None if ended else self.left()
                shown = "" if left is None else f"{duration(left)} left"
                bar.update(task, completed=self.done, amount=self.amount(), left=shown)


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """A duration as `2d 03:04:05`, `3:04:05` or `4:05`."""
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{total % 60:02d}"
    if hours:
        return f"{hours}:{minutes:02d}:{total % 60:02d}"
    return f"{minutes}:{total % 60:02d}"
