"""The endless stream of examples in closed form: (seed, place) -> source, example, shape.

Each part of a mixture is a sequence without end: its epochs one after the other, each in an order
of its own. With buckets the sequence consists of whole batches of one bucket. The sequence of a
part gives the example at each place, and the mixture gives the part at each place. No state is
carried from place to place. So a run resumes by setting a number, and all hosts agree without
communication.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from grain.experimental import index_shuffle

from sdjax.data.buckets import Buckets, assign, bucket_shapes
from sdjax.data.config import DataConfig, DataError
from sdjax.data.importance.order import Shares
from sdjax.data.mixture import Part, PartOrder
from sdjax.data.sources import Source

Shape = tuple[int, int]  # height, width


Words = tuple[int, ...]  # the seed of some randomness: the run's seed, the part, ...


def shuffled(index: int, count: int, words: Words) -> int:
    """The element `index` of a permutation of range(count) that `words` choose, in closed form."""
    return index_shuffle(index, max_index=count - 1, seed=_seed(words), rounds=4)


def _offset(words: Words | None) -> float:
    """The u in [0, 1) of an epoch that is shared out by weights, see `Shares`."""
    return 0.5 if words is None else _seed((*words, 2**31)) / 2.0**32


@functools.lru_cache(maxsize=1024)
def _seed(words: Words) -> int:
    """The 32-bit seed of `words`."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


class ExampleOrder(Protocol):
    """The sequence of one part."""

    def locate(self, place: int) -> tuple[int, Shape]:
        """The number of the example at a place, and the (height, width) of its picture."""


@dataclasses.dataclass(frozen=True)
class Squares:
    """All examples, each epoch in an order of its own; without words in stored order.

    shares: how often each comes in an epoch; None for once.
    """

    count: int
    resolution: int
    words: Words | None
    shares: Shares | None = None

    def locate(self, place: int) -> tuple[int, Shape]:
        """The number of the example at a place, and the (height, width) of its picture."""
        epoch, index = divmod(place, self.count)
        if self.words is not None:
            index = shuffled(index, self.count, (*self.words, epoch))
        if self.shares is not None:
            own = None if self.words is None else (*self.words, epoch)
            index = self.shares.at(index, _offset(own))
        return index, (self.resolution, self.resolution)


