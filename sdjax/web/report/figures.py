"""The figures of the curves, and the data from which the script of the page draws them."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from sdjax.web.report.metrics import Curve, Metrics, smooth, thin

POINTS = 2000  # of a curve
ALL_POINTS = 160_000  # of the page, which they make two megabytes larger
LEAST_POINTS = 200
NOISY = re.compile(
    r"train/(loss.*|grad_norm|update_norm|grad_norms/.*|update_ratios/.*|images_per_second|mfu|"
    r"data_wait)"
)
# What is no curve: counters that every line has, and facts of the data.
_LEFT_OUT = re.compile(r"train/(images_seen|epoch)|data/.*|validation/best(_step)?")


@dataclasses.dataclass(frozen=True)
class Series:
    """One line or row of points of a figure.

    name: in the legend. x, y: [n]. low, high: [n], ends of error bars or of a band.
    smoothed: drawn in the foreground while smoothing is on.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    smoothed: Curve | None = None

    @property
    def data(self) -> dict[str, Any]:
        """The series as the script of the page reads it."""
        found = {"name": self.name, "x": encode(self.x), "y": encode(self.y)}
        if self.low is not None and self.high is not None:
            found |= {"low": encode(self.low), "high": encode(self.high)}
        if self.smoothed is not None:
            found |= {"sx": encode(self.smoothed.steps), "sy": encode(self.smoothed.values)}
        return found


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot of the page.

    note: a sentence under the title. summary: what it shows, for those who cannot see it. over:
    "step", which the switch of the page turns into images seen, or the label of another axis.
    unit: label of the y axis. mode: "lines" or "markers". log: whether the y axis begins as
    logarithmic; None where it cannot be. log_x: whether the other one is.
    """

    title: str
    series: tuple[Series, ...]
    note: str = ""
    summary: str = ""
    over: str = "step"
    unit: str = ""
    mode: str = "lines"
    log: bool | None = None
    log_x: bool = False

    @property
    def data(self) -> dict[str, Any]:
        """The figure as the script of the page reads it."""
        return {
            "over": self.over, "unit": self.unit, "mode": self.mode, "log": bool(self.log),
            "logX": self.log_x, "series": [series.data for series in self.series],
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Section:
    """Figures under one heading."""

    title: str
    figures: tuple[Figure, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A figure to be: the metrics on it, and what the legend calls them."""

    title: str
    unit: str = ""
    note: str = ""
    names: dict[str, str] = dataclasses.field(default_factory=dict)


_GAP = "Validation loss, held-out against training examples"
_HELD, _SEEN = r"validation/([^/]+)", r"validation_train/([^/]+)"
# Heading, title, unit, note, {pattern of metrics: what the legend calls them}. A title with a group
# of the pattern is one figure for each of its texts. Each metric is on every figure that it fits;
# what fits none is under "Other".
_PLANS = (
    ("Loss", "Loss", "loss", "",
     {r"train/loss": "training", rf"{_HELD}/loss": r"validation, \1 weights"}),
    ("Loss", _GAP, "loss", "A gap that widens is overfitting.",
     {rf"{_HELD}/loss": r"validation, \1 weights",
      rf"{_SEEN}/loss": r"training examples, \1 weights"}),
    ("Loss", "Training loss by timestep", "loss",
     "Mean over the examples whose timestep fell in the range.", {r"train/loss_at/t?(.*)": r"\1"}),
    ("Loss", r"Validation loss by timestep, \1 weights", "loss", "",
     {rf"{_HELD}/loss_at/(.*)": r"\2"}),
    ("Loss", r"Loss of training examples by timestep, \1 weights", "loss", "",
     {rf"{_SEEN}/loss_at/(.*)": r"\2"}),
    ("Loss", "Training loss, unweighted", "loss", "", {r"train/loss_unweighted": "loss"}),
    ("Optimisation", "Learning rate", "learning rate", "",
     {r"train/learning_rate": "learning rate"}),
    ("Optimisation", "Gradient norm", "norm", "", {r"train/grad_norm": "gradient norm"}),
    ("Optimisation", "Update norm", "norm", "", {r"train/update_norm": "update norm"}),
    ("Optimisation", "Skipped steps and spikes", "count", "",
     {r"train/skipped_steps": "steps skipped so far",
      r"train/spikes": "spikes since the last line"}),
    ("Speed and memory", "Throughput", "images/s", "",
     {r"train/images_per_second": "images per second"}),
    ("Speed and memory", "Model FLOPs utilisation (MFU)", "share of peak", "",
     {r"train/mfu": "MFU"}),
    ("Speed and memory", "Waiting for data", "share of time", "",
     {r"train/data_wait": "data wait"}),
    ("Speed and memory", "Device memory", "GiB, of the fullest device", "",
     {r"device/memory_gib": "in use", r"device/memory_(.*)_gib": r"\1"}),
    ("Module groups", "Update to weight ratio", "ratio",
     "Around 0.001 is usual; far more is unstable, far less learns nothing.",
     {r"train/update_ratios/(.*)": r"\1"}),
    ("Module groups", "Gradient norm by module", "norm", "", {r"train/grad_norms/(.*)": r"\1"}),
    ("Module groups", "Parameter norm by module", "norm", "", {r"train/param_norms/(.*)": r"\1"}),
    ("Other", "Prompt fidelity", "share right", "", {r"fidelity/(.*)": r"\1"}),
    ("Other", "Captions cut for their length", "count so far", "",
     {r"train/truncated_captions": "truncated"}),
)  # fmt: skip
# Metrics on no other figure. One that belongs to no group stands alone, for its scale is its own.
_OTHER = ("Other", r"\1\3", "", "", {r"((?:train/)?([^/]*))|(.*)/([^/]*)": r"\2\4"})


