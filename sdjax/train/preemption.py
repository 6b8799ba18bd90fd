"""SIGTERM, as schedulers send it before they take a machine away: finish the step, save, exit."""

from __future__ import annotations

from sdjax.parallel import hosts
from sdjax.system import interrupts


class StopSignal(interrupts.StopSignal):
    """Context in which SIGTERM (and the first Ctrl-C) only asks to stop after the current step.

    On several hosts one signal to one of them stops all, after the same step, a few steps later.
    A second Ctrl-C interrupts at once.
    """

    _told = False

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; all hosts get the same answer for the same step."""
        if hosts.alone():
            return self.asked
        if self.asked and not self._told:
            hosts.stop_after(step)
            self._told = True
        agreed = hosts.stop_step()
        return agreed is not None and step >= agreed
