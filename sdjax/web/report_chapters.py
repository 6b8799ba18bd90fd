"""The chapters of the report: what each part of a run looks like on the page."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sdjax.system import paths, text_files
from sdjax.web import report_data, report_evaluations, report_figures, report_pictures, report_run
from sdjax.web import report_html as h
from sdjax.web.report_data import DataReport
from sdjax.web.report_evaluations import Evaluation
from sdjax.web.report_figures import Figure
from sdjax.web.report_metrics import Metrics
from sdjax.web.report_pictures import Gallery
from sdjax.web.report_run import Run
from sdjax.web.report_warnings import find


@dataclasses.dataclass
class Found:
    """Everything read of a workdir. figures: grows as the page is written, for its script."""

    page: paths.Path
    run: Run
    metrics: Metrics
    gallery: Gallery
    evaluations: list[Evaluation]
    data: list[DataReport]
    problems: list[str]
    figures: list[Figure] = dataclasses.field(default_factory=list)

    def plot(self, figure: Figure) -> str:
        """The place of a figure on the page."""
        self.figures.append(figure)
        return h.plot(figure, len(self.figures) - 1)


def warnings(found: Found) -> str:
    warnings = find(found.run, found.metrics, found.evaluations, found.data, found.problems)
    if not warnings:
        return "<p>None: no step was skipped, and nothing stands out.</p>"
    words = {"bad": "Problem", "warn": "Warning", "note": "Note"}
    items = "".join(
        f'<li class="{w.level}"><b>{words[w.level]}: {h.esc(w.title)}</b>{h.esc(w.remedy)}</li>'
        for w in warnings
    )
    return f'<ul class="warnings">{items}</ul>'


def curves(found: Found) -> str:
    sections = report_figures.sections(found.metrics)
    if not sections:
        return "<p>There are no metrics yet.</p>"
    axis = ""
    if report_figures.images_seen(found.metrics, found.run.field("data.batch_size"))[0]:
        axis = (
            "<fieldset><legend>Over</legend>"
            '<label><input type="radio" name="axis" value="step" checked>steps</label>'
            '<label><input type="radio" name="axis" value="images">images seen</label></fieldset>'
        )
    html = (
        '<p class="soft">Drag on a plot to zoom in, double-click to see all again; on a touch '
        "screen the buttons above a plot do it.</p>"
        f'<div class="controls">{axis}<label><input type="checkbox" id="smooth" checked>'
        "smooth</label></div>"
    )
    for section in sections:
        plots = "".join(found.plot(figure) for figure in section.figures)
        html += f'<h3>{h.esc(section.title)}</h3><div class="grid">{plots}</div>'
    return html


def pictures(found: Found) -> str:
    gallery = found.gallery
    if not gallery.rows and not gallery.strips:
        return ""
    html = ""
    if gallery.shown < gallery.found - len(gallery.unreadable):
        html += (
            f'<p class="soft">{gallery.shown} of {gallery.found} grids, spread over the steps; the '
            f"others are in {h.esc(found.run.workdir / 'samples')}.</p>"
        )
    sliders = "".join(_slider(row, _kind(found.run, row.kind)) for row in gallery.rows)
    html += f'<div class="grid">{sliders}</div>' if len(gallery.rows) > 1 else sliders
    for kind, strip in gallery.strips:
        title = _kind(found.run, kind)
        shown = h.picture(strip, f"The same prompts at one step after another, {title}")
        html += (
            f'<div class="card"><h3>Over time: {h.esc(title)}</h3>'
            f'<div class="scroll" tabindex="0">{shown}</div></div>'
        )
    return html


def _kind(run: Run, kind: str) -> str:
    """What the name of a grid says of it: `raw-unguided`; "" is what the run exports."""
    if kind:
        weights, _, guided = kind.rpartition("-")
        return f"{weights} weights, {guided}" if weights else f"{kind} weights"
    weights = (run.field("ema.profiles") or ["raw"])[0]
    guided = run.field("task") == "text_to_image" and run.field("objective.caption_dropout") != 1
    return f"{weights} weights" + (", guided" if guided else "")


def _slider(row: report_pictures.Row, title: str) -> str:
    figures = "".join(
        f'<figure data-step="{step}"{"" if step == row.steps[-1] else " hidden"}>'
        + h.picture(picture, f"Grid of pictures at step {step}, {title}")
        + "</figure>"
        for step, picture in zip(row.steps, row.pictures, strict=True)
    )
    prompts = [line for line in text_files.lines(row.pictures[-1].prompts) if line.strip()]
    listed = "".join(f"<li>{h.esc(line)}</li>" for line in prompts)
    below = h.folded(f"{len(prompts)} prompts", f'<ol class="prompts">{listed}</ol>')
    last = len(row.steps) - 1
    hidden = "" if last else " hidden"  # nothing to slide
    return (
        f'<div class="card gallery"><h3>{h.esc(title)}</h3><div class="controls"{hidden}>'
        '<button type="button" class="earlier" aria-label="earlier">&#8592;</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step of the '
        f'pictures, {h.esc(title)}">'
        '<button type="button" class="later" aria-label="later">&#8594;</button>'
        f'</div><p class="which soft" aria-live="polite">step {row.steps[-1]}</p>{figures}'
        + (below if prompts else "")
        + "</div>"
    )


def metrics(found: Found) -> str:
    if not found.evaluations:
        return ""
    figures = report_evaluations.figures(found.evaluations)
    plots = "".join(found.plot(figure) for figure in figures)
    html = f'<h3>Over the steps</h3><div class="grid">{plots}</div>' if plots else ""
    newest_first = list(reversed(found.evaluations))
    cards = [_evaluation(one, found.problems) for one in newest_first]
    html += cards[0]
    if len(cards) > 1:
        html += h.folded(f"{len(cards) - 1} earlier evaluation(s)", "".join(cards[1:]))
    return html


def _evaluation(one: Evaluation, problems: list[str]) -> str:
    html = f"<h3>{h.esc(one.name)}</h3>"
    head = ("metric", "value", "95 % interval", "better")
    html += h.table(head, report_evaluations.rows(one), numbers=(1, 2))
    try:
        for attribute, headings, rows in report_evaluations.audit_tables(one):
            html += f"<h4>Audit: {h.esc(attribute)}</h4>"
            html += h.table(headings, rows, numbers=range(1, len(headings)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problems.append(f"the audit of {one.name}: {type(error).__name__}: {error}")
    html += h.folded("How it was evaluated", h.facts(report_evaluations.settings(one)))
    if one.pictures:
        shown = "".join(
            f"<figure>{h.picture(p, f'{p.name} of {one.name}', p.name)}</figure>"
            for p in one.pictures
        )
        html += f'<div class="pictures">{shown}</div>'
    if one.pictures_left_out:
        html += (
            f'<p class="soft">{one.pictures_left_out} more picture(s) are in its folder, left out '
            "to keep this page small.</p>"
        )
    return f'<div class="card">{html}</div>'


def speed(found: Found) -> str:
    rows = [row for row in map(lambda spec: _speed_row(found.metrics, *spec), _SPEED) if row]
    html = ""
    if rows:
        head = ("", "median", "best", "last")
        html += h.table(head, rows, numbers=(1, 2, 3))
    spent = _hours(found.metrics)
    if spent:
        text = f"{spent:.3g} hours" if spent >= 1 else f"{60 * spent:.3g} minutes"
        html += f"<p>{text} of training steps, without compilation and pauses.</p>"
    state = found.run.sizes.state
    if state:
        names = {"params": "parameters that are trained", "opt_state": "optimizer"}
        sizes = {names.get(name, name): size for name, size in state.items() if size > 99}
        sizes["total"] = sum(sizes.values())
        parts = [(name, f"{size:,}", f"{4 * size / 2**30:.3f}") for name, size in sizes.items()]
        html += "<h3>The train state, as it is saved</h3>"
        html += h.table(("part", "numbers", "GiB in float32"), parts, numbers=(1, 2))
    return f'<div class="card">{html}</div>' if html else ""


_SPEED = (
    ("images per second", "train/images_per_second", "{:,.1f}", max),
    ("MFU", "train/mfu", "{:.1%}", max),
    ("waiting for data", "train/data_wait", "{:.2%}", min),
    ("device memory in use, GiB", "device/memory_gib", "{:.2f}", min),
    ("device memory, peak, GiB", "device/memory_peak_gib", "{:.2f}", min),
    ("device memory, limit, GiB", "device/memory_limit_gib", "{:.2f}", min),
)


def _speed_row(
    metrics: Metrics, label: str, name: str, form: str, best: Callable[[Any], Any]
) -> Sequence[str] | None:
    curve = metrics.get(name)
    if curve is None or not len(curve.values):
        return None
    numbers = (np.median(curve.values), best(curve.values), curve.values[-1])
    return (label, *(form.format(number) for number in numbers))


def _hours(metrics: Metrics) -> float:
    """Images between two lines, over the speed that the second tells, summed."""
    seen, speed = metrics.get("train/images_seen"), metrics.get("train/images_per_second")
    if seen is None or speed is None or len(speed.steps) < 2:
        return 0.0
    images = np.interp(speed.steps, seen.steps, seen.values)
    return float((np.diff(images) / np.maximum(speed.values[1:], 1e-9)).sum() / 3600)


def data(found: Found) -> str:
    """What the run counted when it began, and the reports of sdjax.prepare."""
    counted = [
        (name.removeprefix("data/").replace("_", " "), f"{curve.finite.values[-1]:,.6g}")
        for name, curve in found.metrics.curves.items()
        if name.startswith("data/")
    ]
    html = ""
    if counted:
        html = '<div class="card"><h3>What the run counted of it</h3>'
        html += h.table(("", ""), counted, numbers=(1,)) + "</div>"
    return html + "".join(
        f'<div class="card">{report_data.show(report, found.page)}</div>' for report in found.data
    )


def recipe(found: Found) -> str:
    html = f'<div class="card">{h.facts(report_run.summary(found.run, found.metrics))}</div>'
    if not found.run.config:
        return html + "<p>config.json is not there.</p>"
    workdir = os.fspath(found.run.workdir)
    command = "python -m sdjax.main --config=recipe.py --workdir=NEW_FOLDER"
    html += (
        '<div class="card"><h3>To train it again</h3><p>Save this as recipe.py, where the paths in '
        f"it hold, and run the command. To go on with this run, name its own folder, "
        f"<code>{h.esc(shlex.quote(f'--workdir={workdir}'))}</code>.</p>"
        + h.text_block(command, "command")
        + h.text_block(report_run.recipe(found.run), "recipe-file")
        + "</div>"
    )
    config = json.dumps(found.run.config, indent=2, ensure_ascii=False)
    folded = h.folded("config.json", h.text_block(config, "config"))
    return html + f'<div class="card">{folded}</div>'