def sections(metrics: Metrics) -> list[Section]:
    """Return all curves of a run, each on one figure or more; none where there are no metrics."""
    planned = plan(metrics.curves)
    count = sum(len(one.names) for group in planned.values() for one in group)
    points = int(np.clip(ALL_POINTS // max(count, 1), LEAST_POINTS, POINTS))
    return [
        Section(title, tuple(_figure(one, metrics, points) for one in group))
        for title, group in planned.items()
    ]


def plan(metrics: Iterable[str]) -> dict[str, list[Plan]]:
    """Return the figures to draw under each heading, of the names of metrics."""
    every = list(metrics)
    names = [name for name in every if not _LEFT_OUT.fullmatch(name)]
    found: dict[tuple[str, str], Plan] = {}
    for row in (*_PLANS, _OTHER):
        if row is _OTHER:
            drawn = {name for one in found.values() for name in one.names}
            names = [name for name in names if name not in drawn]
        heading, title, unit, note, patterns = row
        for (pattern, label), name in itertools.product(patterns.items(), names):
            if match := re.fullmatch(pattern, name, re.DOTALL):
                full = match.expand(title)
                one = found.setdefault((heading, full), Plan(full, unit, note))
                one.names[name] = match.expand(label)
    if not any(re.fullmatch(f"{_SEEN}/loss", name) for name in every):
        found.pop(("Loss", _GAP), None)
    by_heading: dict[str, list[Plan]] = {}
    for (heading, _), one in found.items():
        by_heading.setdefault(heading, []).append(one)
    return by_heading


def _figure(plan: Plan, metrics: Metrics, points: int) -> Figure:
    series, longest, shown, width = [], 0, 0, 0.0
    for name, label in plan.names.items():
        curve = metrics.curves[name]
        small = thin(curve, points)
        smoothed = smooth(curve) if NOISY.fullmatch(name) else None
        if smoothed:
            width = max(width, smoothed[1])
        longest, shown = max(longest, len(curve.steps)), max(shown, len(small.steps))
        series.append(
            Series(label, small.steps, small.values, smoothed=smoothed[0] if smoothed else None)
        )
    notes = [plan.note] if plan.note else []
    if shown < longest:
        notes.append(
            f"Thinned from {longest:,} to {shown:,} points a curve, keeping the least and the "
            "greatest of each stretch."
        )
    if width:
        notes.append(f"Smooth: a Gaussian mean, deviation {width:,.0f} steps.")
    return Figure(
        title=plan.title,
        series=tuple(series),
        note=" ".join(notes),
        summary=_summary(plan, metrics),
        unit=plan.unit,
        log=logarithmic(series),
    )


def logarithmic(series: Iterable[Series]) -> bool | None:
    """Whether a logarithmic axis suits curves: over two decades. None if not all are above 0."""
    values = np.concatenate([one.y[np.isfinite(one.y)] for one in series])
    if not len(values) or values.min() <= 0:
        return None
    return bool(values.max() > 100 * values.min())


def _summary(plan: Plan, metrics: Metrics) -> str:
    """Return the figure in words: where its first curves begin, end, and are least."""
    words = [f"Line plot of {plan.title} over training steps, {len(plan.names)} curve(s)."]
    for name, label in list(plan.names.items())[:4]:
        curve = metrics.curves[name].finite
        low = int(curve.values.argmin())
        words.append(
            f"{label}: {curve.values[0]:.4g} at step {curve.steps[0]}, {curve.values[-1]:.4g} at "
            f"step {curve.steps[-1]}, least {curve.values[low]:.4g} at step {curve.steps[low]}."
        )
    return " ".join(words)


def images_seen(metrics: Metrics, batch_size: int | None) -> tuple[list[float], list[float]]:
    """Return steps, and the images seen by then, between which the page's other x axis lies.

    Empty where neither the metrics nor the configuration tell.
    """
    curve = metrics.get("train/images_seen")
    if curve:
        curve = thin(curve, LEAST_POINTS)  # straight but for changes of the batch size
        return [0.0, *curve.steps.tolist()], [0.0, *curve.values.tolist()]
    if not batch_size:
        return [], []
    last = max(metrics.last_step, 1)
    return [0.0, float(last)], [0.0, float(last * batch_size)]


def encode(values: np.ndarray) -> dict[str, str]:
    """Return {"type": "f4" or "f8", "data": base64} of numbers [n], as little-endian floats.

    They take a third of their length as text; float64 where float32 would not tell one step from
    the next.
    """
    values = np.asarray(values)
    whole = values.dtype.kind in "iu"
    kind = "f8" if whole and len(values) and abs(values).max() > 2**24 else "f4"
    with np.errstate(over="ignore"):
        data = values.astype("<" + kind).tobytes()
    return {"type": kind, "data": base64.b64encode(data).decode()}
