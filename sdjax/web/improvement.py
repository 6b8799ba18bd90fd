"""improve.html: what failed, what was done about it, and what became of it, with pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from sdjax.data.image_files import read_image
from sdjax.improving.groups import choose
from sdjax.system import paths, text_files
from sdjax.web import templating
from sdjax.web.report.pictures import Picture, packed

PAGE_FILE = "improve.html"
MOST = 12  # prompts that are shown, of the groups that failed
SIDE = 160  # pixels of the longer side


def write_page(folder: paths.Path) -> paths.Path:
    """Write the page of a round from the files in its folder, and return its path.

    Raises:
        UserError, OSError: improve.json cannot be read, or the page not be written.
    """
    content = text_files.read_json(folder / "improve.json")
    page = folder / PAGE_FILE
    text = render(content, pairs(folder, content))
    paths.write_text(page, text.encode("utf-8", "replace").decode("utf-8"))
    return page


def render(content: Mapping[str, Any], shown: Sequence[tuple[str, Picture, Picture]]) -> str:
    """Return the page as HTML, which loads nothing and runs no script.

    Args:
        content: of improve.json.
        shown: (caption, before, after).
    """
    compared = content["comparison"]
    return templating.environment().get_template("improve.html").render(
        content=content,
        verdict=compared["sentence"] if compared else "No group fails.",
        findings=[_finding(one) for one in content["findings"]],
        changes=[_change(one) for one in _changes(compared)],
        shown=shown,
        style=templating.asset("report.css"),
        policy=templating.policy(()),
    )  # fmt: skip


def _changes(compared: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if compared is None:
        return []
    failed = {**compared["failed"], "group": "all that failed"}
    return [{**compared["all"], "group": "all prompts"}, failed, *compared["groups"]]


def _finding(one: Mapping[str, Any]) -> list[str]:
    state = "fails" if one["fails"] else f"by {one['blamed']}" if one["blamed"] else ""
    trained = f"{one['trained']:,}"
    return [one["group"], _share(one["own"]), _share(one["others"]), trained, state]


def _change(one: Mapping[str, Any]) -> list[str]:
    found = one["difference"]
    state = "better" if one["better"] else "worse" if one["worse"] else ""
    moved = f"{found['value']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"
    mark = " (failed)" if one["failed"] and not one["group"].startswith("all ") else ""
    count = str(one["before"]["total"])
    return [one["group"] + mark, _share(one["before"]), _share(one["after"]), moved, count, state]


def _share(one: Mapping[str, Any]) -> str:
    return f"{one['share']:.2f} ({one['low']:.2f} to {one['high']:.2f})"


def pairs(folder: paths.Path, content: Mapping[str, Any]) -> list[tuple[str, Picture, Picture]]:
    """Return pictures of prompts that failed before, from the same noise before and after.

    They are of the half that judges, in its order, so nothing is picked by how it came out. None
    where the judge is the loss, which draws nothing.
    """
    failed = {one["group"] for one in content["proposals"]}
    found: list[tuple[str, Picture, Picture]] = []
    for row in _verdicts(folder):
        places = [folder / name / row["key"] for name in ("before", "after")]
        own = failed & {str(group) for group in _groups(row["caption"], content["group_by"])}
        if own and len(found) < MOST and all(place.exists() for place in places):
            one, two = (_packed(place) for place in places)
            found.append((row["caption"], one, two))
    return found


def _verdicts(folder: paths.Path) -> list[dict[str, str]]:
    text = text_files.read_text(folder / "after" / "judge.jsonl")
    return [json.loads(line) for line in text_files.lines(text) if line]


def _groups(caption: str, kind: str) -> frozenset[Any]:
    return choose(kind, [caption])[1](caption)


def _packed(place: paths.Path) -> Picture:
    shown = read_image(place).convert("RGB")
    shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if (factor := SIDE // max(shown.size)) > 1:  # whole pixels, which hide nothing
        size = factor * shown.width, factor * shown.height
        shown = shown.resize(size, Image.Resampling.NEAREST)
    return packed(place.name, shown)
