"""Mixtures: the part of a mixture at every place of the stream, in closed form.

Between two changes of the active parts (a phase) the parts are interleaved in exact proportion to
their weights. A period is the sum of the weights as whole numbers, and each part comes exactly its
weight times in it. It never deviates from its share by more than the depth of a tree over the
parts. In the next phase a part continues where it was. The answer for a place needs no other place,
so a resumed run replays nothing.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

from sdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of `data.mixture`; a field of "", 0 or None is as in `data`."""

    name: str = ""  # data.name
    path: str = ""  # data.path
    data_dir: str = ""  # data.data_dir
    split: str = ""  # data.split
    eval_split: str = ""  # data.eval_split
    image_key: str = ""  # data.image_key
    text_key: str = ""  # data.text_key
    resolution: int = 0  # data.resolution; parts of different resolutions are mixed batch by batch
    score_key: str = ""  # data.score_key
    min_score: float | None = None  # data.min_score
    weight: float = 1.0  # relative to the other parts that are active at the time
    loss_weight: float = 1.0  # times the loss of its examples, as of pictures of the class
    start: int = 0  # the first step with this part, counted from 0 ...
    end: int = 0  # ... and the first step without it; 0: it stays to the end of the run

    def __post_init__(self) -> None:
        if not (0 < self.weight < math.inf):
            raise UserError(f"weight is {self.weight}; expected a number above 0 (for a part that "
                            "comes later or ends earlier, set start and end)")  # fmt: skip
        if not (0 <= self.loss_weight < math.inf):
            raise UserError(f"loss_weight is {self.loss_weight}; expected a number of 0 or more")
        if self.start < 0 or self.resolution < 0:
            field = "start" if self.start < 0 else "resolution"
            raise UserError(f"{field} is {getattr(self, field)}; expected 0 or more")
        if self.end and self.end <= self.start:
            raise UserError(f"end is {self.end}, not after start = {self.start}; expected a later "
                            "step, or 0 for the end of the run")  # fmt: skip


def check(parts: Sequence[Part]) -> None:
    """Raise a UserError that names the step if no part of the mixture is active there."""
    for step in sorted({0, *(part.end for part in parts if part.end)}):
        if not _active(parts, step):
            raise UserError(f"data.mixture has no part at step {step}; give one of them an earlier "
                            "start, or a later end")  # fmt: skip


def _active(parts: Sequence[Part], step: int) -> list[int]:
    """The numbers of the parts that are active at a step."""
    return [i for i, p in enumerate(parts) if p.start <= step and (not p.end or step < p.end)]


def interleave(weights: Sequence[int], place: int) -> tuple[int, int]:
    """The number of the weight that takes a place, and how many places it has taken before.

    Two weights take turns so that the first has taken round(place * w / sum) places at any place.
    More weights are a pair of halves, each interleaved in itself.
    """
    if len(weights) == 1:
        return 0, place
    half = len(weights) // 2
    total, left = sum(weights), sum(weights[:half])
    before, after = (_rounded(p * left, total) for p in (place, place + 1))
    if after > before:
        return interleave(weights[:half], before)
    which, count = interleave(weights[half:], place - before)
    return half + which, count


def counts(weights: Sequence[int], places: int) -> list[int]:
    """The number of the first `places` places that each weight takes."""
    if len(weights) == 1:
        return [places]
    half = len(weights) // 2
    left = _rounded(places * sum(weights[:half]), sum(weights))
    return counts(weights[:half], left) + counts(weights[half:], places - left)


def _rounded(a: int, b: int) -> int:
    """The quotient a / b to the nearest whole number, halves up."""
    return (2 * a + b) // (2 * b)


@dataclasses.dataclass(frozen=True)
class _Phase:
    """The active parts from place `first` on, their weights, and the places taken before."""

    first: int
    active: tuple[int, ...]
    weights: tuple[int, ...]
    taken: tuple[int, ...]


class PartOrder:
    """The order of the parts of a mixture, with `per_step` places in each training step."""

    def __init__(self, parts: Sequence[Part], per_step: int):
        taken = [0] * len(parts)
        changes = sorted({0, *(p.start for p in parts), *(p.end for p in parts)})
        self._phases: list[_Phase] = []
        for step, following in zip(changes, [*changes[1:], None], strict=True):
            active = tuple(_active(parts, step))
            weights = _whole([parts[i].weight for i in active])
            self._phases.append(
                _Phase(step * per_step, active, weights, tuple(taken[i] for i in active))
            )
            if following is not None:
                done = counts(weights, (following - step) * per_step)
                for i, count in zip(active, done, strict=True):
                    taken[i] += count
        self._firsts = [phase.first for phase in self._phases]

    def locate(self, place: int) -> tuple[int, int]:
        """The part at a place of the stream, and how many places that part has taken before."""
        phase = self._phases[bisect.bisect_right(self._firsts, place) - 1]
        which, count = interleave(phase.weights, place - phase.first)
        return phase.active[which], phase.taken[which] + count


def _whole(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the same proportion; 0.1 counts as 1/10."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    numbers = [int(weight * scale) for weight in exact]
    return tuple(number // math.gcd(*numbers) for number in numbers)
