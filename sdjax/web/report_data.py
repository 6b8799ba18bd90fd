"""What `sdjax.prepare` reported of the data that a run was trained on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from sdjax.system import paths, text_files
from sdjax.web.report_html import bars, esc, folded, table, tiles
from sdjax.web.report_run import Run

READING = ("reading", "decoding")  # steps of prepare whose losses are files that cannot be read


@dataclasses.dataclass(frozen=True)
class DataReport:
    """folder: of the data. found: its report.json. html: whether report.html is beside it."""

    folder: paths.Path
    found: Mapping[str, Any]
    html: bool

    @property
    def unreadable(self) -> tuple[int, int]:
        """Rows that could not be read or decoded, and all rows."""
        steps = self.found.get("steps", {})
        lost = sum(
            sum(steps[step].get("dropped", {}).values()) for step in READING if step in steps
        )
        return lost, int(self.found.get("read", 0))


def gather(run: Run) -> tuple[list[DataReport], list[str]]:
    """Of the folders that the configuration names, and what could not be read."""
    parts = run.field("data.mixture") or [run.field("data", {})]
    folders = [str(part.get("path") or "") for part in parts if isinstance(part, Mapping)]
    reports, problems = [], []
    for name in dict.fromkeys(folder for folder in folders if folder):
        try:
            folder = paths.to_path(name)
            file = folder / "report.json"
            if not file.exists():
                continue
            found = text_files.read_json(file)
            if not isinstance(found, dict) or "kept" not in found:
                raise ValueError("it is no report of sdjax.prepare")
            reports.append(DataReport(folder, found, (folder / "report.html").exists()))
        except paths.storage_errors(ValueError) as error:
            problems.append(f"{name}/report.json: {error}")
    return reports, problems


def show(report: DataReport, page: paths.Path) -> str:
    """Counts, what was dropped and why, and histograms of what is kept, as HTML."""
    found = report.found
    counts = [("rows read", found.get("read", 0)), ("kept", found["kept"])]
    counts += [(f"in {split}", size) for split, size in found.get("splits", {}).items()]
    changes = [
        (step, f"{sum(of['dropped'].values()):,}", _words(of["dropped"]), _words(of["changed"]))
        for step, of in found.get("steps", {}).items()
        if of["dropped"] or of["changed"]
    ]
    html = [f"<h3>{esc(report.folder)}</h3>"]
    html.append(tiles((name, f"{count:,}", "") for name, count in counts))
    if changes:
        head = ("step", "dropped", "for what reason", "changed in what is kept")
        html.append(table(head, changes, numbers=(1,)))
    else:
        html.append("<p>Nothing was dropped or changed.</p>")
    charts = "".join(
        f'<div class="card"><h4>{esc(name)}</h4>'
        + bars((f"{start:g}+", count) for start, count in bins)
        + "</div>"
        for name, bins in found.get("histograms", {}).items()
    )
    if charts:
        html.append(folded("What is kept, as histograms", f'<div class="grid">{charts}</div>'))
    html.append(_link(report, page))
    return "".join(html)


def _link(report: DataReport, page: paths.Path) -> str:
    """Where the whole report is, with examples of what was dropped."""
    if not report.html:
        return ""
    file = report.folder / "report.html"
    if paths.is_remote(file) or paths.is_remote(page):
        return f"<p>The whole data report: {esc(file)}</p>"
    relative = os.path.relpath(paths.absolute(file), paths.absolute(page).parent)
    return (
        f'<p><a href="{esc(quote(relative))}">The whole data report</a>, with examples of what was '
        "dropped.</p>"
    )


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {word}" for word, count in counts.items())
