"""The next mixture: examples that are made, given, or come more often."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from sdjax.data.builders import shapes
from sdjax.data.config import DataConfig, parts
from sdjax.data.importance.config import ImportanceConfig
from sdjax.data.mixture import Part
from sdjax.data.pictures import METADATA
from sdjax.data.sources import Source, open_parts
from sdjax.errors import UserError
from sdjax.evaluation.loading import choose_data
from sdjax.improving.groups import OBJECTS, PAIR, GroupsOf, count
from sdjax.improving.proposal import Proposal
from sdjax.system import paths

HOW = ("auto", "synthesise", "more", "reweight")
MADE = "more"  # the folder of what is made
WEIGHTS = "weights.jsonl"
SHARE = (0.2, 0.5)  # of batches that new examples take: at least, and at most
_SEED = 1_000_003  # of what is made, apart from the seeds of datasets


@dataclasses.dataclass(frozen=True)
class Material:
    """The data of the next run.

    how: one of `HOW`. data: for the next recipe. note: what was done, for people.
    """

    how: str
    data: DataConfig
    note: str


def choose_how(asked: str, data: DataConfig, more: str) -> str:
    """Return how examples are had.

    Raises:
        UserError: the data cannot be made, or a folder is missing or too much.
    """
    made = parts(data)[0].name == "captioned_shapes"
    how = asked
    if asked == "auto":
        how = "more" if more else "synthesise" if made else "reweight"
    if how == "synthesise" and not made:
        raise UserError(
            f"--how=synthesise: pictures of captioned_shapes alone can be made, and the run has "
            f"{parts(data)[0].name!r}; collect them and give --more=DIR, or --how=reweight"
        )
    if how == "more" and not more:
        raise UserError("--how=more takes the folder of what was collected: --more=DIR")
    if more and how != "more":
        raise UserError(f"--more={more} is for --how=more, not {how}; leave out one of them")
    if how == "reweight" and data.importance.weights:
        raise UserError(
            f"the run has weights already, data.importance.weights = {data.importance.weights!r}; "
            "collect examples and give --more=DIR"
        )
    return how


def build(
    how: str,
    data: DataConfig,
    proposals: Sequence[Proposal],
    of: GroupsOf,
    folder: paths.Path,
    *,
    more: str,
    cap: float,
) -> Material:
    """Make what the next run reads; what is there already is made again, the same.

    Args:
        folder: where files are written.
        more: a folder of examples that were collected.
        cap: how many times more often an example comes, at most.

    Raises:
        UserError: the folder of examples is none, or no example is in a group that fails.
    """
    if how == "reweight":
        return _reweighted(data, proposals, of, folder, cap)
    if how == "synthesise":
        made = synthesise(proposals, folder / MADE, pairs=data.shapes_pairs)
        added = DataConfig(name="image_text_folder", path=str(paths.absolute(folder / MADE)))
        note = f"{made:,} pictures made in {folder / MADE}"
    else:
        chosen = choose_data(data, str(paths.absolute(more)))
        assert chosen is not None
        added, made = chosen, 0
        note = f"the examples of {more}"
    base = _lasting(data)
    there = sum(map(len, _sources(data)))
    made = made or len(_open(dataclasses.replace(data, mixture=(), **_place(added))))
    share = min(max(made / (there + made), SHARE[0]), SHARE[1])
    whole = sum(part.weight for part in base)
    part = Part(name=added.name, path=added.path, weight=round(whole * share / (1 - share), 4))
    mixed = dataclasses.replace(data, mixture=(*base, part))
    return Material(how, mixed, f"{note}; they are {share:.0%} of the next run's batches")


def _place(data: DataConfig) -> dict[str, Any]:
    return {"name": data.name, "path": data.path}


def _lasting(data: DataConfig) -> tuple[Part, ...]:
    """The parts of a mixture that are there at its end, from the first step on."""
    if not data.mixture:
        return (Part(),)
    lasting = [part for part in data.mixture if not part.end]
    return tuple(dataclasses.replace(part, start=0) for part in lasting or data.mixture)


def _sources(data: DataConfig) -> list[Source]:
    return open_parts(data, data.split)


def _open(data: DataConfig) -> Source:
    return open_parts(data, data.split)[0]


def synthesise(proposals: Sequence[Proposal], folder: paths.Path, *, pairs: float) -> int:
    """Draw pictures of captioned_shapes for each proposal into a folder with metadata.jsonl.

    None of them shows what the test split asks for. Returns how many there are.
    """
    paths.make_folder(folder)
    rows, start = [], 0
    for one in proposals:
        needs, fraction = _wanted(one, pairs)
        name = re.sub(r"[^a-z0-9]+", "_", str(one.group).lower())
        for number in range(one.examples):
            image, text, _ = shapes.make_example(
                _SEED, "train", start + number, pair_fraction=fraction, needs=needs
            )
            file = f"{name}_{number:05d}.png"
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG", compress_level=3)
            with paths.writing(folder / file) as local:
                local.write_bytes(png.getvalue())
            rows.append({"file_name": file, "text": text})
        start += one.examples
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    paths.write_text(folder / METADATA, lines)
    return len(rows)


def _wanted(one: Proposal, pairs: float) -> tuple[tuple[str, ...], float]:
    """The words that a scene must have, and the share of scenes with two objects."""
    kind, value = one.group.kind, one.group.value
    if kind == OBJECTS:
        return (), float(value == "2")
    if kind == "relation":
        return (value,), 1.0
    if kind == "position":  # of one object
        return (value,), 0.0
    return tuple(value.split(" ")) if kind == PAIR else (value,), pairs


def _reweighted(
    data: DataConfig, proposals: Sequence[Proposal], of: GroupsOf, folder: paths.Path, cap: float
) -> Material:
    """Examples of groups that fail come more often, and nothing is added."""
    factors = {
        one.group: min(cap, (one.trained + one.examples) / max(one.trained, 1)) for one in proposals
    }
    rows, raised = [], 0
    for number, source in enumerate(_sources(data)):
        for key, text in zip(source.keys(), source.texts(), strict=True):
            weight = max([1.0, *(factors[group] for group in of(text) if group in factors)])
            raised += weight > 1
            rows.append({"key": key, "part": number, "weight": weight})
    if not raised:
        raise UserError(
            "no training example is in a group that fails, so none can come more often: collect "
            "some, as collect.jsonl says, and give --more=DIR"
        )
    paths.write_text(folder / WEIGHTS, "".join(json.dumps(row) + "\n" for row in rows))
    file = str(paths.absolute(folder / WEIGHTS))
    importance = ImportanceConfig(file, cap=cap, unbiased=False)
    weighed = dataclasses.replace(data, mixture=_lasting(data) if data.mixture else (),
                                  importance=importance)  # fmt: skip
    return Material("reweight", weighed, f"{raised:,} of {len(rows):,} examples come more often, "
                    f"at most {cap:g} times ({folder / WEIGHTS})")  # fmt: skip


def trained_groups(data: DataConfig, of: GroupsOf) -> Mapping[Any, int]:
    """How many training captions are in each group."""
    return count((text for source in _sources(data) for text in source.texts()), of)
