"""What `sdjax.evaluate` found of a run, for the report: tables, intervals over steps, plots."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.system import paths, text_files
from sdjax.web.report_figures import Figure, Series, logarithmic
from sdjax.web.report_pictures import Picture, embed

PICTURE_BYTES = 2_000_000  # of all evaluations, as they stand in the page
MOST_PICTURES = 12  # of one evaluation
MOST_CURVES = 6  # evaluations on one figure, the newest
# Pictures that were drawn to be judged, one a file; there may be tens of thousands.
_DRAWN = re.compile(r"\d+\.png")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A folder of WORKDIR/evaluations. content: of its metrics.json. pictures_left_out: for want
    of room."""

    name: str
    content: Mapping[str, Any]
    pictures: tuple[Picture, ...] = ()
    pictures_left_out: int = 0

    @property
    def step(self) -> int | None:
        """Of the checkpoint it judged."""
        step: Any = self.content.get("step")
        return int(step) if _is_number(step) else None

    @property
    def of(self) -> str:
        """Weights and data: evaluations that agree in them stand on one line."""
        parts = [self.content.get(name) for name in ("weights", "dataset", "split")]
        return ", ".join(str(part) for part in parts if part) or self.name

    @property
    def metrics(self) -> dict[str, Mapping[str, Any]]:
        """{name: {"value", ...}} of those that have a number."""
        found = self.content.get("metrics")
        entries = found.items() if isinstance(found, Mapping) else ()
        return {
            name: entry
            for name, entry in entries
            if isinstance(entry, Mapping) and _is_number(entry.get("value"))
        }

    @property
    def warnings(self) -> list[str]:
        """Its own."""
        found = self.content.get("warnings")
        return [str(text) for text in found] if isinstance(found, list) else []


def gather(workdir: paths.PathLike) -> tuple[list[Evaluation], list[str]]:
    """The evaluations by step, and what could not be read of them. The newest get their pictures
    first."""
    folder = paths.to_path(workdir) / "evaluations"
    found: list[Evaluation] = []
    problems: list[str] = []
    files = sorted(folder.glob("*/metrics.json"), key=str) if folder.exists() else []
    for file in files:
        try:
            content = text_files.read_json(file)
            if not isinstance(content, dict):
                raise ValueError("no JSON object")
            found.append(Evaluation(file.parent.name, content))
        except paths.storage_errors(ValueError) as error:
            problems.append(f"{file.parent.name}/metrics.json: {error}")
    found.sort(key=lambda one: (one.step is not None, one.step or 0, one.name))
    room = PICTURE_BYTES
    for i in reversed(range(len(found))):
        drawn = {"metrics.png", *(f"{name}.png" for name in _curves(found[i]))}  # by the page
        pictures, left_out = _pictures(folder / found[i].name, drawn, room, problems)
        room -= sum(picture.bytes for picture in pictures)
        found[i] = dataclasses.replace(
            found[i], pictures=tuple(pictures), pictures_left_out=left_out
        )
    return found, problems


def _pictures(
    folder: paths.Path, without: set[str], room: int, problems: list[str]
) -> tuple[list[Picture], int]:
    """Those of a folder that fit into `room` bytes, and how many do not."""
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
    """Which way is better, in a word; "" where the metric does not say."""
    higher = entry.get("higher_is_better")
    return "" if not isinstance(higher, bool) else "higher" if higher else "lower"


def interval(entry: Mapping[str, Any]) -> str:
    """`12.3 to 13.4`, or "" for a metric without one."""
    low, high = entry.get("low"), entry.get("high")
    return f"{low:.4g} to {high:.4g}" if _is_number(low) and _is_number(high) else ""


def rows(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """(metric, value, interval, which way is better)."""
    return [
        (name, f"{entry['value']:.5g}", interval(entry), better(entry))
        for name, entry in evaluation.metrics.items()
    ]


def settings(evaluation: Evaluation) -> list[tuple[str, str]]:
    """How it was evaluated, as (name, text)."""
    found = []
    for name in ("model", "step", "weights", "dataset", "split", "num_samples", "seed"):
        if evaluation.content.get(name) not in (None, ""):
            found.append((name, str(evaluation.content[name])))
    for name in ("sampler", "settings"):
        entries = evaluation.content.get(name)
        if isinstance(entries, Mapping):
            said = {key: value for key, value in entries.items() if value not in (None, "", {})}
            found.append((name, ", ".join(f"{key} {value}" for key, value in said.items())))
    best = evaluation.content.get("best_ema_length")
    if isinstance(best, Mapping):
        text = f"{best.get('length')}, with {best.get('metric')} {best.get('value')}"
        found.append(("best length of the average", text))
        found.append(("to have it", str(best.get("command", ""))))
    return [(name, text) for name, text in found if text]


def audit_tables(evaluation: Evaluation) -> list[tuple[str, list[str], list[list[str]]]]:
    """(attribute, headings, rows) of what an audit counted: a row a prompt, all together last.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: it is not as `audit_shares` writes it.
    """
    found = []
    for name, of in evaluation.content.get("audit", {}).get("attributes", {}).items():
        labels = [
            f"{label} (target {100 * target:.3g} %)"
            for label, target in zip(of["labels"], of["target"], strict=True)
        ]
        head = ["prompt", *labels, "untold", "difference", "ratio", "distance"]
        every = [*of["prompts"].items(), ("all prompts", of["all"])]
        found.append((name, head, [_audit_row(prompt, shares) for prompt, shares in every]))
    return found


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
    """Each metric over the steps with its intervals, then the curves (such as EMA lengths)."""
    with_step = [one for one in evaluations if one.step is not None]
    names = dict.fromkeys(name for one in with_step for name in one.metrics)
    curves = dict.fromkeys(name for one in evaluations for name in _curves(one))
    return [_dots(name, with_step) for name in names] + [
        figure for name in curves if (figure := _curve(name, evaluations))
    ]


def _dots(name: str, evaluations: Sequence[Evaluation]) -> Figure:
    """One metric: a row of dots with error bars for each choice of weights and data."""
    by_line: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for one in evaluations:
        if name in one.metrics and one.step is not None:
            by_line.setdefault(one.of, []).append((one.step, one.metrics[name]))
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


def _curves(evaluation: Evaluation) -> dict[str, Mapping[str, Any]]:
    """The curves whose x and y are numbers of one count."""
    found = evaluation.content.get("curves")
    entries = found.items() if isinstance(found, Mapping) else ()
    good = {}
    for name, entry in entries:
        x, y = (entry.get(k) if isinstance(entry, Mapping) else None for k in "xy")
        if not isinstance(x, list) or not isinstance(y, list) or not x or len(x) != len(y):
            continue
        if all(map(_is_number, x)) and any(map(_is_number, y)):
            good[name] = entry
    return good


def _curve(name: str, evaluations: Sequence[Evaluation]) -> Figure | None:
    having = [one for one in evaluations if name in _curves(one)][-MOST_CURVES:]
    series, words = [], []
    for one in having:
        entry = _curves(one)[name]
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
        over=str(_curves(having[-1])[name].get("x_label", "")) or " ",
        unit=str(_curves(having[-1])[name].get("y_label", "")),
        log=logarithmic(series),
        log_x=bool(_curves(having[-1])[name].get("log_x")),
    )


def _floats(values: Sequence[Any]) -> np.ndarray:
    return np.array([value if _is_number(value) else np.nan for value in values], float)


def _same_length(values: Any, others: Sequence[Any]) -> bool:
    return isinstance(values, list) and len(values) == len(others) and any(map(_is_number, values))
