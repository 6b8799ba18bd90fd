"""Before and after, on the prompts that nothing was chosen by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdjax.evaluation.metrics import bootstrap
from sdjax.evaluation.metrics.bootstrap import Estimate
from sdjax.improving.groups import Group, GroupsOf
from sdjax.improving.proposal import Share, Verdict


@dataclasses.dataclass(frozen=True)
class Change:
    """A group of prompts before and after.

    group: None for all prompts; failed: whether it was to get better.
    difference: of the share that passed, paired by prompt.
    """

    group: Group | None
    failed: bool
    before: Share
    after: Share
    difference: Estimate

    @property
    def better(self) -> bool:
        """Whether the whole interval of the difference is above 0."""
        return (self.difference.low or 0.0) > 0

    @property
    def worse(self) -> bool:
        """Whether the whole interval of the difference is below 0."""
        return (self.difference.high or 0.0) < 0

    def to_dict(self) -> dict[str, Any]:
        """As improve.json has it."""
        one = self.difference
        return {
            "group": "all" if self.group is None else str(self.group), "failed": self.failed,
            "before": self.before.to_dict(), "after": self.after.to_dict(),
            "difference": {"value": one.value, "low": one.low, "high": one.high},
            "better": self.better, "worse": self.worse,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All prompts, the groups that failed together, and every group."""

    everything: Change
    failed: Change
    groups: tuple[Change, ...]

    @property
    def verdict(self) -> str:
        """ "better", "mixed", "worse" or "undecided"."""
        if self.failed.worse or (self.everything.worse and not self.failed.better):
            return "worse"
        if self.failed.better:
            return "mixed" if self.everything.worse or self.losses else "better"
        return "undecided"

    @property
    def losses(self) -> tuple[Change, ...]:
        """The groups that got worse."""
        return tuple(one for one in self.groups if one.worse)

    def sentence(self) -> str:
        """Return the outcome in words."""
        said = {
            "better": "It got better",
            "mixed": "What failed got better, and something else got worse",
            "worse": "It got worse",
            "undecided": "No difference can be told",
        }[self.verdict]
        lost = ", ".join(str(one.group) for one in self.losses)
        return (
            f"{said}: of what failed {_change(self.failed)}; of all prompts "
            f"{_change(self.everything)}." + (f" Worse: {lost}." if lost else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """As improve.json has it."""
        return {
            "verdict": self.verdict, "sentence": self.sentence(),
            "all": self.everything.to_dict(), "failed": self.failed.to_dict(),
            "groups": [one.to_dict() for one in self.groups],
        }  # fmt: skip


def _change(one: Change) -> str:
    found = one.difference
    return (
        f"{one.before.value:.2f} before, {one.after.value:.2f} after "
        f"({found.value:+.2f}, {found.low:+.2f} to {found.high:+.2f})"
    )


def compare(
    before: Sequence[Verdict], after: Sequence[Verdict], of: GroupsOf, failed: Sequence[Group], *,
    least: int, resamples: int = bootstrap.RESAMPLES,
) -> Comparison:  # fmt: skip
    """Compare verdicts about the same prompts. Intervals resample prompts.

    Args:
        failed: the groups that were to get better.
        least: prompts of a group, below which it is not compared.

    Raises:
        ValueError: the verdicts are about other prompts.
    """
    if [v.key for v in before] != [v.key for v in after]:
        raise ValueError("the verdicts before and after are about other prompts")
    own = [of(v.caption) for v in before]
    everything = range(len(before))

    def change(group: Group | None, rows: Sequence[int], is_failed: bool) -> Change:
        olds, news = ([table[i].passed for i in rows] for table in (before, after))
        moved = np.array(news, float) - np.array(olds, float)
        captions = np.array([before[i].caption for i in rows])
        found = bootstrap.mean(moved, groups=captions, resamples=resamples)
        return Change(
            group, is_failed, Share(sum(olds), len(olds)), Share(sum(news), len(news)), found
        )

    every = sorted({group for groups in own for group in groups}, key=str)
    members = {group: [i for i in everything if group in own[i]] for group in every}
    target = [i for i in everything if own[i] & set(failed)]
    changes = [
        change(group, rows, group in set(failed))
        for group, rows in members.items()
        if len(rows) >= least
    ]
    return Comparison(
        change(None, everything, False),
        change(None, target or everything, True),
        tuple(sorted(changes, key=lambda one: (not one.failed, one.difference.value))),
    )
