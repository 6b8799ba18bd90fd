"""Batches from datasets, through Grain: deterministic in (seed, step), for any number of hosts.

The stream is source -> shuffle (differently in each epoch) -> repeat -> transform -> batches of one
host's size, which the hosts take in turn. One Grain source, `batches.Batches`, has all but the last
step. With mixtures and buckets a `Stream` replaces the first three. Element i of the stream and its
randomness depend on seed and i alone. So the global batch of a step does not change with the number
of hosts, workers or threads. The state of an iterator is its number of steps.
"""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import flags, logging

from sdjax.data import named_images, numbers, transforms
from sdjax.data.augment import changes as augmentations
from sdjax.data.augment.changes import Changes
from sdjax.data.augment.config import AugmentConfig
from sdjax.data.batches import (
    MAIN,
    Batches,
    ExampleStream,
    ShuffledEpochs,
    as_floats,
    grain_seed,
)
from sdjax.data.buckets import Buckets
from sdjax.data.caption_choice import CaptionConfig, choose, says_sides, swap_sides
from sdjax.data.config import DataConfig, DataError, is_weighted, parts
from sdjax.data.encoded import TEXT_FIELDS
from sdjax.data.importance import table
from sdjax.data.sources import Source, captions, open_parts, open_source
from sdjax.data.stream import make_stream
from sdjax.data.summary import Summary, summarise
from sdjax.system.interrupts import end_with_parent, ignored_by_children

__all__ = ["BatchIterator", "DataConfig", "DataError", "Source", "captions", "make_iterator",
           "open_parts", "open_source"]  # fmt: skip


