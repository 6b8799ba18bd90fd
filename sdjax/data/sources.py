"""Datasets as sources with random access: an index in, an image and its caption out.

Every dataset is a TFDS builder stored as ArrayRecord: the builders of sdjax, which are prepared on
first use, or any other by its TFDS name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from sdjax.data import encoded, named_images, splits, transforms
from sdjax.data.builders.opening import prepared_builder
from sdjax.data.caption_choice import Caption, graded, replaced
from sdjax.data.columns import Columns
from sdjax.data.columns import Row as ColumnsRow
from sdjax.data.columns import load as load_columns
from sdjax.data.config import WITH_PATH, DataConfig, DataError, parts
from sdjax.data.image_files import ImageError
from sdjax.data.stored_pictures import as_array, decoded, original_size
from sdjax.data.tfds import stored
from sdjax.data.tfds.features import (
    as_text,
    check_format,
    check_numbers,
    decoders_and_text,
)
from sdjax.data.tfds.records import Records
from sdjax.data.transforms import Made
from sdjax.system import untrusted

_AT_ONCE = 4096  # records read together where all are
_NO_COLUMNS: Mapping[str, tuple[int, ...]] = {}


class Source:
    """Random access to one split: len(), and source[i] -> one example.

    An example is {"image": uint8 [H, W, 3], "text": the main caption, "caption": all captions,
    "target": (height, width) of the picture to make of it, "original": (height, width) before
    it was stored smaller, or None, "images": {name: a picture of data.images}}. With `columns` it
    has "numbers", {column: float32}. For encoded datasets, the fields of `encoded.example` replace
    image and original.
    Raises DataError, naming dataset, split and index, when a record cannot be read or decoded.
    """

    def __init__(
        self, records: Any, *, name: str, directory: str, split: str, config: DataConfig,
        to_text: Callable[[Any], Caption], table: Columns | None = None,
        encoding: encoded.Encoding | None = None, columns: Collection[str] = (),
    ):  # fmt: skip
        self.encoding = encoding
        self._columns = tuple(columns)
        self._records = records
        self._to_text = to_text
        self._config = config
        self._table = table
        self.name = name
        self.directory = directory
        self.split = split
        self.left_out: dict[str, int] = {}  # examples of the split that are left out, by reason
        self.notes: tuple[str, ...] = ()  # lines about the splits and the files passed over

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"Source({self.name}, split={self.split}, examples={len(self)})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.example(index)
        if "image" not in example:
            return example
        images = {
            name: picture if isinstance(picture, Made) else as_array(picture)
            for name, picture in example["images"].items()
        }
        return example | {"image": np.asarray(example["image"]), "images": images}

    def example(self, index: int) -> dict[str, Any]:
        """The example source[index], whose decoded picture is still Pillow's image."""
        record = self._record(index)
        with self._named(index):
            picture = self._picture(index, record)
            caption = self._caption(record)
            if self._config.weight_key:
                picture["weight"] = np.float32(record[self._config.weight_key])
            if self._columns:
                picture["numbers"] = {
                    name: np.asarray(record[name], np.float32) for name in self._columns
                }
        weight = picture.get("weight", 1.0)
        if not 0 <= weight < np.inf:
            raise DataError(
                f"{self.name}, split {self.split}, example {index}: data.weight_key = "
                f"{self._config.weight_key!r} is {weight}; expected a number of 0 or more"
            )
        if self._config.captions.empty == "error" and not caption.main.strip():
            raise DataError(
                f"{self.name}, split {self.split}, example {index} has no caption; "
                "data.captions.empty = 'skip' leaves such examples out, 'keep' takes them"
            )
        side = self._config.resolution
        return {**picture, "text": caption.main, "caption": caption, "target": (side, side)}

    def _picture(self, index: int, record: dict[str, Any]) -> dict[str, Any]:
        """The fields "image", "images" and "original", or those of `encoded.example`."""
        if self.encoding is not None:
            return encoded.example(record, self.encoding, self._config.images)
        most = self._config.max_pixels
        name = "the image"
        try:
            found = {"image": decoded(record[self._config.image_key], most)}
            others: dict[str, transforms.Picture | Made] = {
                image.name: Made(image.made) for image in self._config.images if image.made
            }
            for image in named_images.stored(self._config.images):
                name = f"the picture {image.name!r}"
                other = others[image.name] = decoded(record[image.origin], most, image)
                size, main = map(transforms.size_of, (other, found["image"]))
                transforms.check_geometry(image.name, size, main)
            return {**found, "images": others, "original": original_size(record)}
        except ImageError as error:
            raise self._error(index, f"{name} cannot be decoded ({error})") from error

    def key(self, index: int) -> str:
        """The name of an example: its file name, or the number it is stored under."""
        record = self._record(index)
        with self._named(index):
            return as_text(record["file_name"]) if "file_name" in record else str(index)

    def text(self, index: int) -> str:
        """The main caption alone, without decoding the image."""
        record = self._record(index)
        with self._named(index):
            return self._caption(record).main

    def texts(self) -> list[str]:
        """The main captions of all examples, without decoding an image."""
        indices = range(len(self))
        chunks = (indices[first : first + _AT_ONCE] for first in indices[::_AT_ONCE])
        return [text for chunk in chunks for text in self._texts(chunk)]

    def _texts(self, indices: range) -> list[str]:
        """The main captions of these numbers; they are read one by one to name a damaged one."""
        with contextlib.suppress(*untrusted.damage()):
            records = self._records.__getitems__(indices)
            if all(record[self._config.text_key] is not None for record in records):
                return [self._caption(record).main for record in records]
        return [self.text(index) for index in indices]

    def _caption(self, record: dict[str, Any]) -> Caption:
        """The captions of an example."""
        caption, choice = self._stored(record), self._config.captions
        if choice.texts:
            caption = replaced(caption, choice.texts)
        if choice.quality_tags and self.encoding is None:  # encoded captions have them
            caption = graded(caption, float(record[self._config.score_key]), choice)
        return caption

    def _stored(self, record: dict[str, Any]) -> Caption:
        """The captions of a record."""
        caption, choice = self._to_text(record[self._config.text_key]), self._config.captions
        if not choice.others_key:
            if self.encoding is not None:  # the encoding has filled in label templates, for example
                return Caption(
                    caption.main,
                    tuple(as_text(value) for value in record["captions"]),
                    float(record["main_share"]),
                )
            return caption
        texts = (as_text(value).strip() for value in record[choice.others_key])
        others = caption.others + tuple(text for text in texts if text)
        if not caption.main.strip() and others:
            return Caption(others[0], others[1:], choice.main_share)
        return Caption(caption.main, others, choice.main_share)

    @property
    def table(self) -> Columns:
        """The facts about every example that need no decoding; the first access reads them all."""
        if self._table is None:
            config = self._config
            self._table = load_columns(
                len(self),
                self._row,
                directory=self.directory,
                identity=f"{self.name} {self.split} {config.image_key} {config.text_key} "
                f"{config.captions.others_key} {config.split_key} {config.score_key} "
                f"{config.captions.texts or ''}"
                f"{config.max_pixels}",
                threads=config.threads,
            )
        return self._table

    def _row(self, index: int) -> ColumnsRow:
        """The row of an example in the table."""
        record = self._record(index)
        with self._named(index):
            return self._facts(index, record)

    def _facts(self, index: int, record: dict[str, Any]) -> ColumnsRow:
        """The row of a record in the table."""
        image = record[self._config.image_key]
        if "height" in record and "width" in record:
            height, width = int(record["height"]), int(record["width"])
        elif isinstance(image, bytes):
            try:
                height, width = transforms.upright_size(image, max_pixels=self._config.max_pixels)
            except ImageError:
                height = width = 0
        else:
            height, width = np.shape(image)[:2]
        key = self._config.split_key or ("file_name" if "file_name" in record else "")
        share, fold = splits.hashes(as_text(record[key]) if key else str(index))
        score = float(record[self._config.score_key]) if self._config.score_key else 0.0
        return height, width, share, fold, not self._caption(record).main.strip(), score

    def take(self, numbers: np.ndarray, *, split: str) -> Source:
        """A source of some of the examples."""
        return Source(
            splits.Subset(self._records, numbers),
            name=self.name,
            directory=self.directory,
            split=split,
            config=self._config,
            to_text=self._to_text,
            table=self.table.take(numbers),
            encoding=self.encoding,
            columns=self._columns,
        )

    def _record(self, index: int) -> dict[str, Any]:
        """The record of an example."""
        with self._named(index):
            record = self._records[index]
            # ArrayRecord gives an empty record for a part of a file that is missing.
            empty = record[self._config.image_key] is None or record[self._config.text_key] is None
        if empty:
            raise self._error(index, "the record cannot be read (it is empty)")
        return record

    @contextlib.contextmanager
    def _named(self, index: int) -> Iterator[None]:
        """A context for reading an example: an error becomes a DataError that names it."""
        try:
            yield
        except untrusted.damage() as error:
            if isinstance(error, DataError) and str(error).startswith(f"{self.name}, split "):
                raise
            why = untrusted.why(error)
            raise self._error(index, f"the record cannot be read ({why})") from error

    def _error(self, index: int, what: str) -> DataError:
        """The error about an example."""
        return DataError(
            f"{self.name}, split {self.split}, example {index}: {what}; delete {self.directory} "
            "so that it is prepared again"
        )


