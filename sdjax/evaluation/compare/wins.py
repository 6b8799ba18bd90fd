"""How often one model's picture beats another's of the same prompt and noise, and what else moved.

A win is a picture with the better score, where a score says what is better, and else with more of
it: the win rate of `object_width` is how often the objects are larger.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from sdjax.evaluation.compare.scores import SCORES
from sdjax.evaluation.metrics import bootstrap
from sdjax.evaluation.metrics.bootstrap import CONFIDENCE, Estimate


@dataclasses.dataclass(frozen=True)
class Drift:
    """A metric of two models, ours and theirs.

    difference: ours - theirs, with the interval of the mean difference of two pictures where the
        metric is a mean over pictures; without one elsewhere.
    """

    ours: float
    theirs: float
    difference: Estimate


def wilson(rate: float, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of Wilson 1927 of a share.

    Args:
        rate: of `trials`; wins with half of the ties need not be a whole number of them.
    """
    from scipy import stats  # takes a second to import

    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    centre = rate + z**2 / (2 * trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    return (centre - half) / scale, (centre + half) / scale


def win_rate(
    ours: np.ndarray, theirs: np.ndarray, prompts: Sequence[str], *, less: bool = False
) -> Estimate | None:
    """Return the share of pictures that win, a tie counting half, with Wilson's interval.

    Pictures of one prompt are not independent: there are as many trials as prompts.

    Args:
        ours, theirs: scores [N] of pictures of the same prompts and noise; those where one is NaN
            do not count. less: whether less wins.

    Returns:
        An estimate whose details are the numbers of wins, ties and losses; None if no pictures
        have the score.
    """
    both = np.isfinite(ours) & np.isfinite(theirs)
    if not both.any():
        return None
    sign = np.sign(ours - theirs)[both] * (-1 if less else 1)
    numbers = {"wins": int((sign > 0).sum()), "ties": int((sign == 0).sum()),
               "losses": int((sign < 0).sum())}  # fmt: skip
    rate = (numbers["wins"] + numbers["ties"] / 2) / len(sign)
    trials = len({prompt for prompt, counts in zip(prompts, both, strict=True) if counts})
    return Estimate(rate, *wilson(rate, trials), None, len(sign), numbers)


def win_rates(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], prompts: Sequence[str]
) -> dict[str, Estimate]:
    """Return {score: `win_rate`} of the scores that both have."""
    found = {
        name: win_rate(ours[name], theirs[name], prompts, less=SCORES[name] is False)
        for name in SCORES
        if name in ours and name in theirs
    }
    return {name: rate for name, rate in found.items() if rate is not None}


def drifts(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    metrics: tuple[Mapping[str, Estimate], Mapping[str, Estimate]],
    prompts: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Drift]:
    """Return what differs, {score or metric: drift}.

    Args:
        metrics: of our pictures and of theirs; those that are no means over pictures count.
        resamples: of prompts, for the intervals of the differences.
    """
    found: dict[str, Drift] = {}
    for name in SCORES:
        if name not in ours or name not in theirs:
            continue
        both = np.isfinite(ours[name]) & np.isfinite(theirs[name])
        if not both.any():
            continue
        difference = bootstrap.mean(
            (ours[name] - theirs[name])[both], groups=np.array(prompts)[both],
            resamples=resamples, seed=seed, higher_is_better=SCORES[name],
        )  # fmt: skip
        own, other = (float(np.nanmean(scores[name])) for scores in (ours, theirs))
        found[name] = Drift(own, other, difference)
    for name, metric in metrics[0].items():
        if name in metrics[1] and name not in found:
            own, other = metric.value, metrics[1][name].value
            estimate = Estimate(own - other, None, None, metric.higher_is_better)
            found[name] = Drift(own, other, estimate)
    return found
