"""The `data` group of the configuration: the dataset, and its way into batches."""

from __future__ import annotations

import dataclasses

from sdjax.data import mixture, named_images
from sdjax.data.augment.config import AugmentConfig
from sdjax.data.buckets import BucketConfig
from sdjax.data.caption_choice import CaptionConfig
from sdjax.data.mixture import Part
from sdjax.data.named_images import NamedImage
from sdjax.data.splits import parse_fold
from sdjax.errors import UserError

RAW_NAMES = ("image_text_folder", "webdataset", "parquet")  # imported from data.path
WITH_PATH = (*RAW_NAMES, "prepared", "encoded")
MAX_PIXELS = 50_000_000
CROPS = ("center", "random")


class DataError(UserError):
    """A dataset that cannot be used as configured; the message has the remedy."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The dataset, and its way into batches.

    Raises UserError where a field is out of its range or does not go with another.
    """

    name: str = "captioned_shapes"  # or one of WITH_PATH, or TFDS "name[/config][:version]"
    path: str = ""  # the folder or files, for those of WITH_PATH
    data_dir: str = ""  # folder of prepared datasets; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets
    split: str = "train"  # to train on; TFDS slices too, as "train[:90%]"
    eval_split: str = "test"  # to validate on, and of the captions that are drawn
    image_key: str = "image"  # the TFDS feature with the picture
    text_key: str = "text"  # the one with the caption, or a class label
    label_template: str = "a photo of a {}"  # the caption of a class label
    # Splits by hash, for datasets that store `train` and not these.
    validation_share: float = 0.0  # of all examples, as the split "validation"
    test_share: float = 0.0  # the same for "test"
    fold: str = ""  # "2/5": the second fifth of `train` is "validation", and `train` is the rest
    split_key: str = ""  # the feature hashed; "" is file_name, or else the number of the record
    score_key: str = ""  # a number feature, such as one of quality ...
    min_score: float | None = None  # ... and the least value; other examples are left out
    weight_key: str = ""  # a number feature that multiplies the loss of an example; "" is 1 for all
    images: tuple[NamedImage, ...] = ()  # pictures of an example besides the main one
    captions: CaptionConfig = CaptionConfig()
    text_embeddings: bool = False  # encoded: train on stored embeddings in place of the captions
    mixture: tuple[Part, ...] = ()  # several sources at once; () is the one called `name`
    resolution: int = 64  # of the square crop, after the short side is resized to it
    crop: str = "center"  # or "random"
    buckets: BucketConfig = BucketConfig()
    flip: bool = False  # mirror at random; see captions.swap_sides
    augment: AugmentConfig = AugmentConfig()
    batch_size: int = 64  # global: over all hosts and devices
    workers: int = 0  # processes that decode; 0 decodes in `threads` of this process
    threads: int = 4  # that decode, where there are no workers
    prefetch: int = 4  # batches kept ready (per worker); 0 makes each on demand
    max_pixels: int = MAX_PIXELS  # larger images are refused before decoding
    # Raw data: the rows that are skipped (and reported), and how many of them are an error.
    outside_links: bool = False  # read files outside of `path` that links below it lead to
    min_side: int = 16  # shorter side in pixels
    max_aspect: float = 8.0  # long side over short side; 0 for any
    max_bad_examples: int = -1  # more skipped than this is an error; -1 for any number
    # The dataset captioned_shapes.
    shapes_train: int = 20_000  # pictures of the split "train"
    shapes_test: int = 512  # pictures of the split "test"
    shapes_pairs: float = 0.35  # share of pictures with two objects
    shapes_colours: str = "named"  # or "any", without names in captions, for an autoencoder

    def __post_init__(self) -> None:
        for field in ("resolution", "batch_size", "max_pixels"):
            if getattr(self, field) < 1:
                raise UserError(f"data.{field} is {getattr(self, field)}; expected at least 1")
        for field in ("workers", "threads", "prefetch", "min_side", "max_aspect"):
            if getattr(self, field) < 0:
                raise UserError(f"data.{field} is {getattr(self, field)}; expected 0 or more")
        if self.crop not in CROPS:
            raise UserError(f"data.crop is {self.crop!r}; expected one of {CROPS}")
        if "{}" not in self.label_template:
            raise UserError(
                f"data.label_template is {self.label_template!r}; expected a '{{}}' in it, where "
                "the name of the class goes"
            )
        for field in ("validation_share", "test_share"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"data.{field} is {getattr(self, field)}; expected 0 to below 1")
        if self.validation_share + self.test_share >= 1:
            raise UserError(
                f"data.validation_share and data.test_share are {self.validation_share} and "
                f"{self.test_share}, which leaves nothing to train on; expected less than 1 in all"
            )
        if parse_fold(self.fold)[1] and self.validation_share:
            raise UserError(
                f"data.fold = {self.fold!r} and data.validation_share = {self.validation_share} "
                "both make a validation split; set one of them"
            )
        if self.min_score is not None and not self.score_key:
            raise UserError(f"data.min_score is {self.min_score}, but data.score_key is empty; "
                            "expected the name of a number feature")  # fmt: skip
        if self.captions.quality_tags and not self.score_key and not self.mixture:
            raise UserError("data.captions.quality_tags is set, but data.score_key is empty; "
                            "expected the name of a number feature")  # fmt: skip
        named_images.check(self.images)
        if self.mixture:
            mixture.check(self.mixture)
        kinds = {part.name == "encoded" for part in parts(self)}
        if len(kinds) > 1:
            raise UserError("data.mixture mixes encoded datasets with others; expected all of them "
                            "encoded, or none")  # fmt: skip
        _check_augment(self.augment, self.images, encoded=kinds == {True})
        if self.text_embeddings:
            if kinds == {False}:
                raise UserError("data.text_embeddings is True, but data.name is "
                                f"{self.name!r}; only 'encoded' datasets have any")  # fmt: skip
            if self.captions.shuffle_tags or self.captions.tag_dropout or self.captions.texts:
                raise UserError("data.captions varies tags or texts, which data.text_embeddings "
                                "of whole captions cannot follow; switch off one")  # fmt: skip
        if not self.name:
            raise UserError("data.name is empty; expected 'captioned_shapes', 'image_text_folder' "
                             "or a TFDS dataset name")  # fmt: skip
        if self.name in WITH_PATH and not self.path:
            raise UserError(f"data.path is empty; data.name = {self.name!r} needs the folder, "
                             "as in --config.data.path=DIR")  # fmt: skip


