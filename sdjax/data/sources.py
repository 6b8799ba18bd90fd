"""Datasets as random-access sources: an index in, an image and its caption out.

Every dataset is a TFDS builder stored as ArrayRecord: the two builders of sdjax, which are prepared
on first use, or any other by its TFDS name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from sdjax.data import transforms
from sdjax import paths
from sdjax.errors import UserError

FORMAT = "array_record"
RAW_NAMES = ("image_text_folder", "webdataset", "parquet")  # imported from data.path
WITH_PATH = (*RAW_NAMES, "prepared")


class DataError(UserError):
    """A dataset that cannot be used as asked for; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which dataset, and how it becomes batches."""

    name: str = "captioned_shapes"  # or one of WITH_PATH, or TFDS "name[/config][:version]"
    path: str = ""  # the folder or files, for those of WITH_PATH
    data_dir: str = ""  # where prepared datasets lie; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets
    split: str = "train"
    eval_split: str = "test"
    image_key: str = "image"  # names of the TFDS features; a class label becomes text by template
    text_key: str = "text"
    label_template: str = "a photo of a {}"
    resolution: int = 64  # of the square crop, after the short side is resized to it
    crop: str = "center"  # or "random"
    flip: bool = False  # mirror at random; wrong where captions say left and right
    batch_size: int = 64  # global: over all hosts and devices
    workers: int = 0  # processes that decode; 0 decodes in `threads` of this process
    threads: int = 4
    prefetch: int = 4  # batches kept ready (per worker); 0 makes each when it is asked for
    max_pixels: int = transforms.MAX_PIXELS  # larger images are refused before decoding
    # Raw data: what is skipped (and reported), and how much of that is an error
    min_side: int = 16
    max_aspect: float = 8.0  # long side over short side; 0 for any
    max_bad_examples: int = -1  # more skipped than this is an error; -1 for any number
    # captioned_shapes
    shapes_train: int = 20_000
    shapes_test: int = 512
    shapes_pairs: float = 0.35  # share of pictures with two objects

    def __post_init__(self) -> None:
        for field in ("resolution", "batch_size", "max_pixels"):
            if getattr(self, field) < 1:
                raise UserError(f"data.{field} is {getattr(self, field)}; expected at least 1")
        for field in ("workers", "threads", "prefetch", "min_side", "max_aspect"):
            if getattr(self, field) < 0:
                raise UserError(f"data.{field} is {getattr(self, field)}; expected 0 or more")
        if self.crop not in transforms.CROPS:
            raise UserError(f"data.crop is {self.crop!r}; expected one of {transforms.CROPS}")
        if "{}" not in self.label_template:
            raise UserError(
                f"data.label_template is {self.label_template!r}; expected a '{{}}' in it, where "
                "the name of the class goes"
            )
        if not self.name:
            raise UserError("data.name is empty; expected 'captioned_shapes', 'image_text_folder' "
                             "or a TFDS dataset name")  # fmt: skip
        if self.name in WITH_PATH and not self.path:
            raise UserError(f"data.path is empty; data.name = {self.name!r} needs the folder, "
                             "as in --config.data.path=DIR")  # fmt: skip


class Source:
    """Random access to one split: len(), and source[i] -> {"image": uint8 [H, W, 3], "text": str}.

    Raises DataError, naming dataset, split and index, when a record cannot be read or decoded.
    """

    def __init__(
        self, records: Any, *, name: str, directory: str, split: str, config: DataConfig,
        to_text: Callable[[Any], str],
    ):  # fmt: skip
        self._records = records
        self._to_text = to_text
        self._config = config
        self.name = name
        self.directory = directory
        self.split = split

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"Source({self.name}, split={self.split}, examples={len(self)})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._record(index)
        image = record[self._config.image_key]
        try:
            if isinstance(image, bytes):
                image = transforms.decode(image, max_pixels=self._config.max_pixels)
            image = _three_channels(np.asarray(image))
        except transforms.ImageError as error:
            raise self._error(index, f"the image cannot be decoded ({error})") from error
        return {"image": image, "text": self._to_text(record[self._config.text_key])}

    def text(self, index: int) -> str:
        """The caption alone, without decoding the image."""
        return self._to_text(self._record(index)[self._config.text_key])

    def _record(self, index: int) -> dict[str, Any]:
        try:
            record = self._records[index]
        except (OSError, RuntimeError, ValueError, KeyError, IndexError) as error:
            raise self._error(index, f"the record cannot be read ({error})") from error
        # ArrayRecord answers for a part of a file that is not there with an empty record.
        if record[self._config.image_key] is None or record[self._config.text_key] is None:
            raise self._error(index, "the record cannot be read (it is empty)")
        return record

    def _error(self, index: int, what: str) -> DataError:
        return DataError(
            f"{self.name}, split {self.split}, example {index}: {what}; delete {self.directory} "
            "so that it is prepared again"
        )


def _three_channels(image: np.ndarray) -> np.ndarray:
    """Grey and grey-alpha arrays of TFDS -> uint8 [H, W, 3]; raises ImageError for other kinds."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise transforms.ImageError(
            "unsupported_mode", f"{image.dtype} {list(image.shape)}, not uint8 [H, W, C]"
        )
    if image.ndim == 3 and image.shape[-1] == 3:
        return image
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[-1] == 1:
        return np.repeat(image, 3, -1)
    raise transforms.ImageError("unsupported_mode", f"{image.shape[-1]} channels")


