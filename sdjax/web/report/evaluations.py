"""The evaluations of a run, by `sdjax.evaluate`: tables, intervals over steps, plots."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.system import paths, text_files, untrusted
from sdjax.web.report.figures import Figure, Series, logarithmic
from sdjax.web.report.pictures import Picture, embed

PICTURE_BYTES = 2_000_000  # of all evaluations, as they stand in the page
MOST_PICTURES = 12  # of one evaluation
MOST_CURVES = 6  # evaluations on one figure, the newest
# Pictures that were drawn to be judged, one a file; there may be tens of thousands.
_DRAWN = re.compile(r"\d+\.png")


# (attribute, headings, rows): a row a prompt, all prompts together last.
Audit = tuple[str, list[str], list[list[str]]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A folder of WORKDIR/evaluations.

    content: of its metrics.json. audits: the tables in it. pictures_left_out: for want of room.
    """

    name: str
    content: Mapping[str, Any]
    audits: tuple[Audit, ...] = ()
    pictures: tuple[Picture, ...] = ()
    pictures_left_out: int = 0

    @property
    def step(self) -> int | None:
        """The step of the checkpoint that was judged."""
        step: Any = self.content.get("step")
        return int(step) if _is_number(step) else None

    @property
    def line(self) -> str:
        """Weights and data: evaluations that agree in them stand on one line of a figure."""
        parts = [self.content.get(name) for name in ("weights", "dataset", "split")]
        return ", ".join(str(part) for part in parts if part) or self.name

    @property
    def metrics(self) -> dict[str, Mapping[str, Any]]:
        """{name: {"value", ...}} of those that have a number."""
        return {
            name: entry
            for name, entry in _entries(self.content, "metrics")
            if isinstance(entry, Mapping) and _is_number(entry.get("value"))
        }

    @property
    def curves(self) -> dict[str, Mapping[str, Any]]:
        """The curves whose x and y are numbers of one count."""
        good = {}
        for name, entry in _entries(self.content, "curves"):
            x, y = (entry.get(k) if isinstance(entry, Mapping) else None for k in "xy")
            if not isinstance(x, list) or not isinstance(y, list) or not x or len(x) != len(y):
                continue
            if all(map(_is_number, x)) and any(map(_is_number, y)):
                good[name] = entry
        return good

    @property
    def warnings(self) -> list[str]:
        """The warnings of `sdjax.evaluate`."""
        found = self.content.get("warnings")
        return [str(text) for text in found] if isinstance(found, list) else []

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(metric, value, interval, which way is better)."""
        return [
            (name, f"{entry['value']:.5g}", interval(entry), better(entry))
            for name, entry in self.metrics.items()
        ]

    def settings(self) -> list[tuple[str, str]]:
        """How it was evaluated, as (name, text)."""
        found = []
        for name in ("model", "step", "weights", "dataset", "split", "num_samples", "seed"):
            if self.content.get(name) not in (None, ""):
                found.append((name, str(self.content[name])))
        for name in ("sampler", "settings"):
            said = [(k, v) for k, v in _entries(self.content, name) if v not in (None, "", {})]
            found.append((name, ", ".join(f"{key} {value}" for key, value in said)))
        best = self.content.get("best_ema_length")
        if isinstance(best, Mapping):
            text = f"{best.get('length')}, with {best.get('metric')} {best.get('value')}"
            found.append(("best length of the average", text))
            found.append(("to have it", str(best.get("command", ""))))
        return [(name, text) for name, text in found if text]


def gather(workdir: paths.PathLike) -> tuple[list[Evaluation], list[str]]:
    """Return the evaluations by step, and what of them cannot be read.

    The newest get their pictures first.
    """
    folder = paths.to_path(workdir) / "evaluations"
    found: list[Evaluation] = []
    problems: list[str] = []
    files = sorted(folder.glob("*/metrics.json"), key=str) if folder.exists() else []
    for file in files:
        try:
            content = text_files.read_json(file)
            if not isinstance(content, dict):
                raise ValueError("no JSON object")
        except paths.storage_errors(ValueError) as error:
            problems.append(f"{file.parent.name}/metrics.json: {error}")
            continue
        try:
            audits = _audits(content)
        except untrusted.damage() as error:
            problems.append(f"the audit of {file.parent.name}: {type(error).__name__}: {error}")
            audits = ()
        found.append(Evaluation(file.parent.name, content, audits))
    found.sort(key=lambda one: (one.step is not None, one.step or 0, one.name))
    room = PICTURE_BYTES
    for i in reversed(range(len(found))):
        drawn = {"metrics.png", *(f"{name}.png" for name in found[i].curves)}  # by the page
        pictures, left = _pictures(folder / found[i].name, drawn, room, problems)
        room -= sum(picture.bytes for picture in pictures)
        found[i] = dataclasses.replace(found[i], pictures=tuple(pictures), pictures_left_out=left)
    return found, problems


def _pictures(
    folder: paths.Path, without: set[str], room: int, problems: list[str]
) -> tuple[list[Picture], int]:
    """Return the pictures of a folder that fit into `room` bytes, and how many do not."""
    every = sorted(folder.glob("*.png"), key=str)
    files = [f for f in every if not _DRAWN.fullmatch(f.name) and f.name not in without]
    kept: list[Picture] = []
    for file in files[:MOST_PICTURES] if room > 0 else ():
        try:
            small = embed(file)
        except paths.storage_errors(ValueError, SyntaxError) as error:
            problems.append(f"{folder.name}/{file.name}: {error}")
            continue
        if small.bytes <= room:
            kept.append(small)
            room -= small.bytes
    return kept, len(files) - len(kept)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def better(entry: Mapping[str, Any]) -> str:
    """Return which way is better, in a word; "" where the metric does not say."""
    higher = entry.get("higher_is_better")
    return "" if not isinstance(higher, bool) else "higher" if higher else "lower"


def interval(entry: Mapping[str, Any]) -> str:
    """Return `12.3 to 13.4`, or "" for a metric without an interval."""
    low, high = entry.get("low"), entry.get("high")
    return f"{low:.4g} to {high:.4g}" if _is_number(low) and _is_number(high) else ""


def _entries(content: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    """Return the items of a group; none where it is no group."""
    found = content.get(name)
    return list(found.items()) if isinstance(found, Mapping) else []


def _audits(content: Mapping[str, Any]) -> tuple[Audit, ...]:
    """Return what an audit counted.

    Raises:
        one of `untrusted.damage()`: it is not as `audit_shares` writes it.
    """
    found = []
    for name, of in content.get("audit", {}).get("attributes", {}).items():
        labels = [
            f"{label} (target {100 * target:.3g} %)"
            for label, target in zip(of["labels"], of["target"], strict=True)
        ]
        head = ["prompt", *labels, "untold", "difference", "ratio", "distance"]
        every = [*of["prompts"].items(), ("all prompts", of["all"])]
        found.append((name, head, [_audit_row(prompt, shares) for prompt, shares in every]))
    return tuple(found)


def _audit_row(prompt: str, shares: Mapping[str, Any]) -> list[str]:
    cells = [
        f"{100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f})" if _is_number(share) else "-"
        for share, low, high in zip(shares["shares"], shares["low"], shares["high"], strict=True)
    ]
    for name in ("difference", "ratio", "distance"):
        entry = shares[name]
        within = f" ({entry['low']:.2f} to {entry['high']:.2f})" if interval(entry) else ""
        cells.append(f"{entry['value']:.2f}{within}" if _is_number(entry["value"]) else "-")
    return [prompt, *cells[:-3], str(shares["untold"]), *cells[-3:]]


def figures(evaluations: Sequence[Evaluation]) -> list[Figure]:
    """Return a figure for each metric over the steps, then one for each curve (EMA lengths)."""
    with_step = [one for one in evaluations if one.step is not None]
    names = dict.fromkeys(name for one in with_step for name in one.metrics)
    curves = dict.fromkeys(name for one in evaluations for name in one.curves)
    dots = [_dots(name, with_step) for name in names]
    return dots + [_curve(name, evaluations) for name in curves]


def _dots(name: str, evaluations: Sequence[Evaluation]) -> Figure:
    """Return the figure of a metric: dots with error bars for each choice of weights and data."""
    by_line: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for one in evaluations:
        if name in one.metrics and one.step is not None:
            by_line.setdefault(one.line, []).append((one.step, one.metrics[name]))
    series, words = [], []
    for label, points in by_line.items():
        values = np.array([entry["value"] for _, entry in points], float)
        ends = [
            np.array([_number(entry.get(end), entry["value"]) for _, entry in points], float)
            for end in ("low", "high")
        ]
        steps = np.array([step for step, _ in points])
        series.append(Series(label, steps, values, low=ends[0], high=ends[1]))
        words.append(f"{label}: {values[-1]:.4g} at step {steps[-1]}.")
    direction = better(next(iter(by_line.values()))[-1][1])
    note = f"{direction.capitalize()} is better. " if direction else ""
    return Figure(
        title=name,
        series=tuple(series),
        note=note + "Bars: 95 % bootstrap intervals, where there are any.",
        summary=f"Dot plot of {name} over training steps. " + " ".join(words),
        mode="markers",
        log=logarithmic(series),
    )


def _number(value: Any, otherwise: float) -> float:
    return value if _is_number(value) else otherwise


def _curve(name: str, evaluations: Sequence[Evaluation]) -> Figure:
    having = [one for one in evaluations if name in one.curves][-MOST_CURVES:]
    series, words = [], []
    for one in having:
        entry = one.curves[name]
        x, y = np.array(entry["x"], float), _floats(entry["y"])
        ends = [
            _floats(entry[end]) if _same_length(entry.get(end), entry["y"]) else None
            for end in ("low", "high")
        ]
        series.append(Series(one.name, x, y, low=ends[0], high=ends[1]))
        best = int(np.nanargmin(y))
        words.append(f"{one.name}: least {y[best]:.4g} at {x[best]:.4g}.")
    return Figure(
        title=name,
        series=tuple(series),
        note="Bands: 95 % intervals." if any(one.low is not None for one in series) else "",
        summary=f"Line plot of {name}. " + " ".join(words),
        over=str(entry.get("x_label", "")) or " ",
        unit=str(entry.get("y_label", "")),
        log=logarithmic(series),
        log_x=bool(entry.get("log_x")),
    )


def _floats(values: Sequence[Any]) -> np.ndarray:
    return np.array([value if _is_number(value) else np.nan for value in values], float)


def _same_length(values: Any, others: Sequence[Any]) -> bool:
    return isinstance(values, list) and len(values) == len(others) and any(map(_is_number, values))
