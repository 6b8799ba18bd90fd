"""SIGTERM, as schedulers send it before they take a machine away: finish the step, save, exit."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from sdjax.parallel import hosts


class StopSignal:
    """Context in which SIGTERM (and the first Ctrl-C) only asks to stop after the current step.

    On several hosts one signal to one of them stops all, after the same step, a few steps later.
    A second Ctrl-C interrupts at once, as usual.
    """

    def __enter__(self) -> StopSignal:
        self._asked = self._told = False
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; all hosts get the same answer for the same step."""
        if hosts.alone():
            return self._asked
        if self._asked and not self._told:
            hosts.stop_after(step)
            self._told = True
        agreed = hosts.stop_step()
        return agreed is not None and step >= agreed
