"""Whole batches at random access: the examples at their places in the stream, made and stacked.

Grain handles batches, not examples. Each of its layers costs an example 20 to 50 microseconds of
bookkeeping, together more than to read and decode a small picture. The order and the randomness
are those of Grain's `seed(seed).shuffle().repeat().random_map(...)`, in closed form from public
functions of Grain and NumPy. Tests compare them with Grain.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from grain.experimental import index_shuffle

from sdjax.data import transforms
from sdjax.data.sources import Source

MAIN: Mapping[str, str] = {"image": "picture"}  # the kinds of a batch without named pictures


class ExampleStream(Protocol):
    """The endless stream of examples."""

    def __getitem__(self, place: int) -> dict[str, Any]: ...


def grain_seed(seed: int, depth: int) -> int:
    """The seed of Grain's transformation `depth` layers below `.seed(seed)`."""
    return int(np.random.SeedSequence((seed, depth)).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class ShuffledEpochs:
    """All examples of one source, epoch after epoch, each in an order of its own.

    seed: of the order, see `grain_seed`; None keeps the order on disk.
    """

    source: Source
    seed: int | None

    def __getitem__(self, place: int) -> dict[str, Any]:
        count = len(self.source)
        epoch, index = divmod(place, count)
        if self.seed is not None:
            seed = (self.seed + epoch) % 2**32
            index = index_shuffle(index, max_index=count - 1, seed=seed, rounds=4)
        return self.source.example(index)


class Batches:
    """A source for Grain: batch i holds the examples at places i * size to (i + 1) * size.

    It can be sent to Grain's worker processes.

    Args:
        transform: (example, generator) -> the fields of one example.
        seed: of the randomness at a place, see `grain_seed`.
        floats: whether batches are as the networks take them (`as_floats`), or as they are sent
            between processes.
        kinds: see `as_floats`.
    """

    def __init__(
        self, stream: ExampleStream, transform: Callable[..., dict[str, np.ndarray]], size: int, *,
        seed: int, floats: bool, kinds: Mapping[str, str] = MAIN,
    ):  # fmt: skip
        self._stream, self._transform, self._kinds = stream, transform, kinds
        self._size, self._floats = size, floats
        # The key of Philox; a generator made from it costs a third of one made from the seed.
        self._key = np.random.Philox(seed).state["state"]["key"]

    def __len__(self) -> int:
        return sys.maxsize // self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        first = index * self._size
        rows = [self._row(place) for place in range(first, first + self._size)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return as_floats(batch, self._kinds) if self._floats else batch

    def _row(self, place: int) -> dict[str, np.ndarray]:
        """The fields of the example at a place."""
        # Grain's counter: the index of the transformation in a fused chain, and the place.
        counter = np.array((0, 0, 0, place), np.uint64)
        rng = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
        return self._transform(self._stream[place], rng)


def as_floats(
    batch: Mapping[str, np.ndarray], kinds: Mapping[str, str] = MAIN, *, copy: bool = False
) -> dict[str, np.ndarray]:
    """A batch as the networks take it: float32, pictures in [-1, 1].

    Conditions and masks are in [0, 1]. Before, pictures are uint8 and moments may be bfloat16: less
    to stack, and to send between processes. kinds: {field: kind} of the pictures, see
    `named_images.NamedImage`. copy: whether the result has no memory of `batch`.
    """
    made = {}
    for name, value in batch.items():
        value = np.asarray(value)  # the workers' arrays are of a class of their own
        kind = np.int32 if value.dtype.kind == "i" else np.float32
        if name in kinds:
            to_float = transforms.normalise if kinds[name] == "picture" else transforms.scaled
            made[name] = to_float(value)
        else:
            made[name] = value.astype(kind, copy=copy)
    return made
