"""The report of a run in JSON and HTML: counts of rows read, kept and left out; dropped.jsonl."""

from __future__ import annotations

import html
import json
from collections import Counter
from typing import Any

import numpy as np

from sdjax.data.prepare import cleaning
from sdjax.data.prepare.duplicates import EXACT, NEAR, position
from sdjax.data.prepare.index import Index, IndexEntry
from sdjax.data.prepare.settings import Settings, Workspace
from sdjax.data.prepare.writing import Output, stored
from sdjax.data.raw.rows import Survey
from sdjax.system import paths

JSON, HTML, DROPPED = "report.json", "report.html", "dropped.jsonl"
# The reasons for dropping and the changes of each step, in the order of the work.
STEPS = {
    "reading": ("bad_shard", "bad_json", "bad_record", "no_file_name", "unsafe_path",
                "leads_outside", "named_twice", "bad_encoding", "git_lfs_pointer", "missing_file",
                "not_a_file", "too_many_bytes", "missing_image"),
    "captions": ("no_caption", "caption_not_text", "caption_html", "caption_control",
                 "caption_spaces", "caption_mended", "caption_too_short", "caption_too_long",
                 "caption_pattern"),
    "scores": ("no_score", "score"),
    "size": ("too_many_pixels", "too_small", "aspect_ratio"),
    "decoding": ("empty_file", "not_an_image", "unsupported_format", "truncated", "corrupt",
                 "first_frame", "stored_as_png"),
    "colours": ("unsupported_mode", "colour_mode", "16_bit", "transparency", "palette", "cmyk",
                "grey"),
    "orientation": ("turned_upright",),
    "duplicates": (EXACT, NEAR),
}  # fmt: skip
Kept = list[tuple[int, int, IndexEntry, str]]
Dropped = dict[int, tuple[str, int]]
_SIDES = (0, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
_ASPECTS = (0, 0.25, 0.33, 0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2, 3, 4)
_CHARS = (0, 10, 20, 40, 80, 160, 320, 640, 1280)
_KILOBYTES = (0, 4, 16, 64, 256, 1024, 4096)


def make(
    settings: Settings,
    survey: Survey,
    notes: list[str],
    indices: list[Index],
    dropped: Dropped,
    kept: Kept,
    outputs: list[Output],
) -> dict[str, Any]:
    """The counts by step and reason, and histograms of the kept examples.

    notes: lines about the splits and the files passed over.
    """
    skipped = Counter(skip.reason for index in indices for skip in index.skips)
    repeated = Counter(reason for reason, _ in dropped.values())
    changed = Counter(word for *_, entry, _ in kept for word in entry.changed)
    others = Counter(survey.passed_over) + Counter(survey.unnamed)
    usable = sum(len(index.entries) for index in indices)
    return {
        "read": usable + sum(skipped.values()),
        "usable": usable,
        "kept": len(kept),
        "dropped": dict(sorted((skipped + repeated).items())),
        "changed": dict(sorted(changed.items())),
        "passed_over": dict(sum((Counter(i.passed_over) for i in indices), others)),
        "notes": notes,
        "steps": _steps(skipped + repeated, changed),
        "splits": {split: sum(files.lengths) for split, files in stored(outputs).items()},
        "files": [output.file for output in outputs],
        "bytes": sum(output.bytes for output in outputs),
        "histograms": _histograms([entry for *_, entry, _ in kept], settings),
        "settings": settings.to_json(),
    }


def _steps(dropped: Counter[str], changed: Counter[str]) -> dict[str, dict[str, dict[str, int]]]:
    """The counts {step: {"dropped": {reason: count}, "changed": {word: count}}}.

    Changes are those of kept examples. A mode that STEPS does not list has a word of its own, among
    the colours.
    """
    known = {word for words in STEPS.values() for word in words}
    others = sorted((set(dropped) | set(changed)) - known)
    found = {}
    for step, words in STEPS.items():
        words = (*words, *others) if step == "colours" else words
        found[step] = {
            name: {word: counts[word] for word in words if counts[word]}
            for name, counts in (("dropped", dropped), ("changed", changed))
        }
    return found


def _histograms(entries: list[IndexEntry], settings: Settings) -> dict[str, Any]:
    found = {
        "short side": _histogram([min(e.width, e.height) for e in entries], _SIDES),
        "width / height": _histogram([e.width / e.height for e in entries], _ASPECTS),
        "characters of the caption": _histogram([e.chars for e in entries], _CHARS),
        "captions of an image": _histogram([e.captions for e in entries], tuple(range(1, 8))),
        "kilobytes": _histogram([e.bytes / 1024 for e in entries], _KILOBYTES),
    }
    for number, name in enumerate(settings.scores):
        values = [entry.scores[number] for entry in entries] or [0.0]
        edges = np.linspace(min(values), max(values), 11)
        found[name] = _histogram(values, tuple(float(f"{edge:.4g}") for edge in edges[:-1]))
    return found


def _histogram(values: list[float], starts: tuple[float, ...]) -> list[tuple[float, int]]:
    """The (start, count) of each bin of values; the last has no end, and the first no beginning."""
    places = np.maximum(np.searchsorted(starts, values, side="right") - 1, 0)
    counts = np.bincount(places, minlength=len(starts))
    return [(start, int(count)) for start, count in zip(starts, counts, strict=True)]


def write(
    found: dict[str, Any],
    indices: list[Index],
    dropped: Dropped,
    workspace: Workspace,
    settings: Settings,
) -> None:
    """Write the three files, the same bytes for the same data and settings."""
    lines = [_line(skip.name, skip.reason, skip.detail) for i in indices for skip in i.skips]
    pictures: dict[str, list[tuple[str, str, list[str]]]] = {}
    for index in indices:
        for reason, some in index.thumbnails.items():
            pictures.setdefault(reason, []).extend((n, d, [p]) for n, d, p in some)
    for later in sorted(dropped):
        reason, first = dropped[later]
        name, kept = (_entry(indices, at).name for at in (later, first))
        lines.append(_line(name, reason, f"of {kept}"))
        shown = pictures.setdefault(reason, [])
        if len(shown) < settings.thumbnails:
            both = [_thumbnail(workspace, at, settings) for at in (later, first)]
            shown.append((name, f"of {kept}", both))
    limited = {reason: some[: settings.thumbnails] for reason, some in sorted(pictures.items())}
    paths.write_text(workspace.folder / DROPPED, "".join(lines))
    text = json.dumps(found, indent=1, ensure_ascii=False)
    paths.write_text(workspace.folder / JSON, text + "\n")
    paths.write_text(workspace.folder / HTML, page(found, limited))


def _line(name: str, reason: str, detail: str) -> str:
    entry = {"name": name, "reason": reason, "detail": detail}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _entry(indices: list[Index], at: int) -> IndexEntry:
    return indices[at >> 32].entries[at & (1 << 32) - 1]


def _thumbnail(workspace: Workspace, at: int, settings: Settings) -> str:
    shard, row = at >> 32, at & (1 << 32) - 1
    assert position(shard, row) == at
    (record,) = cleaning.read_records(workspace, shard, [row])
    images = settings.fields.images
    decoders = dict.fromkeys(("image", *(image.name for image in images)), _encoded())
    example = cleaning.features(settings.scores, images).deserialize_example_np(
        record, decoders=decoders
    )
    return cleaning.thumbnail(example["image"], settings.rules.pixel_limit)


def _encoded() -> Any:
    from sdjax.data.tfds.tfds_on_cpu import tfds

    return tfds.decode.SkipDecoding()


_STYLE = """
body { font: 14px sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
table { border-collapse: collapse } td, th { padding: 2px 10px; text-align: right }
td:first-child, th:first-child, .steps td:nth-child(n+3), .steps th { text-align: left }
.steps td { border-top: 1px solid #ddd; vertical-align: top }
.bar { background: #47a; height: 11px } .bars td:last-child { width: 22em }
.charts { display: flex; flex-wrap: wrap; gap: 2em }
figure { display: inline-block; margin: 4px; width: 200px; vertical-align: top; font-size: 11px;
  overflow-wrap: anywhere } figcaption { color: #555 }
"""


def page(found: dict[str, Any], pictures: dict[str, list[tuple[str, str, list[str]]]]) -> str:
    """The report as one HTML file that needs no other."""
    counts = [("rows read", found["read"]), ("usable", found["usable"]), ("kept", found["kept"])]
    counts += [(f"in {split}", size) for split, size in found["splits"].items()]
    parts = [
        "<!doctype html><meta charset=utf-8><title>sdjax.prepare</title>",
        f"<style>{_STYLE}</style><h1>What became of the data</h1>",
        _table(counts),
        "<ul>",
        *(f"<li>{html.escape(note)}</li>" for note in found["notes"]),
        "</ul>",
        "<h2>Each step: what it dropped, and what it changed in what is kept</h2>",
        _steps_table(found["steps"]),
        "<h2>What is kept</h2><div class=charts>",
        *(_chart(name, bins) for name, bins in found["histograms"].items()),
        "</div>",
    ]
    for reason, some in pictures.items():
        total = found["dropped"][reason]
        parts.append(f"<h2>{html.escape(reason)}: {len(some)} of {total}</h2>")
        parts += [_figure(*picture) for picture in some]
    settings = json.dumps(found["settings"], indent=1, ensure_ascii=False)
    parts.append(f"<h2>Settings</h2><pre>{html.escape(settings)}</pre>")
    return "\n".join(parts) + "\n"


def _table(rows: list[tuple[str, int]]) -> str:
    cells = "".join(f"<tr><td>{html.escape(a)}<td>{b:,}" for a, b in rows)
    return f"<table>{cells}</table>"


def _steps_table(steps: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{step}<td>{sum(of['dropped'].values()):,}<td>{_words(of['dropped'])}"
        f"<td>{_words(of['changed'])}"
        for step, of in steps.items()
    )
    head = "<tr><th>step<th>dropped<th>for what reason<th>changed"
    return f"<table class=steps>{head}{rows}</table>"


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {html.escape(word)}" for word, count in counts.items())


def _chart(name: str, bins: list[tuple[float, int]]) -> str:
    most = max(count for _, count in bins) or 1
    rows = "".join(
        f"<tr><td>{start:g}+<td>{count:,}<td><div class=bar style='width:{count / most:.1%}'></div>"
        for start, count in bins
    )
    return f"<div><h3>{html.escape(name)}</h3><table class=bars>{rows}</table></div>"


def _figure(name: str, detail: str, pictures: list[str]) -> str:
    images = "".join(
        f"<img alt='' src='data:image/jpeg;base64,{picture}'> " if picture else "(no picture) "
        for picture in pictures
    )
    return (
        f"<figure>{images}<figcaption>{html.escape(name)}<br>{html.escape(detail)}</figcaption>"
        "</figure>"
    )