def open_source(
    config: DataConfig, split: str, *, columns: Mapping[str, tuple[int, ...]] = _NO_COLUMNS
) -> Source:
    """Open a split (TFDS slices such as "train[:90%]" too) of the configured dataset.

    columns: {number feature: its shape}, to be read with every example.

    Raises DataError naming the cause: dataset, split, feature names, or storage format.
    """
    builder = prepared_builder(config)
    encoding = encoded.read(config.path) if config.name == "encoded" else None
    if config.name in WITH_PATH:  # these datasets have feature names of their own
        stored_as = tuple(dataclasses.replace(image, key="") for image in config.images)
        config = dataclasses.replace(config, image_key="image", text_key="text", images=stored_as)
    if encoding is not None:
        config = _as_encoded(config, encoding)
    check_format(builder)
    stored_split, cut = splits.plan(
        split,
        builder.info.splits,
        validation=config.validation_share,
        test=config.test_share,
        fold=config.fold,
    )
    if stored_split.split("[")[0] not in builder.info.splits:
        raise DataError(
            f"split {split!r} is not in {builder.info.full_name}; it has "
            f"{sorted(builder.info.splits)} (set data.split and data.eval_split, or "
            "data.validation_share and data.test_share to have them made of train)"
        )
    decoders, to_text = decoders_and_text(builder, config)
    check_numbers(builder, columns)
    # From the files alone: worker processes then need neither our builder nor TensorFlow.
    files = stored.builder_from_directory(builder.data_path)
    with untrusted.explained(builder.data_path, "a dataset of TFDS", error=DataError):
        records = Records(files, stored_split, decoders)
    if not len(records):
        raise DataError(f"{builder.info.full_name}, split {split!r}: no examples at all")
    source = Source(
        records,
        name=builder.info.full_name,
        directory=str(builder.data_dir),
        split=stored_split,
        config=config,
        to_text=to_text,
        encoding=encoding,
        columns=columns,
    )
    source.notes = tuple(getattr(builder, "notes", ()))
    return _chosen(source, split, cut, config)


