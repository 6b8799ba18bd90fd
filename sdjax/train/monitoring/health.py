"""Is the run well? Gradient-norm spikes, and steps that were skipped for not being finite.

Host side, on fetched metrics. The state of the detector is a small JSON-able dict, to be saved
with the checkpoint so that a resumed run judges as an unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""

    def __init__(self, step: int, in_a_row: int, total: int):
        self.step, self.in_a_row, self.total = step, in_a_row, total
        super().__init__(
            f"step {step}: loss or gradient is not finite for {in_a_row} steps in a row "
            f"({total} in all); none of them changed the parameters. Lower optim.learning_rate, "
            "set optim.clip_norm or look for bad data in the batch."
        )


class NonFiniteCounter:
    """Counts skipped steps and stops the run after `limit` in a row.

    Args:
      limit: skipped steps in a row at which `observe` raises `Diverged`.
      in_a_row, total: counts to continue from, those of the restored state.
    """

    def __init__(self, limit: int, *, in_a_row: int = 0, total: int = 0):
        if limit < 1:
            raise ValueError(f"limit={limit}: expected 1 or more")
        self.limit, self.in_a_row, self.total = limit, in_a_row, total

    def observe(self, step: int, skipped: bool) -> None:
        """Take note of one step; raises `Diverged`."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += bool(skipped)
        if self.in_a_row >= self.limit:
            raise Diverged(step, self.in_a_row, self.total)


class SpikeDetector:
    """Tells when a gradient norm stands out of its running mean and deviation.

    Mean and variance are plain averages at first and exponential ones of decay `decay` later. A
    spike enters them only up to the threshold, so one does not hide the next, yet a lasting new
    level is accepted in time. Values that are not finite are spikes and enter nothing.

    Args:
      factor: deviations above the mean that make a spike.
      decay: of the running moments.
      warmup: values to see before judging.
      floor: least deviation, as a fraction of the mean, so that a smooth run raises no alarm.
    """

    def __init__(
        self, factor: float = 6.0, *, decay: float = 0.99, warmup: int = 50, floor: float = 0.05
    ):
        if factor <= 0 or not 0 < decay < 1 or warmup < 1 or floor < 0:
            raise ValueError(
                f"factor={factor}, decay={decay}, warmup={warmup}, floor={floor}: expected "
                "factor > 0, decay in (0, 1), warmup >= 1, floor >= 0"
            )
        self.factor, self.decay, self.warmup, self.floor = factor, decay, warmup, floor
        self.mean, self.variance, self.count = 0.0, 0.0, 0

    @property
    def threshold(self) -> float:
        """The norm above which a step is a spike; infinite during the warm-up."""
        if self.count < self.warmup:
            return math.inf
        deviation = max(math.sqrt(self.variance), self.floor * abs(self.mean))
        return self.mean + self.factor * deviation

    def observe(self, norm: float) -> bool:
        """Take note of one gradient norm; True if it is a spike."""
        norm = float(norm)
        if not math.isfinite(norm):
            return True
        threshold = self.threshold
        value = min(norm, threshold)
        self.count += 1
        weight = max(1 / self.count, 1 - self.decay)
        difference = value - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)
        return norm > threshold

    def get_state(self) -> dict[str, float]:
        """JSON-able; floats survive JSON bit for bit."""
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def set_state(self, state: Mapping[str, float]) -> None:
        """Continue from `get_state`."""
        self.mean, self.variance = float(state["mean"]), float(state["variance"])
        self.count = int(state["count"])
