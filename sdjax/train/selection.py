"""Which checkpoint is the best, and whether the run still gets better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sdjax.models.config import ConfigError
from sdjax.validation_config import ValidationConfig


class Selection:
    """Observers at one number of every validation.

    Its state is JSON-able and goes with the checkpoint, so that a resumed run stops where an
    unbroken one does.

    Args:
        metric: name of the number; by default `config.metric`.
    """

    def __init__(self, config: ValidationConfig, metric: str = ""):
        self.metric = metric or config.metric
        self._sign = 1.0 if config.mode == "min" else -1.0
        self._patience = config.patience
        self.value: float | None = None
        self.step: int | None = None
        self.since = 0  # validations after the best one

    def observe(self, step: int, scalars: Mapping[str, float]) -> bool:
        """Take note of a validation; True if it is the best so far. NaN is never the best.

        Raises:
            ConfigError: there is no such number, naming those there are.
        """
        if self.metric not in scalars:
            raise ConfigError(
                f"config.validation.metric is {self.metric!r}; a validation gives "
                f"{', '.join(sorted(scalars))}"
            )
        value = float(scalars[self.metric])
        better = self.value is None or self._sign * value < self._sign * self.value
        if math.isfinite(value) and better:
            self.value, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False

    @property
    def stops(self) -> bool:
        """Patience is at its end."""
        return bool(self._patience) and self.since >= self._patience

    def get_state(self) -> dict[str, Any]:
        """JSON-able; floats survive JSON bit for bit."""
        return {"value": self.value, "step": self.step, "since": self.since, "metric": self.metric}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`; from nothing if another metric was looked at then."""
        if state.get("metric") == self.metric:
            self.value, self.step, self.since = state["value"], state["step"], state["since"]
