"""A fixed choice of examples for validation, always prepared in the same way.

The choice depends on the dataset and the number of examples alone, not on the run's seed, batch
size, hosts or devices. The examples are in groups of one shape, and an example keeps its place in
its group. Computing a group at a time is the same arithmetic on any number of devices.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from typing import Any

import numpy as np

from sdjax.data import numbers, transforms
from sdjax.data.batches import as_floats
from sdjax.data.caption_choice import Caption, CaptionConfig
from sdjax.data.config import DataConfig, parts
from sdjax.data.pipeline import CaptionTokenizer, Transform, kinds_of
from sdjax.data.sources import Source, open_parts
from sdjax.data.stream import Shape, bucketed, shuffled

_WORDS = (20_231,)  # seed of the order whose beginning is chosen; any other would do


@dataclasses.dataclass(frozen=True)
class Group:
    """The examples `numbers` of source `part`, whose pictures get the (height, width) `shape`."""

    part: int
    numbers: tuple[int, ...]
    shape: Shape


class FixedExamples:
    """Up to `count` examples of a split; of a mixture, equally many from each part.

    groups: of up to `rows` examples; the last of a shape may have fewer.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizers: Mapping[str, CaptionTokenizer],
        *,
        split: str,
        count: int,
        rows: int,
        number_shapes: numbers.Shapes = types.MappingProxyType({}),
    ):
        self.rows, self.split = rows, split
        self._sources = open_parts(config, split, columns=numbers.of_columns(number_shapes))
        self._kinds = kinds_of(config)
        self._transform = Transform(
            dict(tokenizers), config.text_embeddings, "center", False, CaptionConfig(),
            tuple(number_shapes),
        )  # fmt: skip
        own = parts(config)
        shares = [count // len(own) + (i < count % len(own)) for i in range(len(own))]
        self.groups = [
            group
            for i, (part, source) in enumerate(zip(own, self._sources, strict=True))
            for group in _groups(i, part, source, shares[i], rows)
        ]

    def __len__(self) -> int:
        return sum(len(group.numbers) for group in self.groups)

    def names(self) -> np.ndarray:
        """The (part, number) of every example, int32 [N, 2], in the order of the groups."""
        found = [(group.part, number) for group in self.groups for number in group.numbers]
        return np.asarray(found, np.int32).reshape(-1, 2)

    def facts(self) -> Iterator[dict[str, Any]]:
        """The part, number, key, caption and shape of every example, in the order of the groups."""
        for group in self.groups:
            source = self._sources[group.part]
            for number in group.numbers:
                yield {
                    "part": group.part,
                    "number": number,
                    "key": source.key(number),
                    "caption": source.text(number),
                    "shape": group.shape,
                }

    def picture(self, part: int, number: int) -> transforms.Picture:
        """The whole picture of an example, as it is stored. Raises DataError."""
        return self._sources[part].example(number)["image"]

    def read(self, group: Group, executor: Executor) -> dict[str, np.ndarray]:
        """The batch of a group: the fields of `make_iterator`, and "name" int32 [rows, 2].

        It has `rows` examples: the last example of a short group is repeated.

        Raises:
            DataError: an example cannot be read.
        """
        places = [*group.numbers, *[group.numbers[-1]] * (self.rows - len(group.numbers))]
        read = dict(
            zip(
                group.numbers,
                executor.map(lambda n: self._example(group, n), group.numbers),
                strict=True,
            )
        )
        rows = [read[number] for number in places]
        stacked = {field: np.stack([row[field] for row in rows]) for field in rows[0]}
        batch = as_floats(stacked, self._kinds)
        return {**batch, "name": np.asarray([(group.part, n) for n in places], np.int32)}

    def _example(self, group: Group, number: int) -> dict[str, np.ndarray]:
        """The fields of an example."""
        example = self._sources[group.part].example(number)
        example |= {"target": group.shape, "caption": _main(example["caption"])}
        # With centre crop, no mirroring and one caption, nothing is drawn from the generator.
        return self._transform(example, np.random.default_rng(0))


def _main(caption: Caption) -> Caption:
    """The caption whose main text is always chosen."""
    return dataclasses.replace(caption, main_share=1.0)


def _groups(part: int, config: DataConfig, source: Source, count: int, rows: int) -> list[Group]:
    """The groups of `count` examples of a source."""
    total = len(source)
    shapes: dict[int, Shape] | None = None
    if config.buckets.step:
        buckets = bucketed(config, source)
        shapes = {
            int(number): shape
            for shape, members in zip(buckets.shapes, buckets.members, strict=True)
            for number in members
        }
    square = (config.resolution, config.resolution)
    chosen: dict[Shape, list[int]] = {}
    order = (shuffled(place, total, _WORDS) for place in range(total))
    usable = (number for number in order if shapes is None or number in shapes)
    for number in itertools.islice(usable, count):
        chosen.setdefault(square if shapes is None else shapes[number], []).append(number)
    return [
        Group(part, tuple(numbers[i : i + rows]), shape)
        for shape, numbers in sorted(chosen.items())
        for i in range(0, len(numbers), rows)
    ]
