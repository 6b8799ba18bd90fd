"""The groups that fail, and what to collect for them."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.improving.groups import PAIR, Group, GroupsOf, count

CONFIDENCE_Z = 1.959963984540054  # of a 95 % interval


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether the model did right by one prompt of the held-out split.

    key: tells it from others with the same caption.
    """

    key: str
    caption: str
    passed: bool


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of passed prompts, with Wilson's 95 % interval."""

    passed: int
    total: int

    @property
    def value(self) -> float:
        """The share itself; 0 of none."""
        return self.passed / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval (Wilson 1927); 0 to 1 of none."""
        if not self.total:
            return 0.0, 1.0
        z, n = CONFIDENCE_Z, self.total
        centre = (self.passed + z * z / 2) / (n + z * z)
        half = z / (n + z * z) * math.sqrt(self.passed * (n - self.passed) / n + z * z / 4)
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} ({low:.2f} to {high:.2f})"

    def to_dict(self) -> dict[str, Any]:
        """As improve.json has it."""
        low, high = self.interval
        return {"share": self.value, "low": low, "high": high, "passed": self.passed,
                "total": self.total}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Finding:
    """A group, as the model does by it.

    own, others: the shares that passed in the group and outside of it.
    trained, usual: training captions that name the group, and the median of the groups of its kind
        that do not fail.
    blamed: a group that fails and explains this one; "" for none.
    """

    group: Group
    own: Share
    others: Share
    fails: bool
    trained: int = 0
    usual: int = 0
    blamed: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As improve.json has it."""
        return {
            "group": str(self.group), "fails": self.fails, "blamed": self.blamed,
            "own": self.own.to_dict(), "others": self.others.to_dict(),
            "trained": self.trained, "usual": self.usual,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Examples to collect for a group that fails.

    examples: how many more. why: a sentence.
    """

    group: Group
    examples: int
    trained: int
    why: str

    def to_dict(self) -> dict[str, Any]:
        """As a line of collect.jsonl has it."""
        return {"group": str(self.group), "examples": self.examples, "trained": self.trained,
                "why": self.why}  # fmt: skip


def shares(verdicts: Sequence[Verdict], of: GroupsOf) -> dict[Group, Share]:
    """The share that passed of each group."""
    total, passed = (
        count([v.caption for v in verdicts], of),
        count([v.caption for v in verdicts if v.passed], of),
    )
    return {group: Share(passed.get(group, 0), n) for group, n in total.items()}


def find(
    verdicts: Sequence[Verdict], of: GroupsOf, trained: Mapping[Group, int], *,
    least: int, target: float | None,
) -> list[Finding]:  # fmt: skip
    """Judge every group of at least `least` prompts; those that fail come first, the worst first.

    A group fails where the upper end of its interval is below the target. Without a target, that is
    the lower end of the interval of all prompts outside of the group.
    """
    every = Share(sum(v.passed for v in verdicts), len(verdicts))
    found = []
    for group, own in shares(verdicts, of).items():
        others = Share(every.passed - own.passed, every.total - own.total)
        if own.total < least or (target is None and not others.total):
            continue
        wanted = others.interval[0] if target is None else target
        found.append(Finding(group, own, others, own.interval[1] < wanted))
    failing = {one.group for one in found if one.fails}
    whole = [_with_counts(_blamed(one, failing), found, trained) for one in found]
    return sorted(whole, key=lambda one: (not one.fails, one.own.value, str(one.group)))


def _blamed(one: Finding, failing: set[Group]) -> Finding:
    """A pair of colour and shape fails because of one of them, if that fails by itself."""
    if not one.fails or one.group.kind != PAIR:
        return one
    colour, shape = one.group.value.split(" ")
    parents = [g for g in (Group("colour", colour), Group("shape", shape)) if g in failing]
    if not parents:
        return one
    return dataclasses.replace(one, fails=False, blamed=str(parents[0]))


def _with_counts(one: Finding, found: Sequence[Finding], trained: Mapping[Group, int]) -> Finding:
    siblings = [
        trained.get(other.group, 0)
        for other in found
        if other.group.kind == one.group.kind and not other.fails and other.group != one.group
    ]
    usual = round(statistics.median(siblings)) if siblings else 0
    return dataclasses.replace(one, trained=trained.get(one.group, 0), usual=usual)


def propose(findings: Sequence[Finding], *, most: int) -> list[Proposal]:
    """Propose what to collect for each group that fails.

    A group that is rarer than its like gets what is missing to the median of these; another as many
    as it has; none gets more than `most`.
    """
    return [_proposal(one, most) for one in findings if one.fails]


def _proposal(one: Finding, most: int) -> Proposal:
    did = (
        f"{one.own.passed} of {one.own.total} prompts right, {one.own}; outside of the group "
        f"{one.others}"
    )
    rare = one.trained < 0.5 * one.usual
    if rare:
        wanted = one.usual - one.trained
        why = (
            f"{did}. {one.trained:,} training captions name it, where the median of groups like it "
            f"is {one.usual:,}."
        )
    else:
        wanted = max(one.trained, 1)
        why = (
            f"{did}. It is not rare ({one.trained:,} training captions name it, and {one.usual:,} "
            "groups like it): look at its examples first, as by evaluate --metrics=example_loss; "
            "more of them is the second guess."
        )
    return Proposal(one.group, max(1, min(wanted, most)), one.trained, why)


def as_text(title: str, findings: Sequence[Finding], proposals: Sequence[Proposal]) -> str:
    """Return the proposal as Markdown, for people."""
    lines = [f"# What to collect for {title}", ""]
    if not proposals:
        lines += ["No group fails: there is nothing to collect.", ""]
    for one in proposals:
        lines += [f"- **{one.group}**: {one.examples:,} more. {one.why}"]
    lines += [
        "",
        "| group | right | outside of it | in training | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for finding in findings:
        state = "fails" if finding.fails else ""
        if finding.blamed:
            state = f"by {finding.blamed}"
        cells = (finding.group, finding.own, finding.others, f"{finding.trained:,}", state)
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def as_lines(proposals: Sequence[Proposal]) -> str:
    """Return the proposal as JSON lines, for programs."""
    return "".join(json.dumps(one.to_dict(), ensure_ascii=False) + "\n" for one in proposals)
