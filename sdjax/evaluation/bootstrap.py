"""How sure a number is: percentile intervals of resampled pictures (Efron and Tibshirani 1993).

What is resampled is the pictures that were judged; what they are compared with is held fixed. So an
interval says how much the number would move if the same model drew as many other pictures.
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
      low, high: ends of the 95 % interval; None where it has none.
      higher_is_better: None where neither end is the better one.
      count: how many numbers (pictures, prompts) it was made of.
      details: what else is worth writing down, JSON-able.
    """

    value: float
    low: float | None = None
    high: float | None = None
    higher_is_better: bool | None = True
    count: int = 0
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def percentiles(replicates: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The middle `confidence` of replicates [R]."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return float(low), float(high)


def around(
    value: float, replicates: np.ndarray, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The percentile interval of replicates [R], moved so that their mean is the value.

    For distances between distributions: a resample has fewer different pictures than the sample
    and so lies farther from the reference, by about as much as the sample itself does because it
    is finite. Unmoved, the interval would not even hold the value. The distance is comparable at
    one number of pictures only, and the interval is of that number.
    """
    low, high = percentiles(replicates - replicates.mean(), confidence)
    return value + low, value + high


def replicate(
    statistic: Callable[[np.ndarray], float], count: int, *, resamples: int, seed: int
) -> np.ndarray:
    """`statistic` of the indices [count] of each resample -> [resamples] float64.

    The indices are those that `scipy.stats.bootstrap` draws with the same seed.
    """
    rng = np.random.default_rng(seed)
    rounds = progress.track(range(resamples), "intervals", unit="resamples")
    return np.array([statistic(rng.integers(0, count, count)) for _ in rounds])


def counts(count: int, *, resamples: int, seed: int) -> np.ndarray:
    """How often each of `count` things is in each resample: float64 [count, resamples]."""
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
      values: one a picture.
      groups: [N] which belong together, such as the pictures of one prompt; whole groups are
        resampled then, for their pictures are not independent.
      share: values are 0 or 1. Where all are the same no resample differs from another, and the
        interval is Wilson's, of as many trials as there are groups.
      resamples: 0 for no interval.
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
            from scipy import stats  # takes a second to import, which training would wait for

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
