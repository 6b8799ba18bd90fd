"""Cross-validation: each setting of a sweep is trained once for each fold of its training split.

Trial n is fold n % K of setting n // K. It trains on the other folds and validates on its own; the
folds are those of `data.fold`, by a hash of each example's key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.markup import escape
from rich.table import Table
from scipy import stats

from sdjax.config import Config
from sdjax.data.config import parts
from sdjax.data.splits import TRAIN, VALIDATION
from sdjax.models.config import ConfigError
from sdjax.sweeps.study import Sweep

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of the fields, and what its folds gave.

    Attributes:
      number: trials number * folds to (number + 1) * folds - 1 are its own.
      fields: its values, without those that make a fold.
      values: {fold, from 1: the value of its trial} of complete trials.
      folds: how many there are to be.
    """

    number: int
    fields: Mapping[str, Any]
    values: Mapping[int, float]
    folds: int

    @property
    def is_complete(self) -> bool:
        """Whether every fold has a value."""
        return len(self.values) == self.folds

    @property
    def mean(self) -> float | None:
        """The mean over the folds so far; None without any."""
        return float(np.mean(list(self.values.values()))) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over the folds; None for fewer than two."""
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of Student's 95 % interval of the mean; None for fewer than two folds."""
        if self.mean is None or self.deviation is None:
            return None
        count = len(self.values)
        tail = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
        half = float(tail) * self.deviation / math.sqrt(count)
        return self.mean - half, self.mean + half

    def to_dict(self) -> dict[str, Any]:
        """Return what sweep.json has of it."""
        low, high = self.interval or (None, None)
        return {
            "number": self.number,
            "fields": dict(self.fields),
            "values": {str(fold): value for fold, value in self.values.items()},
            "mean": self.mean,
            "deviation": self.deviation,
            "low": low,
            "high": high,
            "complete": self.is_complete,
        }


def check_base(base: Config, folds: int, pruner: str) -> None:
    """Raise a ConfigError unless the folds of a configuration's training split can be made."""
    if folds < 2:
        raise ConfigError(f"--folds={folds}: expected 2 or more, or none")
    data = base.data
    remedy = "leave it out, since --folds sets it for each trial"
    if data.fold:
        raise ConfigError(f"config.data.fold is {data.fold!r}: {remedy}")
    if data.validation_share:
        raise ConfigError(
            f"config.data.validation_share is {data.validation_share}: each fold is validated on "
            "itself; set it to 0"
        )
    for part in parts(data):
        if part.split != TRAIN:
            raise ConfigError(
                f"data.split is {part.split!r}: --folds={folds} parts the split {TRAIN!r}"
            )
    for one in data.mixture:
        if one.eval_split not in ("", VALIDATION):
            raise ConfigError(
                f"data.mixture has eval_split = {one.eval_split!r}: with --folds={folds} it is "
                f"{VALIDATION!r}; leave it out"
            )
    if pruner != "none":
        raise ConfigError(
            f"the pruner {pruner} would end folds early, and their mean takes all of them; write "
            "`pruner: none` into the space file"
        )


def settings(sweep: Sweep, study: optuna.Study) -> list[Setting]:
    """Return the settings that were begun: complete ones by their mean first, the best ahead."""
    begun: dict[int, list[FrozenTrial]] = {}
    for trial in study.get_trials(deepcopy=False):
        begun.setdefault(trial.number // sweep.folds, []).append(trial)
    found = [
        Setting(
            number,
            sweep.space.values(trials[0].params),
            {
                1 + trial.number % sweep.folds: float(trial.value)
                for trial in trials
                if trial.state == TrialState.COMPLETE and trial.value is not None
            },
            sweep.folds,
        )
        for number, trials in begun.items()
    ]
    sign = 1 if sweep.mode == "min" else -1

    def key(one: Setting) -> tuple:
        return not one.is_complete, -len(one.values), sign * (one.mean or 0.0), one.number

    return sorted(found, key=key)


def table(sweep: Sweep, study: optuna.Study) -> Table:
    """Return the settings as a table, the best first."""
    title = f"{sweep.folder}: {sweep.metric} over {sweep.folds} folds, {sweep.mode}imum first"
    shown = Table(title=escape(title))
    columns = ("setting", "folds", "mean", "deviation", "95 % interval", "values")
    for name in (*columns, *sweep.space.fields):
        shown.add_column(name, justify="right", overflow="fold")
    for one in settings(sweep, study):
        shown.add_row(
            str(one.number),
            f"{len(one.values)} of {one.folds}",
            _text(one.mean),
            _text(one.deviation),
            " to ".join(map(_text, one.interval)) if one.interval else "",
            " ".join(_text(value) for _, value in sorted(one.values.items())),
            *(_text(one.fields[name]) for name in sweep.space.fields),
        )
    return shown


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
