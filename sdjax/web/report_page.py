"""report.html: all that the files of a workdir tell of a run, in one page that needs no network."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import TypeVar

from sdjax.system import paths
from sdjax.train.hooks import REPORT_FILE
from sdjax.web import report_chapters as chapters
from sdjax.web import report_data, report_evaluations, report_figures, report_pictures, report_run
from sdjax.web import report_html as h
from sdjax.web.report_chapters import Found
from sdjax.web.report_data import DataReport
from sdjax.web.report_evaluations import Evaluation
from sdjax.web.report_metrics import EMPTY, read_metrics
from sdjax.web.report_pictures import Gallery
from sdjax.web.report_run import Run, Sizes

T = TypeVar("T")


def write_report(workdir: paths.PathLike, output: paths.PathLike | None = None) -> paths.Path:
    """Write the report of a run, as far as its files go, and give the path of the page.

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
    found = gather(folder, page)
    # JSON may hold halves of letters, which no text file can.
    paths.write_text(page, render(found).encode("utf-8", "replace").decode("utf-8"))
    return page


def gather(folder: paths.Path, page: paths.Path) -> Found:
    """Reads every part; what fails becomes a line of `problems`."""
    problems: list[str] = []

    def part(what: str, read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        # Whatever is wrong with a file, a run that has been training for days shall not end of it.
        except Exception as error:
            problems.append(f"{what}: {type(error).__name__}: {error}")
            return otherwise

    nothing = Run(folder, {}, Sizes({}, {}, {}), ())
    run = part("config.json and checkpoints", lambda: report_run.read_run(folder), nothing)
    metrics = part("metrics.jsonl", lambda: read_metrics(folder), EMPTY)
    gallery = part("samples", lambda: report_pictures.gather(folder), Gallery((), (), 0, ()))
    no_evaluations: tuple[list[Evaluation], list[str]] = ([], [])
    no_data: tuple[list[DataReport], list[str]] = ([], [])
    evaluations, bad = part(
        "evaluations", lambda: report_evaluations.gather(folder), no_evaluations
    )
    data, bad_data = part("data report", lambda: report_data.gather(run), no_data)
    problems += [*bad, *bad_data, *(f"samples/{name}" for name in gallery.unreadable)]
    return Found(page, run, metrics, gallery, evaluations, data, problems)


def render(found: Found) -> str:
    """The page."""
    parts: list[tuple[str, Callable[[Found], str]]] = [
        ("Curves", chapters.curves), ("Pictures", chapters.pictures),
        ("Metrics", chapters.metrics), ("Speed and memory", chapters.speed),
        ("Data", chapters.data), ("Recipe", chapters.recipe),
    ]  # fmt: skip
    tiles = _guarded(found, "Numbers", _tiles)
    written = {title: _guarded(found, title, write) for title, write in parts}
    # The last to be written, for it tells of what went wrong with the others.
    written = {"Warnings": _guarded(found, "Warnings", chapters.warnings), **written}
    shown = {title: text for title, text in written.items() if text}
    links = "".join(f'<li><a href="#{_slug(t)}">{h.esc(t)}</a></li>' for t in shown)
    sections = "".join(
        f'<section id="{_slug(title)}"><h2>{h.esc(title)}</h2>{text}</section>'
        for title, text in shown.items()
    )
    name = paths.absolute(found.run.workdir).name
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = (
        '<a class="skip" href="#content">To the content</a>'
        f"<header><h1>{h.esc(name)}</h1>"
        f'<p class="soft">{h.esc(found.run.workdir)}, as it was on {now}</p>'
        f"{tiles}</header>"
        f'<nav aria-label="Chapters"><ul>{links}</ul></nav>'
        f'<main id="content">{sections}'
        "<noscript><p>The curves and the slider over the pictures take JavaScript.</p></noscript>"
        f"</main><footer>{h.esc(_versions())}</footer>"
    )
    batch = found.run.field("data.batch_size")
    batch = batch if isinstance(batch, int) and 0 < batch < 2**31 else None
    seen = report_figures.images_seen(found.metrics, batch)
    return h.document(f"{name}: training report", body, report_figures.to_json(found.figures, seen))


def _guarded(found: Found, title: str, write: Callable[[Found], str]) -> str:
    """A chapter; if a file has what nobody foresaw, a line in its place."""
    before = len(found.figures)
    try:
        return write(found)
    except Exception as error:  # see `gather`
        del found.figures[before:]
        text = f"{type(error).__name__}: {error}"
        found.problems.append(f"what the chapter {title} is made of: {text}")
        return f"<p>This part could not be made: {h.esc(text)}</p>"


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _versions() -> str:
    packages = ", ".join(f"{name} {version}" for name, version in report_run.versions().items())
    return f"Written by sdjax.report. Versions installed where it was written: {packages}."


def _tiles(found: Found) -> str:
    """The numbers that one looks for first."""
    metrics, run = found.metrics, found.run
    done, total = metrics.last_step, run.field("train.steps", 0)
    entries = [("Steps", f"{done:,}", f"of {total:,}, {done / total:.0%}" if total else "")]

    def last(label: str, name: str, form: str, small: str = "") -> None:
        curve = metrics.get(name)
        if curve is not None and curve.last is not None:
            entries.append((label, form.format(curve.last), small))

    last("Images seen", "train/images_seen", "{:,.0f}")
    last("Training loss", "train/loss", "{:.4g}")
    best, mode = run.best
    curve = metrics.get(best)
    if curve is not None and len(curve.values):
        at = int(curve.values.argmin() if mode == "min" else curve.values.argmax())
        small = f"best {curve.values[at]:.4g} at step {curve.steps[at]:,}"
        label = "Validation loss" if best.endswith("/loss") else best
        entries.append((label, f"{curve.last:.4g}", small))
    last("Images per second", "train/images_per_second", "{:,.1f}")
    last("MFU", "train/mfu", "{:.1%}")
    trained = sum(run.sizes.trained.values())
    if trained:
        frozen = sum(run.sizes.frozen.values())
        small = f"and {report_run.count(frozen)} frozen" if frozen else ""
        entries.append(("Parameters trained", report_run.count(trained), small))
    if found.evaluations:
        newest = found.evaluations[-1]
        for name, entry in list(newest.metrics.items())[:2]:
            small = report_evaluations.interval(entry)
            entries.append((name, f"{entry['value']:.4g}", small))
    return h.tiles(entries)