@dataclasses.dataclass(frozen=True)
class TextFeature:
    """Turns a text feature's bytes into a caption."""

    def __call__(self, value: Any) -> str:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)


@dataclasses.dataclass(frozen=True)
class LabelFeature:
    """Turns a class label into a caption by the template."""

    names: tuple[str, ...]
    template: str

    def __call__(self, value: Any) -> str:
        return self.template.replace("{}", self.names[int(value)].replace("_", " "))


def prepared_builder(config: DataConfig) -> Any:
    """The TFDS builder of a dataset, made ready (generated, imported or downloaded) if need be.

    Raises DataError for an unknown name, an empty or missing folder, or a dataset that was stored
    in a format without random access.
    """
    if config.name in RAW_NAMES:
        from sdjax.data.builders import raw_import

        return raw_import.prepare(config)
    if config.name == "prepared":
        return _prepared_folder(config)
    if config.name == "captioned_shapes":
        from sdjax.data.builders import captioned_shapes

        builder = captioned_shapes.make_builder(
            data_dir=config.data_dir,
            train_examples=config.shapes_train,
            test_examples=config.shapes_test,
            pair_fraction=config.shapes_pairs,
        )
        prepare_builder(builder)
        return builder
    builder = _named_builder(config)
    prepare_builder(builder, quiet=False)
    return builder


def prepare_builder(builder: Any, *, quiet: bool = True) -> None:
    """Writes the dataset if it is not there yet; safe when several hosts try at once.

    Raises DataError when it cannot be written.
    """
    from sdjax.data.tfds_on_cpu import quiet_tfds

    if builder.data_path.exists():
        return
    logging.info("preparing %s in %s, once", builder.info.full_name, builder.data_dir)
    try:
        with quiet_tfds() if quiet else contextlib.nullcontext():
            builder.download_and_prepare(file_format=FORMAT)
    except OSError as error:
        # Another process on a shared disk may have finished first: its rename made ours fail.
        if not (builder.data_path / "dataset_info.json").exists():
            raise DataError(
                f"cannot prepare {builder.info.full_name} in {builder.data_dir}: {error}; "
                "data.data_dir (or $TFDS_DATA_DIR) must be a writable folder with room, "
                "and a dataset that TFDS downloads needs the network"
            ) from error
        builder.info.read_from_directory(builder.data_path)


def _prepared_folder(config: DataConfig) -> Any:
    """The dataset that `sdjax.prepare` wrote, read where it lies."""
    from sdjax.data.tfds_on_cpu import quiet_tfds, tfds

    if not (paths.to_path(config.path) / "dataset_info.json").exists():
        raise DataError(
            f"data.path is {config.path!r}, where there is no dataset_info.json; expected the "
            "--output of a run of sdjax.prepare that is finished"
        )
    with quiet_tfds():
        return tfds.builder_from_directory(str(paths.to_path(config.path)))


