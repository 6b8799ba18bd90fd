"""The output of an evaluation: metrics.json, a table on the terminal, plots and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.evaluation import losses
from sdjax.evaluation.evaluation import Inputs, Results
from sdjax.evaluation.metrics.bootstrap import Estimate
from sdjax.sampling.grids import grid, save_png
from sdjax.system import paths

FILE = "metrics.json"
SHOWN = 36  # pictures of grid.png
PAIRS = 12  # pairs of nearest.png
COLOUR = "#4878a8"


def write(
    folder: paths.Path, about: Mapping[str, Any], inputs: Inputs, results: Results
) -> paths.Path:
    """Write metrics.json and the pictures beside it; return the path of metrics.json.

    Args:
        about: the model, the dataset and the settings: the first fields of the file.

    Raises:
        WriteError: a file cannot be written.
    """
    content = {
        **about,
        "metrics": {name: jsonable(found) for name, found in results.metrics.items()},
        "curves": dict(results.curves),
        "warnings": list(results.warnings),
    }
    if results.nearest is not None:
        content["nearest"] = [
            {"picture": i, "training": j, "distance": d} for i, j, d in results.nearest.pairs
        ]
    write_sheets(folder, inputs, results)
    write_plots(folder, results)
    if results.examples is not None:
        losses.write(folder, results.examples)
    # Last, so that the evaluation is complete once this file exists.
    file = folder / FILE
    paths.write_text(file, json.dumps(_finite(content), indent=2) + "\n")
    return file


def jsonable(estimate: Estimate) -> dict[str, Any]:
    """The fields of an estimate in metrics.json."""
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "higher_is_better": estimate.higher_is_better,
        "count": estimate.count,
        **estimate.details,
    }


def _finite(content: Any) -> Any:
    """The content with null for NaN and infinity, which JSON lacks."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_sheets(folder: paths.Path, inputs: Inputs, results: Results) -> None:
    """Write grid.png of the first pictures, and nearest.png of generated beside training ones."""
    pictures = inputs.pictures
    if pictures is None:
        return
    count = min(SHOWN, len(pictures))
    captions = list(inputs.captions or ())[:count]
    save_png(folder / "grid.png", grid(pictures.read(0, count), captions))
    if results.nearest is not None and inputs.train is not None:
        images, texts = [], []
        for i, j, distance in results.nearest.pairs[:PAIRS]:
            images += [pictures.read(i, i + 1)[0], inputs.train.read(j, j + 1)[0]]
            texts += [f"picture {i}, distance {distance:.3g}", f"training {j}"]
        save_png(folder / "nearest.png", grid(np.stack(images), texts, columns=6))


def write_plots(folder: paths.Path, results: Results) -> None:
    """Write metrics.png of all metrics with their intervals, and NAME.png of each curve."""
    from matplotlib.figure import Figure

    shares = {name: found for name, found in results.metrics.items() if _is_share(name)}
    others = {name: found for name, found in results.metrics.items() if name not in shares}
    if results.metrics:
        # Shares side by side on one axis from 0 to 1, and a panel for each other metric.
        tall = 0.3 * len(shares) + 1.1 if shares else 0.0
        rows = -(-len(others) // 4)
        figure = Figure(figsize=(9, tall + 2.4 * rows), layout="constrained")
        parts = [part for part in (tall, 2.4 * rows) if part]
        frames = list(figure.subfigures(len(parts), 1, height_ratios=parts, squeeze=False).flat)
        if shares:
            _share_bars(frames.pop(0).subplots(), shares)
        if others:
            axes = list(frames.pop(0).subplots(rows, 4, squeeze=False).flat)
            for axis, name in zip(axes, others, strict=False):
                _bar(axis, name, others[name])
            for axis in axes[len(others) :]:
                axis.set_axis_off()
        _save(figure, folder / "metrics.png")
    for name, curve in results.curves.items():
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        _curve(figure.subplots(), name, curve)
        _save(figure, folder / f"{name}.png")


def _is_share(name: str) -> bool:
    return name in ("precision", "recall", "coverage", "memorised") or name.startswith("fidelity_")


def _label(name: str, found: Estimate) -> str:
    better = {True: " \N{UPWARDS ARROW}", False: " \N{DOWNWARDS ARROW}", None: ""}
    return name.replace("_", " ") + better[found.higher_is_better]


def _ends(found: Estimate) -> list[list[float]] | None:
    """The lengths of the whiskers; the ends are not always on both sides of the value."""
    if found.low is None or found.high is None:
        return None
    return [[max(found.value - found.low, 0)], [max(found.high - found.value, 0)]]


def _share_bars(axis: Any, shares: Mapping[str, Estimate]) -> None:
    names = list(shares)
    for row, name in enumerate(names):
        found = shares[name]
        axis.barh([row], [found.value], xerr=_ends(found), color=COLOUR, capsize=4, height=0.6)
        axis.text(1.01, row, number(found.value), va="center", fontsize=8)
    axis.set_yticks(range(len(names)), [_label(name, shares[name]) for name in names])
    axis.set_xlim(0, 1)
    axis.set_xlabel("share, with 95 % interval; the arrow says what is better", fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)


def _bar(axis: Any, name: str, found: Estimate) -> None:
    axis.bar([0], [found.value], yerr=_ends(found), width=0.5, color=COLOUR, capsize=8)
    axis.set_xlim(-0.7, 0.7)
    axis.set_xticks([0], [number(found.value)])
    axis.set_title(_label(name, found), fontsize=9)
    axis.tick_params(labelsize=8)


def _curve(axis: Any, name: str, curve: Mapping[str, Any]) -> None:
    axis.plot(curve["x"], curve["y"], marker="o", color=COLOUR)
    low, high = curve.get("low"), curve.get("high")
    if low and high and None not in (*low, *high):
        axis.fill_between(curve["x"], low, high, color=COLOUR, alpha=0.25, linewidth=0)
    axis.set_title(name.replace("_", " "), fontsize=11)
    axis.set_xlabel(curve.get("x_label", ""))
    axis.set_ylabel(curve.get("y_label", "").replace("_", " "))
    if curve.get("log_x"):
        axis.set_xscale("log")
        axis.set_xticks(curve["x"], [number(x) for x in curve["x"]], rotation=60, fontsize=8)
        axis.minorticks_off()
    axis.grid(alpha=0.3)


def _save(figure: Any, path: paths.Path) -> None:
    with paths.writing(path) as local:
        # Without the version of matplotlib in it, the same numbers give the same file.
        figure.savefig(local, format="png", dpi=110, metadata={"Software": None})


def number(value: float | None) -> str:
    """A number with four digits, whatever its size; "" for None."""
    return "" if value is None else f"{value:.4g}"


def table(title: str, results: Results) -> str:
    """The metrics as text for a terminal, with warnings below."""
    import io

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    view = Table()
    for heading in ("metric", "value", "95 % interval", "better", "of"):
        view.add_column(heading, justify="right" if heading == "value" else "left")
    for name, found in results.metrics.items():
        interval = "" if found.low is None else f"{number(found.low)} to {number(found.high)}"
        better = {True: "more", False: "less", None: ""}[found.higher_is_better]
        view.add_row(name, number(found.value), interval, better, str(found.count or ""))
    out = io.StringIO()
    console = Console(file=out, width=100)
    console.print(escape(title), highlight=False, soft_wrap=True)
    if results.metrics:
        console.print(view)
    for more in results.tables:
        console.print(more)
    for note in results.warnings:
        console.print(f"- {escape(note)}", highlight=False, soft_wrap=True)
    return out.getvalue().rstrip()
