"""Ctrl-C and SIGTERM: one line, an exit code that means something, and no child process left.

Python's own answer to Ctrl-C is a traceback. It comes when the main thread runs Python again, which
may be in a compiler for minutes. Libraries may swallow it. It also ends the interpreter around the
threads of XLA, which may crash it. Here a signal ends the process at once. If the main thread does
not hear it, another thread ends the process. Clean-up is registered with `at_end`.

This file imports nothing that is slow: verbs call `install` before everything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

INTERRUPTED, TERMINATED = 130, 143  # exit codes: 128 + the number of the signal, as in a shell

_PATIENCE = 1.0  # seconds that the main thread has to handle a signal

_hint = ""
_codes = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
_asking: dict[int, float] = {}  # signals of each number that only ask to stop, see `StopSignal`
_ending = threading.Lock()  # taken by the thread that ends the process

LastCall = Callable[[int, str], object]  # takes the exit code and the line
_calls: list[LastCall] = []


def install(hint: str, *, terminated: int = TERMINATED) -> None:
    """Let Ctrl-C and SIGTERM end this program with one line on standard error.

    Programs call this from the main thread. A signal that is ignored stays ignored, as Ctrl-C is in
    a program that a shell started in the background.

    Args:
        hint: what to do next, the end of the line.
        terminated: exit code after SIGTERM.
    """
    global _hint
    _hint = hint
    _codes[signal.SIGTERM] = terminated
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_listen, args=(read,), daemon=True).start()
    for number in _codes:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _codes)  # see allocator.use_large_pages


def _forget() -> None:
    """Give both signals their default handlers in a forked child."""
    signal.set_wakeup_fd(-1)
    for number in _codes:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def at_end(call: LastCall) -> Iterator[None]:
    """A context that calls `call` if a signal ends the process, where no `finally` is reached."""
    _calls.append(call)
    try:
        yield
    finally:
        _calls.remove(call)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle both signals in the main thread."""
    _end(signal.Signals(number))


def _listen(pipe: int) -> None:
    """End the process if the main thread has not done so within `_PATIENCE`."""
    while True:
        for number in os.read(pipe, 64):
            if number not in _codes:
                continue
            if _asking.get(number, 0) > 0:
                _asking[number] -= 1
                continue
            deadline = time.monotonic() + _PATIENCE
            while time.monotonic() < deadline and not _ending.locked():
                time.sleep(0.02)
            if number in _asking or signal.getsignal(number) is _interrupt:
                _end(signal.Signals(number))


def _end(number: signal.Signals) -> NoReturn:
    """Print the line, stop all child processes, clean up, and exit without Python's shutdown."""
    if threading.current_thread() is threading.main_thread():
        for other in _codes:
            signal.signal(other, signal.SIG_IGN)
    if not _ending.acquire(blocking=False):
        time.sleep(3600)  # another thread ends the process
    code = _codes[number]
    line = f"{'interrupted' if number == signal.SIGINT else 'stopped by SIGTERM'}; {_hint}"
    flush = threading.Thread(target=_flush, daemon=True)  # a full pipe would hold it for ever
    flush.start()
    flush.join(0.5)
    # A new line after the terminal's ^C; the code shows the cursor, which a progress bar may hide.
    text = f"\n\x1b[?25h{line}\n" if os.isatty(2) else f"{line}\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="replace"))
        # Other threads may report the end of their children.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    stop_children()
    for call in reversed(_calls):
        with contextlib.suppress(Exception):
            call(code, line)
    os._exit(code)


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()


def stop_children(grace: float = 2.0) -> None:
    """Send SIGTERM to all descendants of this process, and SIGKILL after `grace` seconds."""
    deadline = time.monotonic() + grace
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in (left := _descendants()):
            with contextlib.suppress(OSError):
                os.kill(process, number)
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            left = _descendants()
        if not left:
            return


def _descendants() -> list[int]:
    """The numbers of the running processes below this one; empty except on Linux."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            # proc(5): after the name, which is in parentheses, the state and the parent.
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[int(stat.parent.name)] = int(parent)
    found, below = [], [os.getpid()]
    while below:
        above = set(below)
        below = [process for process, parent in parents.items() if parent in above]
        found += below
    return found


@contextlib.contextmanager
def ignored_by_children() -> Iterator[None]:
    """A context in which started processes ignore Ctrl-C, which a terminal sends to them too.

    The caller stops them. This process handles Ctrl-C as before, in the thread of `install`.
    """
    from multiprocessing import resource_tracker

    # New threads and processes inherit a blocked signal. The tracker must start before the block.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(*_: object) -> None:
    """End this process, which multiprocessing started, within two seconds of its parent's end.

    Otherwise it would wait for ever after a SIGKILL of the parent. Arguments are ignored.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class StopSignal:
    """A context in which SIGTERM and the first Ctrl-C only set `asked`.

    A second Ctrl-C interrupts at once. In threads other than the main one this does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            _asking.update({signal.SIGTERM: float("inf"), signal.SIGINT: 1})
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _asking.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if self.asked and number == signal.SIGINT:
            if callable(before):
                before(number, frame)
            raise KeyboardInterrupt
        self.asked = True