def _named_builder(config: DataConfig) -> Any:
    from sdjax.data.tfds_on_cpu import tfds

    try:
        return tfds.builder(config.name, data_dir=config.data_dir or None, try_gcs=False)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise DataError(
            f"data.name is {config.name!r}, which TFDS cannot open: {str(error)[:500]}\nexpected "
            f"'captioned_shapes', one of {WITH_PATH} (with data.path), or a name of "
            "https://www.tensorflow.org/datasets/catalog, or of a dataset in data.data_dir"
        ) from error


def open_source(config: DataConfig, split: str) -> Source:
    """Opens a split (TFDS slices such as "train[:90%]" too) of the configured dataset.

    Raises DataError naming what is wrong: dataset, split, feature names, or storage format.
    """
    from sdjax.data.tfds_on_cpu import quiet_tfds, tfds

    builder = prepared_builder(config)
    if config.name in WITH_PATH:  # which store them under names of their own
        config = dataclasses.replace(config, image_key="image", text_key="text")
    _check_format(builder)
    base = split.split("[")[0]
    if base not in builder.info.splits:
        raise DataError(
            f"split {split!r} is not in {builder.info.full_name}; it has "
            f"{sorted(builder.info.splits)} (set data.split and data.eval_split)"
        )
    decoders, to_text = _features(builder, config)
    # Read from the files alone: worker processes then need neither our builder nor TensorFlow.
    with quiet_tfds():
        stored = tfds.builder_from_directory(builder.data_path)
    records = stored.as_data_source(split, decoders=decoders)
    if not len(records):
        raise DataError(f"{builder.info.full_name}, split {split!r}: no examples at all")
    return Source(
        records,
        name=builder.info.full_name,
        directory=str(builder.data_dir),
        split=split,
        config=config,
        to_text=to_text,
    )


def _check_format(builder: Any) -> None:
    formats = sorted(kind.value for kind in builder.info.available_file_formats())
    if FORMAT in formats:
        return
    raise DataError(
        f"{builder.info.full_name} in {builder.data_dir} is stored as {' and '.join(formats)}, "
        f"which has no random access; set data.data_dir to another folder to have it prepared "
        f"there as {FORMAT}, or add that format where it is:\n"
        f"  pip install apache-beam\n"
        f"  tfds convert_format --dataset_version_dir={builder.data_dir} "
        f"--out_file_format={FORMAT}"
    )


def _features(builder: Any, config: DataConfig) -> tuple[dict[str, Any], Callable[[Any], str]]:
    """Decoders for the image, and what makes a caption of the text feature or label."""
    from sdjax.data.tfds_on_cpu import tfds

    features = builder.info.features
    for field, key in (("image_key", config.image_key), ("text_key", config.text_key)):
        if key not in features:
            raise DataError(
                f"data.{field} is {key!r}, but {builder.info.full_name} has the features "
                f"{sorted(features)}; set --config.data.{field} to one of them"
            )
    encoded = isinstance(features[config.image_key], tfds.features.Image)
    # Pillow decodes the bytes in `transforms`, with its checks, rather than TFDS.
    decoders = {config.image_key: tfds.decode.SkipDecoding()} if encoded else {}
    text = features[config.text_key]
    if isinstance(text, tfds.features.ClassLabel):
        return decoders, LabelFeature(tuple(text.names), config.label_template)
    if isinstance(text, tfds.features.Text) or text.np_dtype in (np.object_, np.str_):
        return decoders, TextFeature()
    raise DataError(
        f"data.text_key is {config.text_key!r}, but that feature of {builder.info.full_name} is "
        f"{text}; expected a text or a class label"
    )


def captions(config: DataConfig, split: str) -> list[str]:
    """All captions of a split, in stored order, without decoding a single image."""
    source = open_source(config, split)
    return [source.text(index) for index in range(len(source))]
