"""The TFDS features of a source: its image, and the feature that makes a caption."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sdjax.data import named_images
from sdjax.data.caption_choice import Caption
from sdjax.data.config import DataConfig, DataError
from sdjax.data.named_images import NamedImage

FORMAT = "array_record"
MOMENTS = "moments"  # the feature of an encoded dataset in place of the image


def as_text(value: Any) -> str:
    """The text of a text feature's value, which is mostly bytes."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


@dataclasses.dataclass(frozen=True)
class TextFeature:
    """A map from a text feature's value to a caption."""

    def __call__(self, value: Any) -> Caption:
        return Caption(as_text(value))


@dataclasses.dataclass(frozen=True)
class LabelFeature:
    """A map from a class label to captions by templates, all equally probable."""

    names: tuple[str, ...]
    templates: tuple[str, ...]

    def __call__(self, value: Any) -> Caption:
        name = self.names[int(value)].replace("_", " ")
        main, *others = (template.replace("{}", name) for template in self.templates)
        return Caption(main, tuple(others), 1 / len(self.templates))


def check_format(builder: Any) -> None:
    """Raise a DataError unless the dataset is stored with random access."""
    formats = sorted(kind.value for kind in builder.info.available_file_formats())
    if FORMAT in formats:
        return
    raise DataError(
        f"{builder.info.full_name} in {builder.data_dir} is stored as {' and '.join(formats)}, "
        f"which has no random access; set data.data_dir to another folder to have it prepared "
        f"there as {FORMAT}, or add that format where it is:\n"
        f"  pip install apache-beam\n"
        f"  tfds convert_format {shlex.quote(f'--dataset_version_dir={builder.data_dir}')} "
        f"--out_file_format={FORMAT}"
    )


def decoders_and_text(
    builder: Any, config: DataConfig
) -> tuple[dict[str, Any], Callable[[Any], Caption]]:
    """The decoders for the image, and the map from the text feature or label to a caption.

    Raises DataError where a configured feature is missing or of another kind.
    """
    from sdjax.data.tfds.tfds_on_cpu import tfds

    features = builder.info.features
    for field, key in (("image_key", config.image_key), ("text_key", config.text_key)):
        if key not in features:
            raise DataError(
                f"data.{field} is {key!r}, but {builder.info.full_name} has the features "
                f"{sorted(features)}; set --config.data.{field} to one of them"
            )
    for field, key in (("split_key", config.split_key),
                       ("captions.others_key", config.captions.others_key)):  # fmt: skip
        if key and key not in features:
            raise DataError(
                f"data.{field} is {key!r}, but {builder.info.full_name} has the features "
                f"{sorted(features)}; set it to one of them, or to ''"
            )
    for field, key in (("score_key", config.score_key), ("weight_key", config.weight_key)):
        found = features[key] if key in features else None
        if key and (found is None or found.shape or np.dtype(found.np_dtype).kind not in "iuf"):
            raise DataError(
                f"data.{field} is {key!r}, which is no number feature of "
                f"{builder.info.full_name}; it has the features {sorted(features)}"
            )
    images = _named_images(builder, config)
    others = config.captions.others_key and features[config.captions.others_key]
    if others and not (
        isinstance(others, tfds.features.Sequence)
        and isinstance(others.feature, tfds.features.Text)
    ):
        raise DataError(
            f"data.captions.others_key is {config.captions.others_key!r}, but that feature of "
            f"{builder.info.full_name} is {others}; expected a sequence of texts"
        )
    # `transforms` decodes the bytes, with its checks, instead of TFDS.
    decoders = {
        key: tfds.decode.SkipDecoding()
        for key in (config.image_key, *(image.origin for image in images))
        if isinstance(features[key], tfds.features.Image)
    }
    text = features[config.text_key]
    if isinstance(text, tfds.features.ClassLabel):
        return decoders, LabelFeature(
            tuple(text.names), (config.label_template, *config.captions.templates)
        )
    if isinstance(text, tfds.features.Text) or text.np_dtype in (np.object_, np.str_):
        return decoders, TextFeature()
    raise DataError(
        f"data.text_key is {config.text_key!r}, but that feature of {builder.info.full_name} is "
        f"{text}; expected a text or a class label"
    )


def _named_images(builder: Any, config: DataConfig) -> tuple[NamedImage, ...]:
    """The named pictures that are features of a dataset.

    Raises DataError where one is missing or no picture. An encoded dataset has checked its own.
    """
    from sdjax.data.tfds.tfds_on_cpu import tfds

    features = builder.info.features
    images = () if config.image_key == MOMENTS else named_images.stored(config.images)
    for image in images:
        found = features[image.origin] if image.origin in features else None
        if not (isinstance(found, tfds.features.Image) or _is_array(found, image.channels)):
            raise DataError(
                f"data.images has {image.name!r}, which is read from the feature "
                f"{image.origin!r}, but that of {builder.info.full_name} is {found}; expected an "
                f"image among {sorted(features)} (prepare it with --named_image, or set its key)"
            )
    return images


def _is_array(feature: Any, channels: int) -> bool:
    """Whether a feature is an array of uint8 that can be a picture of so many channels."""
    shape = getattr(feature, "shape", None)
    if not shape or len(shape) not in (2, 3) or np.dtype(feature.np_dtype) != np.uint8:
        return False
    return len(shape) == 2 or shape[-1] in (1, channels)


def check_numbers(builder: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a DataError unless the dataset has number features of these names and shapes."""
    features = builder.info.features
    for name, shape in shapes.items():
        found = features[name] if name in features else None
        if (
            found is None
            or tuple(getattr(found, "shape", None) or ()) != shape
            or np.dtype(found.np_dtype).kind not in "iuf"
        ):
            raise DataError(
                f"the model takes the numbers {name!r} of shape {list(shape)} with every example, "
                f"but that feature of {builder.info.full_name} is {found}; it has the features "
                f"{sorted(features)}"
            )