def _check_augment(
    augment: AugmentConfig, images: tuple[NamedImage, ...], *, encoded: bool
) -> None:
    """Raise a UserError for changes that the pictures of an example do not allow."""
    if augment.changes and encoded:
        raise UserError(
            f"data.augment.{augment.changes[0]} changes pictures, which encoded datasets lack; set "
            "it to 0, or train on the pictures"
        )
    pairs = [image.name for image in images if image.kind == "picture"]
    if augment.colours and pairs:
        raise UserError(
            f"data.augment.{augment.colours[0]} changes the main picture alone, which data.images "
            f"compares with {pairs[0]!r}; set it to 0"
        )


def is_encoded(config: DataConfig) -> bool:
    """Whether batches hold moments instead of pictures."""
    return parts(config)[0].name == "encoded"


def is_weighted(config: DataConfig) -> bool:
    """Whether examples have a weight that multiplies their loss."""
    return bool(config.weight_key) or any(part.loss_weight != 1 for part in config.mixture)


def parts(config: DataConfig) -> list[DataConfig]:
    """The configuration of each part of a mixture; without a mixture, that of the one dataset."""
    fields = ("name", "path", "data_dir", "split", "eval_split", "image_key", "text_key",
              "resolution", "score_key")  # fmt: skip
    if not config.mixture:
        return [config]
    found = []
    for part in config.mixture:
        own = {name: getattr(part, name) for name in fields if getattr(part, name)}
        if part.min_score is not None:
            own["min_score"] = part.min_score
        found.append(dataclasses.replace(config, mixture=(), **own))
    return found
