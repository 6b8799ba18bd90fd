"""Mixtures: which part of a mixture every place in the stream comes from, as a closed form.

Between two changes of what is active (a phase) the parts are interleaved in exact proportion to
their weights: over every period, the sum of the weights as whole numbers, each part comes exactly
its weight times, and never runs further from its share than the depth of a tree over the parts. A
part goes on in the next phase where it stood. The answer for a place needs no other place, so
nothing has to be replayed to resume.
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
    """One source of `data.mixture`; what is "", 0 or None here is as in `data`."""

    name: str = ""
    path: str = ""
    data_dir: str = ""
    split: str = ""
    eval_split: str = ""
    image_key: str = ""
    text_key: str = ""
    resolution: int = 0  # parts that differ in it are mixed batch by batch
    score_key: str = ""
    min_score: float | None = None
    weight: float = 1.0  # relative to the other parts that are active at the time
    start: int = 0  # the first step it takes part in ...
    end: int = 0  # ... and the first it does not, counted from 0; 0: to the end of the run

    def __post_init__(self) -> None:
        if not (0 < self.weight < math.inf):
            raise UserError(f"weight is {self.weight}; expected a number above 0 (for a part that "
                            "comes later or ends earlier, set start and end)")  # fmt: skip
        if self.start < 0 or self.resolution < 0:
            field = "start" if self.start < 0 else "resolution"
            raise UserError(f"{field} is {getattr(self, field)}; expected 0 or more")
        if self.end and self.end <= self.start:
            raise UserError(f"end is {self.end}, not after start = {self.start}; expected a later "
                            "step, or 0 for the end of the run")  # fmt: skip


def check(parts: Sequence[Part]) -> None:
    """Raises UserError, naming the step, where no part of the mixture is active."""
    for step in sorted({0, *(part.end for part in parts if part.end)}):
        if not _active(parts, step):
            raise UserError(f"data.mixture has no part at step {step}; give one of them an earlier "
                            "start, or a later end")  # fmt: skip


def _active(parts: Sequence[Part], step: int) -> list[int]:
    return [i for i, p in enumerate(parts) if p.start <= step and (not p.end or step < p.end)]


def interleave(weights: Sequence[int], place: int) -> tuple[int, int]:
    """Which of the weights takes a place, and how many places it has taken before.

    Two take turns so that the first has had round(place * w / sum) of any number of places; more
    are a pair of halves, each interleaved in itself.
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
    """How many of the first places each weight takes."""
    if len(weights) == 1:
        return [places]
    half = len(weights) // 2
    left = _rounded(places * sum(weights[:half]), sum(weights))
    return counts(weights[:half], left) + counts(weights[half:], places - left)


def _rounded(a: int, b: int) -> int:
    """a / b to the nearest whole number, halves up."""
    return (2 * a + b) // (2 * b)


@dataclasses.dataclass(frozen=True)
class _Phase:
    """From place `first` on; the active parts, their weights, what each had taken before."""

    first: int
    active: tuple[int, ...]
    weights: tuple[int, ...]
    taken: tuple[int, ...]


class Schedule:
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
        """The part that a place of the stream belongs to, and how many that part had before."""
        phase = self._phases[bisect.bisect_right(self._firsts, place) - 1]
        which, count = interleave(phase.weights, place - phase.first)
        return phase.active[which], phase.taken[which] + count


def _whole(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the same proportion, as small as can be: 0.1 is taken as 1/10."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    numbers = [int(weight * scale) for weight in exact]
    return tuple(number // math.gcd(*numbers) for number in numbers)
