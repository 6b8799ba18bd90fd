"""SIGTERM, as schedulers send it before they take a machine away: finish the step, save, exit."""

from __future__ import annotations

from sdjax.parallel import hosts
from sdjax.system import interrupts


class StopSignal(interrupts.StopSignal):
    """Context in which SIGTERM (and the first Ctrl-C) only asks to stop after the current step.

    On several hosts one signal to one of them stops all, after the same step, a few steps later.
    A second Ctrl-C interrupts at once.
    """

    def requested(self, step: int) -> bool:
        """Return whether to stop after `step`: the same answer on all hosts, which all ask."""
        return hosts.stops_after(step, asked=self.asked)
