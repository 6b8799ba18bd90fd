"""report.html: all that the files of a workdir say of a run, in one page that needs no network."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from sdjax.system import paths
from sdjax.train.hooks import REPORT_FILE
from sdjax.web import templating
from sdjax.web.report import data, evaluations, pictures
from sdjax.web.report.contents import Contents
from sdjax.web.report.metrics import EMPTY, read_metrics
from sdjax.web.report.run import Run, Sizes, read_run

T = TypeVar("T")
# Macros of chapters.html; one that writes nothing is left out.
CHAPTERS = ("warnings", "curves", "pictures", "metrics", "speed_and_memory", "data", "recipe")


def write_report(workdir: paths.PathLike, output: paths.PathLike | None = None) -> paths.Path:
    """Write the report of a run, as far as its files go, and return the path of the page.

    A file that is missing leaves out its part; one that cannot be read is named among the
    warnings. Nothing is trained, drawn or restored for it.

    Args:
        workdir: of the run, which may still be going on; a folder or gs://BUCKET/FOLDER.
        output: the file to write, WORKDIR/report.html by default.

    Raises:
        OSError: the page cannot be written.
    """
    folder = paths.to_path(workdir)
    page = paths.to_path(output) if output is not None else folder / REPORT_FILE
    # JSON may hold halves of letters, which no text file can.
    paths.write_text(page, render(gather(folder, page)).encode("utf-8", "replace").decode("utf-8"))
    return page


def gather(folder: paths.Path, page: paths.Path) -> Contents:
    """Read every part; each that fails becomes a line of `problems`."""
    problems: list[str] = []

    def part(name: str, read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        # Whatever is wrong with a file, a run that has been training for days shall not end of it.
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
            return otherwise

    nothing = Run(folder, {}, Sizes({}, {}, {}), ())
    run = part("config.json and checkpoints", lambda: read_run(folder), nothing)
    metrics = part("metrics.jsonl", lambda: read_metrics(folder), EMPTY)
    gallery = part("samples", lambda: pictures.gather(folder), pictures.EMPTY)
    none: tuple[list[Any], list[str]] = ([], [])
    judged, bad = part("evaluations", lambda: evaluations.gather(folder), none)
    reports, bad_reports = part("data report", lambda: data.gather(run), none)
    problems += [*bad, *bad_reports, *(f"samples/{name}" for name in gallery.unreadable)]
    return Contents(page, run, metrics, gallery, judged, reports, problems)


def render(contents: Contents) -> str:
    """Return the page as HTML."""
    templates = templating.environment()
    chapters: Any = templates.get_template("chapters.html").module

    def write(name: str) -> str:
        """A chapter; where a file has what nobody foresaw, a line in its place."""
        try:
            return getattr(chapters, name)(contents)
        except Exception as error:  # see `gather`
            text = f"{type(error).__name__}: {error}"
            title = name.replace("_", " ").capitalize()
            contents.problems.append(f"what the chapter {title} is made of: {text}")
            return chapters.failed(text)

    # The warnings, which the page shows first, are the last: they name what failed before.
    written = {name: write(name) for name in ("numbers", *CHAPTERS[1:], CHAPTERS[0])}
    return templates.get_template("report.html").render(
        contents=contents,
        numbers=written["numbers"],
        chapters={name: written[name] for name in CHAPTERS if written[name].strip()},
        now=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=templating.asset("report.css"),
        scripts=_scripts(),
        policy=templating.policy(_scripts()),
    )


@functools.cache
def _scripts() -> tuple[str, str]:
    """Plotly and the page's own script."""
    own = templating.asset("figures.js") + templating.asset("report.js")
    return templating.script_of_plots(), own
