"""The results of an audit: shares of labels with intervals, and their distance from a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from sdjax.evaluation.audit import Attribute, Audit
from sdjax.evaluation.metrics import bootstrap
from sdjax.evaluation.metrics.bootstrap import CONFIDENCE, RESAMPLES, Estimate

ALL = "all prompts"


@dataclasses.dataclass(frozen=True)
class Shares:
    """One attribute in the pictures of one prompt, or of all.

    counts: of each label; untold: pictures without a label, which count nowhere else.
    shares, low, high: of each label with its 95 % interval (Wilson's); NaN without labelled
      pictures.
    difference: largest less smallest share.
    ratio: smallest by largest share, 1 if they are even.
    distance: total variation from the target, half the sum of absolute differences, in [0, 1].
    """

    prompt: str
    counts: tuple[int, ...]
    untold: int
    shares: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    difference: Estimate
    ratio: Estimate
    distance: Estimate


@dataclasses.dataclass(frozen=True)
class Finding:
    """The shares of one attribute: over all pictures, and prompt by prompt."""

    attribute: Attribute
    overall: Shares
    prompts: tuple[Shares, ...]


def count(
    audit: Audit,
    codes: Mapping[str, np.ndarray],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Finding, ...]:
    """The findings of an audit.

    Args:
        codes: {attribute: int [N]} of `audit.make_labeller`, one for each of `audit.captions`.
        resamples: of the bootstrap behind the intervals of the disparities; it resamples the
            pictures of each prompt.

    Raises:
        ValueError: there are not as many codes as pictures.
    """
    findings = []
    for attribute in audit.attributes:
        rows = np.asarray(codes[attribute.name])
        if rows.shape != (len(audit.captions),):
            raise ValueError(
                f"codes of {attribute.name!r} {rows.shape}: expected {len(audit.captions)}"
            )
        rows = rows.reshape(len(audit.prompts), audit.pictures_per_prompt)
        size = len(attribute.labels)
        counted = np.stack(
            [np.bincount(row[row >= 0], minlength=size) for row in rows]
        )  # [P, labels]
        untold = (rows < 0).sum(axis=1)
        rng = np.random.default_rng(seed)
        drawn = np.stack([_redrawn(row, resamples, rng) for row in counted])  # [P, R, labels]
        overall = _shares(ALL, counted.sum(0), int(untold.sum()), drawn.sum(0), attribute)
        each = tuple(
            _shares(prompt, counted[i], int(untold[i]), drawn[i], attribute)
            for i, prompt in enumerate(audit.prompts)
        )
        findings.append(Finding(attribute, overall, each))
    return tuple(findings)


def wilson(
    counts: np.ndarray, total: int, confidence: float = CONFIDENCE
) -> tuple[np.ndarray, np.ndarray]:
    """The ends of Wilson's score interval of shares counts / total (J. Am. Stat. Assoc. 22, 1927).

    They are in [0, 1], and differ even if a label was never or always seen.
    """
    from scipy.special import ndtri  # slow to import

    z2 = ndtri((1 + confidence) / 2) ** 2
    share = np.asarray(counts, np.float64) / total
    middle = share + z2 / (2 * total)
    half = np.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2)))
    ends = ((middle - half) / (1 + z2 / total), (middle + half) / (1 + z2 / total))
    # For these shares the formula gives exactly 0 and 1, up to rounding.
    return np.where(share == 0, 0.0, ends[0]), np.where(share == 1, 1.0, ends[1])


def estimates(findings: tuple[Finding, ...]) -> dict[str, Estimate]:
    """The disparities over all prompts, {"audit/ATTRIBUTE/NAME": estimate}.

    NAME is "difference", "ratio" or "distance". Attributes without a labelled picture are left out.
    """
    return {
        f"audit/{finding.attribute.name}/{name}": getattr(finding.overall, name)
        for finding in findings
        for name in ("difference", "ratio", "distance")
        if sum(finding.overall.counts)
    }


def to_json(audit: Audit, findings: tuple[Finding, ...]) -> dict[str, Any]:
    """The findings for metrics.json; a share without pictures is null."""
    return {
        "prompts": list(audit.prompts),
        "pictures_per_prompt": audit.pictures_per_prompt,
        "labeller": audit.labeller,
        "attributes": {
            finding.attribute.name: {
                "labels": list(finding.attribute.labels),
                "texts": [list(texts) for texts in finding.attribute.texts],
                "target": list(finding.attribute.target),
                "all": _json(finding.overall),
                "prompts": {shares.prompt: _json(shares) for shares in finding.prompts},
            }
            for finding in findings
        },
    }


def tables(findings: tuple[Finding, ...]) -> list[Table]:
    """A table for each attribute: a row a prompt, with the shares of its labels in percent.

    The last row has all prompts together, with the disparities.
    """
    return [_table(finding) for finding in findings]


def _table(finding: Finding) -> Table:
    table = Table(title=escape(finding.attribute.name), title_justify="left")
    table.add_column("prompt", overflow="fold")
    for label, target in zip(finding.attribute.labels, finding.attribute.target, strict=True):
        table.add_column(f"{escape(label)} %\n(target {100 * target:.3g})", justify="right")
    for heading in ("untold", "difference", "ratio", "distance from\nthe target"):
        table.add_column(heading, justify="right")
    for shares in (*finding.prompts, finding.overall):
        if shares is finding.overall:
            table.add_section()
        cells = [
            f"{100 * share:.0f} ({100 * low:.0f} to {100 * high:.0f})" if share == share else "-"
            for share, low, high in zip(shares.shares, shares.low, shares.high, strict=True)
        ]
        spread = [_cell(e) for e in (shares.difference, shares.ratio, shares.distance)]
        table.add_row(escape(shares.prompt), *cells, str(shares.untold), *spread)
    return table


def _cell(estimate: Estimate) -> str:
    if estimate.value != estimate.value:
        return "-"
    if estimate.low is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _json(shares: Shares) -> dict[str, Any]:
    def numbers(values: tuple[float, ...]) -> list[float | None]:
        return [value if value == value else None for value in values]

    def estimate(found: Estimate) -> dict[str, float | None]:
        value, low, high = (None if x != x else x for x in (found.value, found.low, found.high))
        return {"value": value, "low": low, "high": high}

    return {
        "counts": list(shares.counts),
        "untold": shares.untold,
        "shares": numbers(shares.shares),
        "low": numbers(shares.low),
        "high": numbers(shares.high),
        "difference": estimate(shares.difference),
        "ratio": estimate(shares.ratio),
        "distance": estimate(shares.distance),
    }


def _redrawn(counts: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Resampled counts [R, labels]: as many pictures, drawn with replacement from those counted."""
    total = int(counts.sum())
    if not total:
        return np.zeros((resamples, len(counts)), np.int64)
    return rng.multinomial(total, counts / total, size=resamples)


def _shares(
    prompt: str, counts: np.ndarray, untold: int, drawn: np.ndarray, attribute: Attribute
) -> Shares:
    total = int(counts.sum())
    if not total:
        nothing = tuple(float("nan") for _ in counts)
        none = Estimate(float("nan"), higher_is_better=False)
        return Shares(
            prompt, tuple(map(int, counts)), untold, nothing, nothing, nothing, none, none, none
        )
    lows, highs = wilson(counts, total)
    target = np.array(attribute.target)

    def estimate(name: str, better: bool) -> Estimate:
        value = float(_DISPARITIES[name](counts / total, target))
        if not len(drawn):
            return Estimate(value, higher_is_better=better, count=total)
        ends = bootstrap.around(value, _DISPARITIES[name](drawn / total, target))
        low, high = (min(max(end, 0.0), 1.0) for end in ends)
        return Estimate(value, low, high, higher_is_better=better, count=total)

    return Shares(
        prompt=prompt,
        counts=tuple(map(int, counts)),
        untold=untold,
        shares=tuple(map(float, counts / total)),
        low=tuple(map(float, lows)),
        high=tuple(map(float, highs)),
        difference=estimate("difference", False),
        ratio=estimate("ratio", True),
        distance=estimate("distance", False),
    )


# Functions of shares [..., labels] and the target [labels].
_DISPARITIES = {
    "difference": lambda shares, target: shares.max(-1) - shares.min(-1),
    "ratio": lambda shares, target: shares.min(-1) / shares.max(-1),
    "distance": lambda shares, target: 0.5 * np.abs(shares - target).sum(-1),
}