class CaptionTokenizer(Protocol):
    """The part of a tokenizer that the pipeline uses."""

    def encode(self, texts: list[str]) -> np.ndarray:
        """The tokens of n texts, int32 [n, L]."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """The map from an example to its fields of a batch; a class, for worker processes."""

    tokenizers: dict[str, CaptionTokenizer]  # by the field of the batch that each one fills
    embeddings: bool  # take the stored ones instead of tokens
    crop: str
    flip: bool
    captions: CaptionConfig
    numbers: tuple[str, ...] = ()  # the fields of numbers, see `data.numbers`
    with_weight: bool = False
    augment: AugmentConfig | None = None

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        changes = augmentations.draw(self.augment, rng) if self.augment else None
        fields, size, mirrored = self._pictures(example, rng, changes)
        if self.numbers:
            original, corner = tuple(size[:2].tolist()), tuple(size[2:].tolist())
            fields |= numbers.of_geometry(self.numbers, original, corner)
            fields |= example.get("numbers", {})
        if self.with_weight:
            fields["weight"] = example["weight"]
        text = choose(example["caption"], self.captions, rng)
        if self.embeddings:
            captions = (example["caption"].main, *example["caption"].others)
            which = captions.index(text)
            return fields | {k: example[k][which] for k in TEXT_FIELDS if k in example}
        if mirrored and self.captions.swap_sides:
            text = swap_sides(text)
        if changes is not None:
            text = changes.caption(text)
        for name, tokenizer in self.tokenizers.items():
            fields[name] = tokenizer.encode([text])[0]
        return fields

    def _pictures(
        self, example: dict[str, Any], rng: np.random.Generator, changes: Changes | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray, bool]:
        """The image or the moments, the named pictures, the size, and whether it is mirrored."""
        if "moments" in example:
            mirror = self.flip and rng.random() < 0.5 and not self._tells_sides(example)
            chosen = example["flipped"] if mirror else example
            pixels = example["images"]
            if mirror:
                pixels = {name: picture[:, ::-1] for name, picture in pixels.items()}
            fields = {"moments": chosen["moments"], **chosen["others"], **pixels}
            return fields, chosen["size"], mirror
        height, width = example["target"]
        prepared = transforms.prepare(
            example["image"], rng, height=height, width=width, crop=self.crop, flip=self.flip,
            original=example.get("original"), images=example["images"],
            warp=changes.warp if changes else None,
        )  # fmt: skip
        pixels = changes.colour(prepared.pixels) if changes else prepared.pixels
        return {"image": pixels, **prepared.images}, prepared.size, prepared.mirrored

    def _tells_sides(self, example: dict[str, Any]) -> bool:
        """Whether stored embeddings say left or right, which cannot change places in them."""
        if not self.embeddings or not self.captions.swap_sides:
            return False
        return any(map(says_sides, (example["caption"].main, *example["caption"].others)))


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """Endless batches of this host's share; its state is JSON-able and the same on every host."""

    def __init__(
        self, dataset: Any, config: DataConfig, identity: dict[str, Any], *,
        process_index: int, process_count: int, shape_at: Callable[[int], tuple[int, int]],
        summary: Summary,
    ):  # fmt: skip
        self.summary = summary
        self._shape_at = shape_at
        self._dataset = dataset  # host-sized batches of all hosts, in the order of the stream
        self._config = config
        self._identity = identity
        self._process = (process_index, process_count)
        self._iterator: Any = None
        self._without: frozenset[int] = frozenset()
        self.step = 0

    def pass_over(self, numbers: Iterable[int]) -> None:
        """Skip these batches, counted from 0.

        The state does not hold them: call this again after a resume.
        """
        self._without = frozenset(numbers)
        self._pass()

    def _pass(self) -> None:
        """Advance past the batches to skip."""
        while self.step in self._without:
            if self._iterator is not None:
                next(self._iterator)
            self.step += 1

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            with ignored_by_children():  # after the first Ctrl-C a run continues until it has saved
                self._iterator = self._start()
                batch = next(self._iterator)
        else:
            batch = next(self._iterator)
        if self._config.workers:  # copied out of the workers' shared memory, which is scarce
            batch = as_floats(batch, kinds_of(self._config), copy=True)
        self.step += 1
        self._pass()
        return batch

    def _start(self) -> Any:
        """An iterator of Grain from the current step on."""
        import grain.python as grain

        index, count = self._process
        config = self._config
        mine = self._dataset[self.step * count + index :: count]
        threads = config.threads if config.prefetch else 0
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch)
        batches = mine.to_iter_dataset(options)
        if config.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's worker pool reads one of its own flags
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(config.workers, max(1, config.prefetch)),
                worker_init_fn=end_with_parent,
            )
        return iter(batches)

    def get_state(self) -> dict[str, Any]:
        """The position in the stream: the next batch is number `step`."""
        return {"step": self.step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to the position of `get_state`, on any number of hosts or workers.

        Raises DataError listing the differences when the state is of another stream.
        """
        names = [*self._identity, *(state.keys() - self._identity.keys() - {"step"})]
        differences = [
            f"{name}: {state.get(name)!r} in the state, {self._identity.get(name)!r} here"
            for name in names
            if state.get(name) != self._identity.get(name)
        ]
        if differences or not isinstance(state.get("step"), int) or state["step"] < 0:
            raise DataError(
                "the data state is of another stream of batches and cannot be continued: "
                + ("; ".join(differences) or f"step is {state.get('step')!r}")
                + ". Use the config of the run it came from, or start a new workdir"
            )
        self.close()
        self.step = state["step"]
        self._pass()

    def close(self) -> None:
        """End the threads or processes that work ahead; iteration starts them again."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = None

    @property
    def next_shape(self) -> tuple[int, int]:
        """The height and width of the pictures of the next batch; the same on every host."""
        return self._shape_at(self.step)

    @property
    def examples_per_epoch(self) -> int:
        return self._identity["examples"]

    @property
    def examples_seen(self) -> int:
        """The number of examples so far, over all hosts."""
        return self.step * self._config.batch_size

    @property
    def epoch(self) -> int:
        """The epoch, from 0, in which the next batch starts."""
        return self.examples_seen // self.examples_per_epoch


def make_iterator(
    config: DataConfig,
    tokenizers: Mapping[str, CaptionTokenizer],
    *,
    split: str,
    seed: int,
    number_shapes: numbers.Shapes = types.MappingProxyType({}),
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
) -> BatchIterator:
    """Endless batches {"image": float32 [b, H, W, 3] in [-1, 1], "tokens": int32 [b, L], ...}.

    b is config.batch_size / process_count. Each of `tokenizers` fills the field of its name.
    `number_shapes` {field: shape} adds numbers, see `data.numbers`: "size" is int32 [b, 4], others
    are features of the dataset. H and W are data.resolution, or those of the batch's bucket. Each
    of data.images adds float32 [b, H, W, 3], a mask [b, H, W, 1].
    Encoded datasets have "moments" float32 [b, h, w, 2C] in place of the image, and
    "NAME_moments" in place of a named picture of the kind "picture". With data.weight_key, or a
    loss_weight of a part of data.mixture, they have "weight" float32 [b]. With data.text_embeddings
    they have "context" [b, L, D] (for SDXL also "pooled" [b, P]) in place of tokens.
    Raises DataError (a ValueError) for a batch size that does not divide or an unusable dataset.
    """
    _check_hosts(config, seed, process_index, process_count)
    sources = open_parts(config, split, columns=numbers.of_columns(number_shapes))
    _warn(config, sources)
    transform = Transform(
        dict(tokenizers),
        config.text_embeddings,
        config.crop,
        config.flip,
        config.captions,
        tuple(number_shapes),
        is_weighted(config),
        config.augment if config.augment.changes else None,
    )
    import grain.python as grain

    weights = _weights(config, sources) if split == config.split else []
    stream, depth, shape_at, buckets = _endless(
        config, sources, weights, seed=seed, shuffle=shuffle
    )
    batches = Batches(
        stream,
        transform,
        config.batch_size // process_count,
        seed=grain_seed(seed, depth),
        floats=not config.workers,
        kinds=kinds_of(config),
    )
    return BatchIterator(
        grain.MapDataset.source(batches),
        config,
        _identity(config, sources, buckets, weights, split=split, seed=seed, shuffle=shuffle),
        process_index=process_index,
        process_count=process_count,
        shape_at=shape_at,
        summary=summarise(sources, buckets, config.batch_size),
    )


def _check_hosts(config: DataConfig, seed: int, process_index: int, process_count: int) -> None:
    """Raise a DataError for a batch size that does not divide, or a number out of its range."""
    if config.batch_size % process_count:
        raise DataError(
            f"data.batch_size is {config.batch_size}, not divisible by the {process_count} hosts; "
            f"set it to a multiple of {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index is {process_index}; expected 0 to {process_count - 1}")
    if not 0 <= seed < 2**32:
        raise DataError(f"seed is {seed}; expected 0 to 2**32 - 1")


def kinds_of(config: DataConfig) -> dict[str, str]:
    """The kinds of the pictures of a batch, {field: kind}."""
    return {**MAIN, **named_images.kinds_of(config.images)}


def _endless(
    config: DataConfig, sources: Sequence[Source], weights: Sequence[np.ndarray], *, seed: int,
    shuffle: bool,
) -> tuple[ExampleStream, int, Callable[[int], tuple[int, int]], list[Buckets]]:  # fmt: skip
    """The endless stream of examples, and three facts about it.

    They are the number of Grain's layers that decide its randomness, a function from a step to the
    shape of its pictures, and the buckets ([] without).
    """
    if config.mixture or config.buckets.step or weights:
        stream, buckets = make_stream(
            config, parts(config), sources, seed=seed, shuffle=shuffle, weights=weights
        )
        return stream, 1, lambda step: stream.locate(step * config.batch_size)[2], buckets
    square = config.resolution, config.resolution
    if shuffle:
        return ShuffledEpochs(sources[0], grain_seed(seed, 1)), 3, lambda step: square, []
    return ShuffledEpochs(sources[0], None), 2, lambda step: square, []


def _identity(
    config: DataConfig, sources: Sequence[Source], buckets: Sequence[Buckets],
    weights: Sequence[np.ndarray], *, split: str, seed: int, shuffle: bool,
) -> dict[str, Any]:  # fmt: skip
    """The fields that identify a stream, in the state of an iterator."""
    counts = [found.images for found in buckets] or [len(source) for source in sources]
    identity = {
        "dataset": " + ".join(source.name for source in sources),
        "split": split,
        "examples": sum(counts),
        "batch_size": config.batch_size,
        "seed": seed,
        "shuffle": shuffle,
    }
    # Only streams with named pictures, mixtures or buckets have these fields.
    if config.images:
        identity["images"] = [
            [image.name, image.made or image.origin, image.kind] for image in config.images
        ]
    if config.mixture:
        identity["mixture"] = [[p.weight, p.start, p.end, p.resolution] for p in config.mixture]
    if config.buckets.step:
        identity["buckets"] = dataclasses.asdict(config.buckets)
    if weights:
        digest = hashlib.sha256(b"".join(one.tobytes() for one in weights)).hexdigest()[:16]
        identity["importance"] = [digest, config.importance.unbiased]
    return identity


def _weights(config: DataConfig, sources: Sequence[Source]) -> list[np.ndarray]:
    """The weights of `data.importance` for each source, which gets a note of it; [] without."""
    if not config.importance.weights:
        return []
    given = table.read(config.importance.weights)
    if strange := sorted(set(given) - set(range(len(sources)))):
        raise DataError(
            f"data.importance.weights = {config.importance.weights!r} has examples of part "
            f"{strange[0]}, and data.mixture has {len(sources)} parts (counted from 0)"
        )
    found = []
    for i, source in enumerate(sources):
        if i not in given:  # of a part that the file does not mention
            found.append(np.ones(len(source)))
            continue
        weights = table.of_source(config.importance, given[i], source.keys(), source.name)
        source.notes = (*source.notes, weights.note)
        found.append(weights.values)
    return found


def _warn(config: DataConfig, sources: Sequence[Source]) -> None:
    """Warn about settings that are probably mistakes."""
    if config.augment.hue and any(part.name == "captioned_shapes" for part in parts(config)):
        logging.warning("data.augment.hue changes colours that the captions name")
    for source in sources:
        if len(source) < config.batch_size:
            logging.warning(
                "%s has %d examples, fewer than data.batch_size = %d: a batch repeats them",
                source.name, len(source), config.batch_size,
            )  # fmt: skip
