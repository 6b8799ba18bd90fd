"""The pieces of HTML that the report is made of. What comes from files is escaped in here."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import importlib.resources
import json
from collections.abc import Iterable, Sequence
from typing import Any

from sdjax.web.report_figures import Figure
from sdjax.web.report_pictures import Picture


def esc(value: object) -> str:
    """Text for an element or a quoted attribute."""
    return html.escape(str(value), quote=True)


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and texts; they stand below one another on a narrow screen."""
    cells = "".join(
        f'<tr><th scope="row">{esc(name)}</th><td>{esc(text)}</td></tr>' for name, text in rows
    )
    return f'<table class="facts"><tbody>{cells}</tbody></table>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()
) -> str:
    """Scrolls by itself where it is too wide; `numbers` are columns set to the right."""
    marks = ['class="number"' if i in numbers else "" for i in range(len(head))]
    top = "".join(
        f'<th scope="col" {mark}>{esc(text)}</th>' for mark, text in zip(marks, head, strict=True)
    )
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    body = "".join(
        "<tr>"
        + "".join(f"<td {mark}>{esc(text)}</td>" for mark, text in zip(marks, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll" tabindex="0"><table>{top}<tbody>{body}</tbody></table></div>'


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """(name, value, small print) each in a box."""
    boxes = "".join(
        f'<div class="card tile"><dt>{esc(name)}</dt><dd>{esc(value)}'
        + (f"<small>{esc(small)}</small>" if small else "")
        + "</dd></div>"
        for name, value, small in entries
    )
    return f'<dl class="tiles">{boxes}</dl>'


def folded(title: str, inside: str) -> str:
    """Opened by a click; `inside` is HTML."""
    return f"<details><summary>{esc(title)}</summary>{inside}</details>"


def text_block(text: str, key: str) -> str:
    """Text as it is, with a button that copies it."""
    return (
        f'<pre id="{esc(key)}" tabindex="0">{esc(text)}</pre>'
        f'<button type="button" class="copy" data-of="{esc(key)}">Copy</button>'
    )


def picture(found: Picture, alt: str, caption: str = "") -> str:
    """A figure with a picture that is inside the page."""
    width, height = found.size
    below = f"<figcaption>{esc(caption)}</figcaption>" if caption else ""
    return (
        f'<img src="{found.uri}" width="{width}" height="{height}" alt="{esc(alt)}" '
        f'decoding="async">{below}'
    )


def plot(figure: Figure, number: int) -> str:
    """The place of a figure; the script of the page draws the `number`-th of its data there."""
    legend = "".join(
        '<button type="button" aria-pressed="true"><svg width="20" height="8" aria-hidden="true">'
        '<line x1="0" y1="4" x2="20" y2="4" stroke-width="3"/></svg>'
        f"{esc(series.name)}</button>"
        for series in figure.series
    )
    log = ""
    if figure.log is not None:
        log = (
            f'<button type="button" class="log" aria-pressed="{str(figure.log).lower()}" '
            f'aria-label="logarithmic axis: {esc(figure.title)}">log</button>'
        )
    note = f'<p class="note">{esc(figure.note)}</p>' if figure.note else ""
    summary = esc(figure.summary or figure.title)
    return (
        f'<section class="card plot-card" id="figure-{number}"><div class="plot-head">'
        f"<h4>{esc(figure.title)}</h4>{log}</div>{note}"
        f'<div class="plot" role="img" aria-label="{summary}"></div>'
        f'<div class="legend" role="group" aria-label="curves to show">{legend}</div></section>'
    )


def bars(bins: Iterable[tuple[str, int]]) -> str:
    """A histogram as a table of counts with bars."""
    rows = list(bins)
    most = max((count for _, count in rows), default=0) or 1
    cells = "".join(
        f'<tr><td>{esc(name)}</td><td class="number">{count:,}</td><td><div class="bar">'
        f'<span style="width:{100 * count / most:.1f}%"></span></div></td></tr>'
        for name, count in rows
    )
    return f'<div class="scroll"><table class="histogram"><tbody>{cells}</tbody></table></div>'


def _asset(name: str) -> str:
    return importlib.resources.files("sdjax.web").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _scripts() -> tuple[tuple[str, str], ...]:
    """(text, its hash for the content security policy) of Plotly and of the page's own script."""
    from plotly.offline import get_plotlyjs

    texts = (get_plotlyjs(), _asset("report.js"))
    return tuple(
        (text, base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()) for text in texts
    )


def document(title: str, body: str, figures: Any) -> str:
    """The whole page.

    Its policy lets nothing be loaded from anywhere, and runs the two scripts of its own alone: text
    that slipped through the escaping would stay text.
    """
    scripts = _scripts()
    allowed = " ".join(f"'sha256-{digest}'" for _, digest in scripts)
    policy = (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {allowed}; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(figures, separators=(",", ":")).replace("<", "\\u003c")
    run = "".join(f"<script>{text}</script>\n" for text, _ in scripts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{esc(title)}</title>\n<style>{_asset('report.css')}</style></head>\n"
        f'<body>{body}\n<script type="application/json" id="figures">{data}</script>\n'
        f"{run}</body></html>\n"
    )
