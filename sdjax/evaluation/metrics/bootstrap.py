"""Intervals of metrics: percentiles over resampled pictures (Efron and Tibshirani 1993).

The generated pictures are resampled; the pictures they are compared with are held fixed. An
interval shows how much the number would vary if the same model drew as many other pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sdjax.system import progress

CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric of a set of pictures.

    Attributes:
      value: the metric.
      low, high: ends of the 95 % interval; None without one.
      higher_is_better: None where neither direction is better.
      count: the number of values (pictures, prompts) behind it.
      details: more to write beside it, JSON-able.
    """

    value: float
    low: float | None = None
    high: float | None = None
    higher_is_better: bool | None = True
    count: int = 0
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def percentiles(replicates: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The ends of the middle share `confidence` of replicates [R]."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return float(low), float(high)


def around(
    value: float, replicates: np.ndarray, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The percentile interval of replicates [R], moved so that their mean is `value`.

    It is for distances between distributions. A resample has fewer different pictures than the
    sample, and so lies farther from the reference. The sample itself lies farther by about as much,
    because it is finite. Without the move, the interval would not even hold the value. The distance
    is comparable at one number of pictures only, and the interval is for that number.
    """
    low, high = percentiles(replicates - replicates.mean(), confidence)
    return value + low, value + high


def replicate(
    statistic: Callable[[np.ndarray], float], count: int, *, resamples: int, seed: int
) -> np.ndarray:
    """The values of `statistic` of the indices [count] of each resample, float64 [resamples].

    The indices are those that `scipy.stats.bootstrap` draws with the same seed.
    """
    rng = np.random.default_rng(seed)
    rounds = progress.track(range(resamples), "intervals", unit="resamples")
    return np.array([statistic(rng.integers(0, count, count)) for _ in rounds])


def counts(count: int, *, resamples: int, seed: int) -> np.ndarray:
    """The number of times that each of `count` things is in a resample, [count, resamples]."""
    rng = np.random.default_rng(seed)
    rows = [np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(resamples)]
    return np.stack(rows, axis=1).astype(np.float64)


def mean(
    values: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    share: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
    higher_is_better: bool | None = True,
    details: Mapping[str, Any] | None = None,
) -> Estimate:
    """The mean of values [N] with its interval.

    Args:
      values: one for each picture.
      groups: [N], the group of each value, such as its prompt. Whole groups are resampled then,
        since the values of a group are not independent.
      share: values are 0 or 1. If all are the same, no resample differs from another, and the
        interval is Wilson's, with as many trials as there are groups.
      resamples: 0 for no interval.

    Raises:
      ValueError: there are no values.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("bootstrap.mean: no values")
    low = high = None
    if resamples:
        if groups is None:
            sums, sizes = values, np.ones(len(values))
        else:
            _, number = np.unique(groups, return_inverse=True)
            sums, sizes = np.bincount(number, values), np.bincount(number).astype(np.float64)
        if share and values.min() == values.max():
            from scipy import stats  # takes a second to import, which would delay training

            trials = stats.binomtest(int(values[0]) * len(sums), len(sums))
            low, high = map(float, trials.proportion_ci(CONFIDENCE, method="wilson"))
        else:
            low, high = percentiles(
                replicate(
                    lambda rows: float(sums[rows].sum() / sizes[rows].sum()),
                    len(sums),
                    resamples=resamples,
                    seed=seed,
                )
            )
    return Estimate(
        float(values.mean()), low, high, higher_is_better, len(values), dict(details or {})
    )
