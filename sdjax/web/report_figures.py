"""Which curves the report draws, and what the script of the page gets to draw them from."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.web.report_metrics import Curve, Metrics, smooth, thin

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


@dataclasses.dataclass(frozen=True)
class Section:
    """Figures under one heading."""

    title: str
    figures: tuple[Figure, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A figure to be: the metrics on it, and what the legend calls them."""

    title: str
    names: Mapping[str, str]
    unit: str = ""
    note: str = ""


def sections(metrics: Metrics) -> list[Section]:
    """All curves of a run, each on one figure; empty where there are none."""
    plans = _plans(metrics)
    count = sum(len(plan.names) for _, group in plans for plan in group)
    points = int(np.clip(ALL_POINTS // max(count, 1), LEAST_POINTS, POINTS))
    found = []
    for title, group in plans:
        figures = tuple(_figure(plan, metrics, points) for plan in group)
        found.append(Section(title, figures))
    return found


def _plans(metrics: Metrics) -> list[tuple[str, list[Plan]]]:
    """Headings with the figures to draw. What no figure knows gets one of its own, at the end."""
    rest = [name for name in metrics.curves if not _LEFT_OUT.fullmatch(name)]

    def take(pattern: str, label: str = r"\1") -> dict[str, str]:
        """Names that match, out of the rest, with what the legend calls them."""
        matches = {name: found for name in rest if (found := re.fullmatch(pattern, name))}
        rest[:] = [name for name in rest if name not in matches]
        return {name: found.expand(label) for name, found in matches.items()}

    strata = _strata(take)
    held = take(r"validation/([^/]+)/loss", r"validation, \1 weights")
    seen = take(r"validation_train/([^/]+)/loss", r"training examples, \1 weights")
    loss = take(r"train/(loss)", "training")
    gap = Plan("Validation loss, held-out against training examples", held | seen, "loss",
               "A gap that widens is overfitting.")  # fmt: skip
    groups = [
        Plan("Loss", loss | held, "loss"),
        *([gap] if seen else []),
        Plan("Training loss by timestep", take("train/loss_at/t?(.*)"), "loss",
             "Mean over the examples whose timestep fell in the range."),
        *strata,
        Plan("Training loss, unweighted", take("train/(loss)_unweighted"), "loss"),
    ]  # fmt: skip
    optimisation = [
        Plan("Learning rate", take(r"train/(learning_rate)", "learning rate"), "learning rate"),
        Plan("Gradient norm", take(r"train/(grad_norm)", "gradient norm"), "norm"),
        Plan("Update norm", take(r"train/(update_norm)", "update norm"), "norm"),
        Plan("Skipped steps and spikes",
             take("train/(skipped_steps)", "steps skipped so far")
             | take("train/(spikes)", "spikes since the last line"), "count"),
    ]  # fmt: skip
    speed = [
        Plan("Throughput", take("train/(images_per_second)", "images per second"), "images/s"),
        Plan("Model FLOPs utilisation (MFU)", take("train/(mfu)", "MFU"), "share of peak"),
        Plan("Waiting for data", take("train/(data_wait)", "data wait"), "share of time"),
        Plan(
            "Device memory",
            take("device/memory_gib", "in use") | take("device/memory_(.*)_gib"),
            "GiB, of the fullest device",
        ),
    ]
    modules = [
        Plan("Update to weight ratio", take("train/update_ratios/(.*)"), "ratio",
             "Around 0.001 is usual; far more is unstable, far less learns nothing."),
        Plan("Gradient norm by module", take("train/grad_norms/(.*)"), "norm"),
        Plan("Parameter norm by module", take("train/param_norms/(.*)"), "norm"),
    ]  # fmt: skip
    fidelity = [
        Plan("Prompt fidelity", take("fidelity/(.*)"), "share right"),
        Plan("Captions cut for their length", take("train/(truncated)_captions"), "count so far"),
    ]
    titled = [
        ("Loss", groups), ("Optimisation", optimisation), ("Speed and memory", speed),
        ("Module groups", modules), ("Other", fidelity + _others(rest)),
    ]  # fmt: skip
    kept = [(title, [plan for plan in plans if plan.names]) for title, plans in titled]
    return [(title, plans) for title, plans in kept if plans]


def _strata(take: Any) -> list[Plan]:
    """A figure for each set of weights: the validation loss at the fixed timesteps."""
    plans = []
    kinds = {"validation": "Validation loss", "validation_train": "Loss of training examples"}
    for prefix, title in kinds.items():
        found = take(rf"({prefix}/[^/]+/loss_at/.*)")
        for weights in dict.fromkeys(name.split("/")[1] for name in found):
            start = f"{prefix}/{weights}/loss_at/"
            names = {name: name.removeprefix(start) for name in found if name.startswith(start)}
            plans.append(Plan(f"{title} by timestep, {weights} weights", names, "loss"))
    return plans


def _others(rest: Iterable[str]) -> list[Plan]:
    """What no figure above knows, together where the names share all but their last part; what
    belongs to no group stands alone, for its scale is its own."""
    families: dict[str, dict[str, str]] = {}
    for name in rest:
        family, _, last = name.rpartition("/")
        alone = family in ("", "train")
        families.setdefault(name if alone else family, {})[name] = last
    return [Plan(title, names) for title, names in families.items()]


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
    """Whether a logarithmic axis suits them: over two decades. None if not all are above 0."""
    values = np.concatenate([one.y[np.isfinite(one.y)] for one in series])
    if not len(values) or values.min() <= 0:
        return None
    return bool(values.max() > 100 * values.min())


def _summary(plan: Plan, metrics: Metrics) -> str:
    """The figure in words: where its first curves begin, end, and are least."""
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
    """Steps and images seen by then, between which the page interpolates: for its other x axis.

    Empty where neither the metrics nor the configuration tell.
    """
    curve = metrics.get("train/images_seen")
    if curve is not None and len(curve.steps):
        curve = thin(curve, LEAST_POINTS)  # straight but for changes of the batch size
        return [0.0, *curve.steps.tolist()], [0.0, *curve.values.tolist()]
    if not batch_size:
        return [], []
    last = max(metrics.last_step, 1)
    return [0.0, float(last)], [0.0, float(last * batch_size)]


def to_json(
    figures: Sequence[Figure], seen: tuple[Sequence[float], Sequence[float]] = ((), ())
) -> dict[str, Any]:
    """What the script of the page reads. Numbers are little-endian float32 in base64, a third of
    their length as text (float64 where float32 would not tell one step from the next)."""
    return {
        "seen": {"steps": list(seen[0]), "images": list(seen[1])},
        "figures": [
            {
                "over": figure.over,
                "unit": figure.unit,
                "mode": figure.mode,
                "log": bool(figure.log),
                "logX": figure.log_x,
                "series": [_series(series) for series in figure.series],
            }
            for figure in figures
        ],
    }


def _series(series: Series) -> dict[str, Any]:
    found = {"name": series.name, "x": encode(series.x), "y": encode(series.y)}
    if series.low is not None and series.high is not None:
        found |= {"low": encode(series.low), "high": encode(series.high)}
    if series.smoothed is not None:
        found |= {"sx": encode(series.smoothed.steps), "sy": encode(series.smoothed.values)}
    return found


def encode(values: np.ndarray) -> dict[str, str]:
    """{"type": "f4" or "f8", "data": base64} of numbers [n]."""
    values = np.asarray(values)
    whole = values.dtype.kind in "iu"
    kind = "f8" if whole and len(values) and abs(values).max() > 2**24 else "f4"
    with np.errstate(over="ignore"):
        data = values.astype("<" + kind).tobytes()
    return {"type": kind, "data": base64.b64encode(data).decode()}