class Bucketed:
    """Batches of one bucket each, in an order that differs from epoch to epoch.

    A bucket is shuffled again after each pass. Its batches are cut out of that endless row, in
    order. Pictures that do not fill a batch at the end of an epoch come first in the next. Nothing
    is dropped, and no picture comes twice before every other of its bucket has come.
    """

    def __init__(
        self, buckets: Buckets, batch_size: int, words: Words | None,
        weights: np.ndarray | None = None,
    ):  # fmt: skip
        self.buckets = buckets
        # How many places an epoch has for each bucket; with weights, and whose they are.
        self._sizes = [len(members) for members in buckets.members]
        self.shares: list[Shares] = []
        if weights is not None:
            own = [weights[members] for members in buckets.members]
            self._sizes = [max(1, round(float(one.sum()))) for one in own]
            self.shares = [Shares(*pair) for pair in zip(own, self._sizes, strict=True)]
        self._batch_size = batch_size
        self._words = words
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # `_order` of recent epochs

    def batches_before(self, epoch: int) -> list[int]:
        """The number of batches of each bucket in all epochs before `epoch`."""
        return [epoch * size // self._batch_size for size in self._sizes]

    def locate(self, place: int) -> tuple[int, Shape]:
        """The number of the example at a place, and the (height, width) of its picture."""
        number, row = divmod(place, self._batch_size)
        bucket, done = self._batch(number)
        members = self.buckets.members[bucket]
        epoch, index = divmod(done * self._batch_size + row, self._sizes[bucket])
        words = None if self._words is None else (*self._words, 1 + bucket, epoch)
        if words is not None:
            index = shuffled(index, self._sizes[bucket], words)
        if self.shares:
            index = self.shares[bucket].at(index, _offset(words))
        return int(members[index]), self.buckets.shapes[bucket]

    def _batch(self, number: int) -> tuple[int, int]:
        """The bucket of a batch, and how many batches that bucket had before."""
        # Each bucket is behind by less than one batch, so this is a lower bound, and close.
        epoch = number * self._batch_size // sum(self._sizes)
        while sum(self.batches_before(epoch + 1)) <= number:
            epoch += 1
        before = self.batches_before(epoch)
        which, rank = self._order(epoch)
        index = number - sum(before)
        bucket = int(which[index])
        return bucket, before[bucket] + int(rank[index])

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each batch of an epoch, and how many batches of that bucket precede it."""
        found = self._orders.get(epoch)
        if found is None:
            counts = np.diff([self.batches_before(epoch), self.batches_before(epoch + 1)], axis=0)
            which = np.repeat(np.arange(len(counts[0])), counts[0])
            if self._words is not None:
                which = np.random.default_rng((*self._words, 0, epoch)).permutation(which)
            rank = np.empty_like(which)
            for bucket, count in enumerate(counts[0]):
                rank[which == bucket] = np.arange(count)
            found = which, rank
            # Several threads may run this: the dictionary is replaced, and never changed.
            recent = {e: order for e, order in self._orders.items() if abs(e - epoch) <= 1}
            self._orders = recent | {epoch: found}
        return found


class Stream:
    """Random access to the examples of one or several sources, in the order of training.

    stream[i] is a `Source.example` whose target is that of its bucket. In a mixture of several
    shapes, the parts take whole batches in turn, and single examples otherwise.
    """

    def __init__(
        self, sources: Sequence[Source], parts: Sequence[Part], epochs: Sequence[ExampleOrder], *,
        batch_size: int, whole_batches: bool, corrections: Sequence[np.ndarray] = (),
    ):  # fmt: skip
        self._corrections = list(corrections)  # float32 [N] of each source, or none
        self._sources = list(sources)
        self._epochs = list(epochs)
        self._loss_weights = [part.loss_weight for part in parts]
        self._weighs = bool(corrections) or any(weight != 1 for weight in self._loss_weights)
        self._unit = batch_size if whole_batches else 1
        self._part_order = PartOrder(parts, batch_size // self._unit)

    def __len__(self) -> int:
        return sys.maxsize

    def locate(self, place: int) -> tuple[int, int, Shape]:
        """The source, the number of its example, and the shape, at a place of the stream."""
        unit, row = divmod(place, self._unit)
        part, before = self._part_order.locate(unit)
        return part, *self._epochs[part].locate(before * self._unit + row)

    def __getitem__(self, place: int) -> dict[str, Any]:
        part, index, shape = self.locate(place)
        example = {**self._sources[part].example(index), "target": shape}
        if self._weighs:
            weight = example.get("weight", 1.0) * self._loss_weights[part]
            correction = self._corrections[part][index] if self._corrections else 1.0
            example["weight"] = np.float32(weight * correction)
        return example


def make_stream(
    config: DataConfig, configs: Sequence[DataConfig], sources: Sequence[Source], *,
    seed: int, shuffle: bool, weights: Sequence[np.ndarray] = (),
) -> tuple[Stream, list[Buckets]]:  # fmt: skip
    """The stream of a mixture or of buckets, and the buckets of each source ([] without).

    configs: one for each source, see `config.parts`.
    weights: float64 [N] of the examples of each source, of mean 1; () for all alike.
    Raises DataError when the buckets refuse every picture of a source.
    """
    buckets = []
    epochs: list[ExampleOrder] = []
    for i, (own, source) in enumerate(zip(configs, sources, strict=True)):
        words = (seed, i) if shuffle else None
        weight = weights[i] if weights else None
        if own.buckets.step:
            found = bucketed(own, source)
            buckets.append(found)
            epochs.append(Bucketed(found, config.batch_size, words, weight))
        else:
            shares = None if weight is None else Shares(weight, len(source))
            epochs.append(Squares(len(source), own.resolution, words, shares))
    whole = bool(buckets) or len({own.resolution for own in configs}) > 1
    parts = config.mixture or (Part(),)
    unbiased = bool(weights) and config.importance.unbiased
    corrections = [_corrections(epoch, len(sources[i])) for i, epoch in enumerate(epochs)]
    stream = Stream(
        sources, parts, epochs, batch_size=config.batch_size, whole_batches=whole,
        corrections=corrections if unbiased else (),
    )  # fmt: skip
    return stream, buckets


def _corrections(epochs: ExampleOrder, count: int) -> np.ndarray:
    """The factors of the examples' losses, float32 [count]: 1 / (N p_i).

    So the expected loss of a place is the mean over the examples that the part has.
    """
    found = np.ones(count, np.float64)
    if isinstance(epochs, Squares) and epochs.shares is not None:
        found = 1 / epochs.shares.expected
    elif isinstance(epochs, Bucketed) and epochs.shares:
        members = epochs.buckets.members
        places = sum(one.places for one in epochs.shares) / epochs.buckets.images
        for own, shares in zip(members, epochs.shares, strict=True):
            found[own] = places / shares.expected
    return found.astype(np.float32)


def bucketed(config: DataConfig, source: Source) -> Buckets:
    """The examples of a source by bucket. DataError if the buckets refuse all of them.

    The shapes of encoded examples are fixed, so their small buckets stay open.
    """
    table, fixed = source.table, source.encoding is not None
    found = assign(
        table.height,
        table.width,
        bucket_shapes(config.resolution, config.buckets),
        batch_size=1 if fixed else config.batch_size,
        max_upscale=0.0 if fixed else config.buckets.max_upscale,
    )
    if not found.images:
        raise DataError(
            f"{source.name}, split {source.split}: the buckets refuse each of {len(source)} "
            f"pictures ({found.refused}); lower data.resolution or raise data.buckets.max_upscale"
        )
    return found
