"""The contents of the report: the numbers and texts with which its templates are filled."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Iterable

import numpy as np

from sdjax.system import paths
from sdjax.web.report import evaluations, figures, run, warnings
from sdjax.web.report.data import DataReport
from sdjax.web.report.evaluations import Evaluation
from sdjax.web.report.figures import Figure, Section
from sdjax.web.report.metrics import Metrics
from sdjax.web.report.pictures import Gallery
from sdjax.web.report.run import Run

Rows = list[tuple[str, ...]]
# (label, metric, format, which of its values is the best)
_SPEED = (
    ("images per second", "train/images_per_second", "{:,.1f}", max),
    ("MFU", "train/mfu", "{:.1%}", max),
    ("waiting for data", "train/data_wait", "{:.2%}", min),
    ("device memory in use, GiB", "device/memory_gib", "{:.2f}", min),
    ("device memory, peak, GiB", "device/memory_peak_gib", "{:.2f}", min),
    ("device memory, limit, GiB", "device/memory_limit_gib", "{:.2f}", min),
)


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything read of a workdir, and what the page shows of it.

    page: the file to write. problems: what could not be read or shown; it grows until the warnings
    are asked for. What strangers' files may make fail is a method: Jinja2 takes the AttributeError
    of a property for a name that is not there.
    """

    page: paths.Path
    run: Run
    metrics: Metrics
    gallery: Gallery
    evaluations: list[Evaluation]
    data: list[DataReport]
    problems: list[str]

    @property
    def name(self) -> str:
        """The name of the workdir."""
        return paths.absolute(self.run.workdir).name

    def tiles(self) -> Rows:
        """The numbers that one looks for first, as (name, value, small print)."""
        done, total = self.metrics.last_step, self.run.field("train.steps", 0)
        rows: Rows = [("Steps", f"{done:,}", f"of {total:,}, {done / total:.0%}" if total else "")]
        rows += self._last("Images seen", "train/images_seen", "{:,.0f}")
        rows += self._last("Training loss", "train/loss", "{:.4g}")
        best, mode = self.run.best
        curve = self.metrics.get(best)
        if curve:
            at = int(curve.values.argmin() if mode == "min" else curve.values.argmax())
            small = f"best {curve.values[at]:.4g} at step {curve.steps[at]:,}"
            label = "Validation loss" if best.endswith("/loss") else best
            rows += self._last(label, best, "{:.4g}", small)
        rows += self._last("Images per second", "train/images_per_second", "{:,.1f}")
        rows += self._last("MFU", "train/mfu", "{:.1%}")
        sizes = self.run.sizes
        trained, frozen = sum(sizes.trained.values()), sum(sizes.frozen.values())
        if trained:
            small = f"and {run.count(frozen)} frozen" if frozen else ""
            rows.append(("Parameters trained", run.count(trained), small))
        for newest in self.evaluations[-1:]:
            for name, entry in list(newest.metrics.items())[:2]:
                rows.append((name, f"{entry['value']:.4g}", evaluations.interval(entry)))
        return rows

    def _last(self, label: str, name: str, form: str, small: str = "") -> Rows:
        """A tile with the newest value of a metric; none where there is no such metric."""
        curve = self.metrics.get(name)
        return [(label, form.format(curve.last), small)] if curve else []

    def warnings(self) -> list[warnings.Warning]:
        """The warnings, the worst first."""
        return warnings.find(self.run, self.metrics, self.evaluations, self.data, self.problems)

    def images_seen(self) -> tuple[list[float], list[float]]:
        """Steps, and the images seen by then; empty where neither file says."""
        batch = self.run.field("data.batch_size")
        good = isinstance(batch, int) and 0 < batch < 2**31
        return figures.images_seen(self.metrics, batch if good else None)

    def curves(self) -> list[Section]:
        """The figures of the run's metrics."""
        return figures.sections(self.metrics)

    def evaluation_figures(self) -> list[Figure]:
        """The figures of the evaluations."""
        return evaluations.figures(self.evaluations)

    def title(self, kind: str) -> str:
        """Return the words for a kind of grid: `raw-unguided`; "" is what the run exports."""
        if kind:
            weights, _, guided = kind.rpartition("-")
            return f"{weights} weights, {guided}" if weights else f"{kind} weights"
        weights = (self.run.field("ema.profiles") or ["raw"])[0]
        guided = self.run.field("method.name") != "autoencoder"
        guided = guided and self.run.field("objective.caption_dropout") != 1
        return f"{weights} weights" + (", guided" if guided else "")

    def speed(self) -> Rows:
        """(label, median, best, last) of speed and memory."""
        rows: Rows = []
        for label, name, form, best in _SPEED:
            if curve := self.metrics.get(name):
                y = curve.values
                rows.append((label, *map(form.format, (np.median(y), best(y), y[-1]))))
        return rows

    def time_spent(self) -> str:
        """The time in training steps: images between two lines, over the speed that the second
        line says, summed. "" where it is not known."""
        seen = self.metrics.get("train/images_seen")
        speed = self.metrics.get("train/images_per_second")
        if not seen or not speed or len(speed.steps) < 2:
            return ""
        images = np.interp(speed.steps, seen.steps, seen.values)
        hours = float((np.diff(images) / np.maximum(speed.values[1:], 1e-9)).sum() / 3600)
        return (
            "" if not hours else f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.3g} minutes"
        )

    def state(self) -> Rows:
        """(part, numbers, GiB) of the train state."""
        names = {"params": "parameters that are trained", "opt_state": "optimizer"}
        state = self.run.sizes.state.items()
        sizes = {names.get(name, name): size for name, size in state if size > 99}
        if state:
            sizes["total"] = sum(sizes.values())
        return [(name, f"{size:,}", f"{4 * size / 2**30:.3f}") for name, size in sizes.items()]

    def counted(self) -> Rows:
        """(name, number) of what the run counted of its data when it began."""
        return [
            (name.removeprefix("data/").replace("_", " "), f"{curve.finite.values[-1]:,.6g}")
            for name, curve in self.metrics.curves.items()
            if name.startswith("data/")
        ]

    def summary(self) -> Iterable[tuple[str, str]]:
        """The facts of the run: networks, data, optimizer, ..., as (name, text)."""
        return run.summary(self.run, self.metrics)

    def recipe(self) -> str:
        """A recipe file that trains the run again."""
        return run.recipe(self.run)

    def own_folder(self) -> str:
        """The option that goes on with the run itself, for a shell."""
        return shlex.quote(f"--workdir={os.fspath(self.run.workdir)}")

    def config(self) -> str:
        """config.json."""
        return json.dumps(self.run.config, indent=2, ensure_ascii=False)

    def versions(self) -> str:
        """The packages that are installed where the report is written."""
        return ", ".join(f"{name} {version}" for name, version in run.versions().items())
