"""The summary of a run's data at its start: examples, buckets, and examples left out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from sdjax.data.buckets import Buckets
from sdjax.data.sources import Source


@dataclasses.dataclass(frozen=True)
class Summary:
    """lines: for people. scalars: for the log; {} for one dataset of squares that is all used."""

    lines: tuple[str, ...]
    scalars: dict[str, float]


def summarise(sources: Sequence[Source], buckets: Sequence[Buckets], batch_size: int) -> Summary:
    """The summary of each source: examples used, examples left out, and the reasons.

    buckets: one for each source, or none.
    """
    lines: list[str] = []
    scalars: dict[str, float] = {}
    for i, source in enumerate(sources):
        line = f"data: {source.name}, split {source.split}, {len(source):,} examples"
        prefix = f"{i}/" if len(sources) > 1 else ""
        if len(sources) > 1:
            scalars[f"{prefix}examples"] = len(source)
        refused = buckets[i].refused if buckets else {}
        not_used = source.left_out | refused
        if not_used:
            scalars[f"{prefix}not_used"] = float(sum(not_used.values()))
        scalars |= {f"{prefix}not_used_{_slug(why)}": float(n) for why, n in not_used.items()}
        if buckets:
            line += f", {buckets[i].images:,} in {len(buckets[i].shapes)} bucket(s)"
            lines += [line, *_lines(buckets[i], batch_size, cropped=source.encoding is None)]
            scalars |= {f"{prefix}{k}": v for k, v in _scalars(buckets[i]).items()}
        else:
            lines.append(line)
        lines += [f"  {count:,} not used: {reason}" for reason, count in not_used.items()]
        lines += [f"  {note}" for note in source.notes]
    return Summary(tuple(lines), scalars)


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[1]}x{shape[0]}"  # width x height


def _lines(buckets: Buckets, batch_size: int, *, cropped: bool) -> list[str]:
    """The lines about buckets. cropped: whether the pipeline crops, and not the encoding."""
    sizes = [len(members) for members in buckets.members]
    lines = ["  " + ", ".join(
        f"{_name(shape)}: {size:,}" for shape, size in zip(buckets.shapes, sizes, strict=True)
    )]  # fmt: skip
    waiting = sum(size % batch_size for size in sizes)
    crop = f"the crop takes {100 * buckets.cropped:.1f} % of the area; " if cropped else ""
    lines.append(
        f"  {crop}{waiting:,} pictures do not fill a batch of their bucket in the first epoch and "
        "come first in the next"
    )
    if buckets.closed:
        closed = ", ".join(f"{_name(shape)}: {size}" for shape, size in buckets.closed.items())
        lines.append(f"  closed for want of a batch, pictures moved to the nearest: {closed}")
    return lines


def _scalars(buckets: Buckets) -> dict[str, float]:
    scalars = {
        f"bucket_{_name(shape)}": float(len(members))
        for shape, members in zip(buckets.shapes, buckets.members, strict=True)
    }
    scalars["cropped_share"] = buckets.cropped
    return scalars


def _slug(reason: str) -> str:
    """The name of a reason as a scalar."""
    return re.sub(r"[^\w.<>=-]+", "_", reason)