def _as_encoded(config: DataConfig, encoding: encoded.Encoding) -> DataConfig:
    """The configuration that reads an encoded dataset as `config` would read the pictures."""
    choice = config.captions
    if choice.others_key:
        choice = dataclasses.replace(choice, others_key="captions")
    if encoding.selection:
        config = encoded.unselected(config)
    encoded.check_images(config, encoding)
    return dataclasses.replace(config, image_key="moments", captions=choice)


def _chosen(source: Source, split: str, cut: splits.Cut | None, config: DataConfig) -> Source:
    """The examples of a source in the split, by `data.captions.empty` and `data.min_score`."""
    keep = np.ones(len(source), bool)
    if cut is not None:
        keep &= cut.keep(source.table.share, source.table.fold)
    belongs = int(keep.sum())
    left_out: dict[str, int] = {}
    if config.captions.empty == "skip":
        left_out["no caption"] = int((keep & source.table.empty).sum())
        keep &= ~source.table.empty
    if config.min_score is not None:
        enough = source.table.score >= config.min_score  # false for NaN, too
        left_out[f"{config.score_key} below {config.min_score:g}"] = int((keep & ~enough).sum())
        keep &= enough
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    if keep.all():
        source.split = split
        return source
    if not keep.any():
        raise DataError(
            f"{source.name}, split {split!r}: no example belongs to it (of {len(source)} in the "
            f"stored split {source.split}, {belongs} do by hash; left out: {reasons or 'none'})"
        )
    if reasons:
        logging.warning("%s, split %s: left out: %s", source.name, split, reasons)
    chosen = source.take(np.flatnonzero(keep), split=split)
    chosen.notes = source.notes
    chosen.left_out = {reason: count for reason, count in left_out.items() if count}
    return chosen


def open_parts(
    config: DataConfig, split: str, *, columns: Mapping[str, tuple[int, ...]] = _NO_COLUMNS
) -> list[Source]:
    """The sources of a mixture; without a mixture, the one source.

    split: data.split or data.eval_split; a part of a mixture may have another in its place.
    columns: see `open_source`.
    Raises DataError as `open_source`.
    """
    if not config.mixture:
        return [open_source(config, split, columns=columns)]
    if split not in (config.split, config.eval_split):
        raise DataError(
            f"split {split!r} is neither data.split = {config.split!r} nor data.eval_split = "
            f"{config.eval_split!r}, and data.mixture has no other"
        )
    train = split == config.split
    return [
        open_source(part, part.split if train else part.eval_split, columns=columns)
        for part in parts(config)
    ]


def captions(config: DataConfig, split: str) -> list[str]:
    """All main captions of a split, in stored order, without decoding any image."""
    return [text for source in open_parts(config, split) for text in source.texts()]
