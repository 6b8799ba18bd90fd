"""A model against others, on the same prompts from the same noise: win rates, and what else moved.

The other side is an evaluation's folder, drawn now or before.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.data.pictures import Folder, open_folder
from sdjax.errors import UserError
from sdjax.evaluation.compare.scores import scores_of
from sdjax.evaluation.compare.wins import Drift, drifts, win_rates
from sdjax.evaluation.evaluation_output import FILE as METRICS_FILE
from sdjax.evaluation.evaluation_output import jsonable, number
from sdjax.evaluation.features import ClipTower
from sdjax.evaluation.metrics.bootstrap import Estimate
from sdjax.formats.folders import ModelError, read_json
from sdjax.sampling.drawing import SETTINGS
from sdjax.system import paths

FILE = "comparison.json"
# Of settings.json, what must be the same; all else may be what is compared.
_SAME = ("prompts", "per_prompt", "seed", "size")
_LOOK = ("sampler", "guidance", "guidance_rescale", "negative_prompt")


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """An evaluation that was done: its pictures, its metrics, and how they were drawn."""

    name: str
    pictures: Folder
    metrics: Mapping[str, Estimate]
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One model against another.

    wins: {score: the share of pictures that win}; drift: {score or metric: what differs}.
    notes: how their drawing differs, for the reader.
    """

    name: str
    wins: Mapping[str, Estimate]
    drift: Mapping[str, Drift]
    notes: tuple[str, ...]


def is_evaluation(folder: paths.PathLike) -> bool:
    """Whether a folder is one that an evaluation with pictures wrote."""
    place = paths.to_path(folder)
    return paths.exists(place / METRICS_FILE) and paths.exists(place / "images" / SETTINGS)


def read_side(folder: paths.PathLike, name: str = "") -> Side:
    """Read the folder of an evaluation.

    Args:
        name: in tables; that of the folder by default.

    Raises:
        UserError: its files are damaged.
    """
    place = paths.to_path(folder)
    content = read_json(place / METRICS_FILE)
    try:
        metrics = {
            key: Estimate(
                math.nan if one["value"] is None else float(one["value"]),
                one["low"], one["high"], one["higher_is_better"], one["count"],
            )
            for key, one in content["metrics"].items()
        }  # fmt: skip
        count = int(content["num_samples"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{place / METRICS_FILE} is none of sdjax.evaluate ({error!r})") from error
    pictures = open_folder(place / "images", count=count)
    settings = read_json(place / "images" / SETTINGS)
    return Side(name or place.name, pictures, metrics, settings)


def compare(
    ours: Side,
    theirs: Sequence[Side],
    *,
    clip: ClipTower | None = None,
    resamples: int,
    seed: int,
) -> list[Comparison]:
    """Compare evaluations of the same prompts and noise.

    Raises:
        UserError: prompts, noise, size or number of pictures differ.
    """
    own = scores_of(ours.pictures, ours.pictures.captions, clip)
    found = []
    for side in theirs:
        _check(ours, side)
        other = scores_of(side.pictures, side.pictures.captions, clip)
        moved = drifts(
            own, other, (ours.metrics, side.metrics), ours.pictures.captions,
            resamples=resamples, seed=seed,
        )  # fmt: skip
        wins = win_rates(own, other, ours.pictures.captions)
        found.append(Comparison(side.name, wins, moved, _notes(ours, side)))
    return found


def _check(ours: Side, theirs: Side) -> None:
    values = [
        {name: side.settings.get(name) for name in _SAME} | {"pictures": len(side.pictures)}
        for side in (ours, theirs)
    ]
    wrong = [name for name, value in values[0].items() if value != values[1][name]]
    if wrong:
        said = ", ".join(f"{name}: {values[1][name]!r}, not {values[0][name]!r}" for name in wrong)
        raise UserError(
            f"--against={theirs.name} is an evaluation of other pictures ({said}); evaluate it "
            "with the same --dataset, --split, --num_samples, --per_prompt, --seed and size"
        )


def _notes(ours: Side, theirs: Side) -> tuple[str, ...]:
    found = []
    for name in _LOOK:
        one, other = ours.settings.get(name), theirs.settings.get(name)
        if one != other:
            if isinstance(one, dict) and isinstance(other, dict):
                moved = [key for key in one if one[key] != other.get(key)]
                one = {key: one[key] for key in moved}
                other = {key: other.get(key) for key in moved}
            found.append(f"{theirs.name} was drawn with {name} {other!r}, this with {one!r}")
    return tuple(found)


def write(folder: paths.Path, found: Sequence[Comparison]) -> paths.Path:
    """Write comparison.json; return it. WriteError if it cannot be written."""
    content = {
        one.name: {
            "win_rate": {name: jsonable(rate) for name, rate in one.wins.items()},
            "drift": {
                name: {"ours": drift.ours, "theirs": drift.theirs,
                       "difference": jsonable(drift.difference)}
                for name, drift in one.drift.items()
            },
            "notes": list(one.notes),
        }
        for one in found
    }  # fmt: skip
    file = folder / FILE
    paths.write_text(file, json.dumps(content, indent=2) + "\n")
    return file


def tables(found: Sequence[Comparison]) -> tuple[Any, ...]:
    """Return tables of rich: for each comparison, win rates and what differs."""
    from rich.table import Table

    shown: list[Any] = []
    for one in found:
        view = Table(title=f"against {one.name}, picture by picture; a tie is half a win")
        for heading in ("score", "win rate", "95 % interval", "wins / ties / losses"):
            view.add_column(heading, justify="left" if heading == "score" else "right")
        for name, rate in one.wins.items():
            counts = " / ".join(str(rate.details[key]) for key in ("wins", "ties", "losses"))
            view.add_row(name, number(rate.value), _interval(rate), counts)
        shown.append(view)
        moved = Table(title=f"what moved against {one.name}")
        for heading in ("metric", "this", one.name, "difference", "95 % interval"):
            moved.add_column(heading, justify="left" if heading == "metric" else "right")
        for name, drift in one.drift.items():
            values = number(drift.ours), number(drift.theirs), number(drift.difference.value)
            moved.add_row(name, *values, _interval(drift.difference))
        shown.append(moved)
    return tuple(shown)


def _interval(found: Estimate) -> str:
    return "" if found.low is None else f"{number(found.low)} to {number(found.high)}"
