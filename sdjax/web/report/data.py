"""The reports of `sdjax.prepare` on the data of a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from sdjax.system import paths, text_files
from sdjax.web.report.run import Run

READING = ("reading", "decoding")  # steps of prepare whose losses are files that cannot be read


@dataclasses.dataclass(frozen=True)
class DataReport:
    """The report on one folder.

    folder: of the data. found: its report.json. html: whether report.html is beside it.
    """

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

    def counts(self) -> list[tuple[str, str, str]]:
        """Rows that were read, that are kept, and that each split has, as tiles."""
        splits = {f"in {split}": size for split, size in self.found.get("splits", {}).items()}
        counts = {"rows read": self.found.get("read", 0), "kept": self.found["kept"], **splits}
        return [(name, f"{count:,}", "") for name, count in counts.items()]

    def changes(self) -> list[tuple[str, str, str, str]]:
        """(step, examples that it dropped, reasons, changes in what is kept) of steps with any."""
        return [
            (step, f"{sum(of['dropped'].values()):,}", _words(of["dropped"]), _words(of["changed"]))
            for step, of in self.found.get("steps", {}).items()
            if of["dropped"] or of["changed"]
        ]

    def histograms(self) -> list[tuple[str, list[tuple[str, str, str]]]]:
        """(name, bins) of what is kept; a bin is its label, its count and its percent of the
        greatest."""
        found = []
        for name, bins in self.found.get("histograms", {}).items():
            most = max((count for _, count in bins), default=0) or 1
            rows = [(f"{a:g}+", f"{count:,}", f"{100 * count / most:.1f}") for a, count in bins]
            found.append((name, rows))
        return found

    def address(self, page: paths.Path) -> str:
        """Return the URL of report.html relative to a page; "" if one of them is in a bucket."""
        file = self.folder / "report.html"
        if paths.is_remote(file) or paths.is_remote(page):
            return ""
        return quote(os.path.relpath(paths.absolute(file), paths.absolute(page).parent))


def gather(run: Run) -> tuple[list[DataReport], list[str]]:
    """Return the reports in the folders that the configuration names, and what cannot be read."""
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


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {word}" for word, count in counts.items())
