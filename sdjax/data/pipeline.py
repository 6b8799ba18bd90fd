"""Batches from a dataset, through Grain: deterministic in (seed, step), for any number of hosts.

The stream is source -> shuffle (anew each epoch) -> repeat -> transform -> batches of one host's
size, dealt out to the hosts in turn. Element i of the stream and the randomness spent on it depend
on seed and i alone, so the global batch of a step does not change with the number of hosts, workers
or threads, and the state of an iterator is the number of steps it has taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from absl import flags, logging

from sdjax.data import transforms
from sdjax.data.sources import (
    DataConfig,
    DataError,
    Source,
    captions,
    open_source,
    prepared_builder,
)

__all__ = ["BatchIterator", "DataConfig", "DataError", "Source", "captions", "describe",
           "make_iterator", "open_source"]  # fmt: skip


class Encoder(Protocol):
    """What the pipeline asks of a tokenizer."""

    def encode(self, texts: list[str]) -> np.ndarray:
        """n texts -> int32 [n, L]"""


@dataclasses.dataclass(frozen=True)
class Transform:
    """One example -> what a batch holds of it. A class, so that worker processes can receive it."""

    tokenizers: dict[str, Encoder]  # by the field of the batch that each one fills
    resolution: int
    crop: str
    flip: bool
    with_size: bool

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        side = self.resolution
        prepared = transforms.prepare(
            example["image"], rng, height=side, width=side, crop=self.crop, flip=self.flip
        )
        fields = {"image": prepared.image}
        if self.with_size:
            fields["size"] = prepared.size
        for name, tokenizer in self.tokenizers.items():
            fields[name] = tokenizer.encode([example["text"]])[0]
        return fields


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """Endless batches of this host's share; its state is JSON-able and the same on every host."""

    def __init__(
        self, dataset: Any, config: DataConfig, identity: dict[str, Any], *,
        process_index: int, process_count: int,
    ):  # fmt: skip
        self._dataset = dataset  # host-sized batches of all hosts, in the order of the stream
        self._config = config
        self._identity = identity
        self._process = (process_index, process_count)
        self._iterator: Any = None
        self.step = 0

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        if self._config.workers:  # out of the workers' shared memory, which is scarce
            batch = {name: np.array(value) for name, value in batch.items()}
        self.step += 1
        return batch

    def _start(self) -> Any:
        import grain.python as grain

        index, count = self._process
        mine = self._dataset[self.step * count + index :: count]
        config = self._config
        threads = config.threads if config.prefetch else 0
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch)
        batches = mine.to_iter_dataset(options)
        if config.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's worker pool reads one of its own flags
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(config.workers, max(1, config.prefetch))
            )
        return iter(batches)

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands: the next batch is number `step`."""
        return {"step": self.step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where get_state was called, on any number of hosts or workers.

        Raises DataError listing what differs when the state is of another stream.
        """
        differences = [
            f"{name}: {state.get(name)!r} in the state, {value!r} here"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if differences or not isinstance(state.get("step"), int) or state["step"] < 0:
            raise DataError(
                "the data state is of another stream of batches and cannot be continued: "
                + ("; ".join(differences) or f"step is {state.get('step')!r}")
                + ". Use the config of the run it came from, or start a new workdir"
            )
        self.close()
        self.step = state["step"]

    def close(self) -> None:
        """Ends the threads or processes that work ahead; iteration starts them again."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = None

    @property
    def examples_per_epoch(self) -> int:
        return self._identity["examples"]

    @property
    def examples_seen(self) -> int:
        """Over all hosts."""
        return self.step * self._config.batch_size

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the next batch starts in."""
        return self.examples_seen // self.examples_per_epoch


def make_iterator(
    config: DataConfig,
    tokenizers: Mapping[str, Encoder],
    *,
    split: str,
    seed: int,
    with_size: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
) -> BatchIterator:
    """Endless batches {"image": float32 [b, R, R, 3] in [-1, 1], "tokens": int32 [b, L], ...}.

    b is config.batch_size / process_count. Each of `tokenizers` fills the field it is named by;
    `with_size` adds "size" int32 [b, 4], see `transforms.Prepared`.
    Raises DataError (a ValueError) for a batch size that does not divide or an unusable dataset.
    """
    import grain.python as grain

    if config.batch_size % process_count:
        raise DataError(
            f"data.batch_size is {config.batch_size}, not divisible by the {process_count} hosts; "
            f"set it to a multiple of {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index is {process_index}; expected 0 to {process_count - 1}")
    if not 0 <= seed < 2**32:
        raise DataError(f"seed is {seed}; expected 0 to 2**32 - 1")
    source = open_source(config, split)
    if config.flip and config.name == "captioned_shapes":
        logging.warning("data.flip mirrors pictures whose captions say left and right")
    if len(source) < config.batch_size:
        logging.warning(
            "%s has %d examples, fewer than data.batch_size = %d: a batch repeats them",
            source.name, len(source), config.batch_size,
        )  # fmt: skip
    transform = Transform(dict(tokenizers), config.resolution, config.crop, config.flip, with_size)
    dataset = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    # No remainder, or Grain rounds the endless length up past the largest integer.
    per_host = config.batch_size // process_count
    dataset = dataset.repeat().random_map(transform).batch(per_host, drop_remainder=True)
    identity = {
        "dataset": source.name,
        "split": split,
        "examples": len(source),
        "batch_size": config.batch_size,
        "seed": seed,
        "shuffle": shuffle,
    }
    return BatchIterator(
        dataset, config, identity, process_index=process_index, process_count=process_count
    )


def describe(config: DataConfig) -> dict[str, Any]:
    """What the start-up log says of the data: where it lies, and how much there is."""
    builder = prepared_builder(config)
    sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
    examples = len(open_source(config, config.split))
    return {
        "dataset": builder.info.full_name,
        "directory": str(builder.data_dir),
        "splits": sizes,
        "train_examples": examples,
        "batch_size": config.batch_size,
        "steps_per_epoch": examples / config.batch_size,
        "resolution": config.resolution,
    }
