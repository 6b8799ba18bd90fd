"""Datasets encoded ahead of training: VAE moments in place of pictures, embeddings beside captions.

A folder of TFDS ArrayRecord files, one record an example (see `features`), and `encoding.json`
with the settings of the encoding. It has moments instead of latents, so that training draws fresh
latents from them every time (as in MLPerf and LDM).
The latent of a mirrored picture is not the mirrored latent to the bit. So mirrored pictures are
encoded too, or the dataset allows only training without `data.flip`.

Of data.images, those of the kind "picture" are encoded as the main one is. Conditions and masks are
kept as PNGs of the pixels that training takes, and are mirrored when they are read.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from PIL import Image

from sdjax.data import named_images, transforms
from sdjax.data.config import DataConfig, DataError
from sdjax.data.named_images import NamedImage
from sdjax.system import paths, text_files

FILE = "encoding.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TEXT_FIELDS = {"context": 3, "pooled": 2}  # ranks of the arrays of all captions of an example
Dropped = Mapping[str, Mapping[str, list[str]]]  # examples left out: {split: {reason: names}}
# Fields of the configuration that choose examples, and are not applied a second time.
SELECTING = ("validation_share", "test_share", "fold", "split_key", "score_key", "min_score")
FORMAT = 3  # of the records; raise it when they change


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The settings of an encoded dataset.

    dataset: the name of the dataset it was made from.
    networks: fingerprints of the weights, by network: `vae`, and each text encoder whose embeddings
        are kept.
    dtype: of moments and embeddings, "float32" or "bfloat16".
    resolution, crop, buckets: as in the configuration; buckets {field: value}, or {} for squares.
    flipped: whether it has mirrored pictures too.
    selection: the fields of data.* that chose the examples, such as splits by hash; {} if none did.
    images: {name: kind} of data.images.
    numbers: {field: shape} of the numbers that were features of the dataset.
    """

    dataset: str
    networks: dict[str, str]
    dtype: str
    resolution: int
    crop: str
    buckets: dict[str, Any]
    flipped: bool
    selection: dict[str, Any]
    images: dict[str, str]
    numbers: dict[str, list[int]]
    format: int = FORMAT

    @property
    def has_text(self) -> bool:
        """Whether it has embeddings of the captions."""
        return set(self.networks) != {"vae"}

    @property
    def encoded_images(self) -> tuple[str, ...]:
        """The names of the pictures that are kept as moments, besides the main one."""
        return tuple(name for name, kind in self.images.items() if kind == "picture")

    @property
    def kept_images(self) -> tuple[str, ...]:
        """The names of the pictures that are kept as pixels."""
        return tuple(name for name, kind in self.images.items() if kind != "picture")


def write(folder: paths.Path, encoding: Encoding, dropped: Dropped) -> None:
    """Write encoding.json, which makes the folder an encoded dataset."""
    content = {**dataclasses.asdict(encoding), "dropped": dict(dropped)}
    paths.write_text(folder / FILE, json.dumps(content, indent=1) + "\n")


def read(folder: paths.PathLike) -> Encoding:
    """Read the encoding of a folder.

    Raises DataError when the folder holds no encoded dataset, or one of another format.
    """
    file = paths.to_path(folder) / FILE
    try:
        content = text_files.read_json(file)
        content.pop("dropped")
        found = Encoding(**content)
        for name in ("networks", "buckets", "selection", "images", "numbers"):
            if not isinstance(getattr(found, name), dict):
                raise TypeError(f"{name} is no object")
    except paths.storage_errors(ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"data.path is {str(folder)!r}, which has no readable {FILE} ({error}); expected the "
            "--output of `python -m sdjax.prepare --encode`, which writes it when all is encoded"
        ) from error
    if found.format != FORMAT:
        raise DataError(f"{file} is of format {found.format}, this is sdjax for {FORMAT}: encode "
                        "the dataset again")  # fmt: skip
    return found


def bucket_fields(config: DataConfig) -> dict[str, Any]:
    """The fields that decide the shape of a crop besides the resolution; {} for squares."""
    return dataclasses.asdict(config.buckets) if config.buckets.step else {}


def selection(config: DataConfig) -> dict[str, Any]:
    """The fields that choose the examples of a split; {} if none is set."""
    fields = {name: getattr(config, name) for name in SELECTING}
    return fields if any(fields[name] != value for name, value in _unselecting().items()) else {}


def unselected(config: DataConfig) -> DataConfig:
    """The configuration without any selection of examples."""
    return dataclasses.replace(config, **_unselecting())


def _unselecting() -> dict[str, Any]:
    """The values of the selecting fields that select nothing."""
    defaults = {f.name: f.default for f in dataclasses.fields(DataConfig)}
    return {name: defaults[name] for name in SELECTING}


def check(config: DataConfig, encoding: Encoding, networks: Mapping[str, str]) -> None:
    """Raise a DataError that lists every way in which training differs from the encoding.

    config: that of the dataset, one of `parts`. networks: the fingerprints to compare, of the run's
    networks.
    """
    compared: list[tuple[str, Any, Any]] = [
        ("resolution", config.resolution, encoding.resolution),
        ("crop", config.crop, encoding.crop),
        ("buckets", bucket_fields(config), encoding.buckets),
    ]
    # A run may cut splits out of an encoded dataset that has all examples.
    if encoding.selection:
        compared += [(n, getattr(config, n), encoding.selection[n]) for n in SELECTING]
    wrong = [
        f"data.{field} is {here!r}, encoded was {there!r}"
        for field, here, there in compared
        if here != there
    ]
    if config.flip and not encoding.flipped:
        wrong.append("data.flip is True, but no mirrored pictures were encoded")
    wrong += [
        f"the {name} is {fingerprint}, encoded was with {encoding.networks[name]}: other weights, "
        "settings or tokenizer"
        for name, fingerprint in networks.items()
        if encoding.networks[name] != fingerprint
    ]
    if wrong:
        raise DataError(
            f"data.path = {config.path!r} was encoded for something else:\n  "
            + "\n  ".join(wrong)
            + "\nset the fields as they were, or encode it again with this configuration"
        )


def check_images(config: DataConfig, encoding: Encoding) -> None:
    """Raise a DataError if the configuration asks for pictures that were not encoded."""
    wanted = named_images.kinds_of(config.images)
    if not wanted.items() <= encoding.images.items():
        raise DataError(
            f"data.images asks for {named_images.described(wanted)}, but data.path = "
            f"{config.path!r} was encoded with {named_images.described(encoding.images)}; set "
            "data.images to some of these, or encode it again with this configuration"
        )


def features(tfds: Any, encoding: Encoding) -> Any:
    """The TFDS features of a record: bytes of arrays (in `dtype`, row-major) with their shapes.

    moments [h, w, 2C]: mean and log-variance; NAME_moments of a named picture have their shape.
    NAME: the PNG of a condition or a mask. size int32 [4]: see `transforms.Prepared`.
    context [captions, L, D], pooled [captions, P]: of `text` and then each of `captions`.
    main_share: probability of `text`, see `Caption`. weight: of the loss, see
    data.weight_key. height, width: of the crop.
    """
    array = tfds.features.Text  # it keeps bytes as they are
    found = {
        "shape": tfds.features.Tensor(shape=(3,), dtype=np.int32),
        "size": tfds.features.Tensor(shape=(4,), dtype=np.int32),
        "text": tfds.features.Text(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "main_share": np.float64,
        "weight": np.float32,
        "file_name": tfds.features.Text(),
        "width": np.int32,
        "height": np.int32,
    }
    if encoding.flipped:
        found["size_flipped"] = tfds.features.Tensor(shape=(4,), dtype=np.int32)
    for field in named_images.moment_fields(encoding.encoded_images):
        for side in sides(encoding):
            found[f"{field}{side}"] = array()
    for name in encoding.kept_images:
        found[name] = array()
    for name, shape in encoding.numbers.items():
        found[name] = tfds.features.Tensor(shape=tuple(shape), dtype=np.float32)
    if encoding.has_text:
        for name, rank in TEXT_FIELDS.items():
            found[name] = array()
            found[f"{name}_shape"] = tfds.features.Tensor(shape=(rank,), dtype=np.int32)
    return tfds.features.FeaturesDict(found)


def sides(encoding: Encoding) -> tuple[str, ...]:
    """The endings of the features of a picture and, if it is kept, of the mirrored one."""
    return ("", "_flipped")[: 1 + encoding.flipped]


def example(
    record: Mapping[str, Any], encoding: Encoding, images: Iterable[NamedImage] = ()
) -> dict[str, Any]:
    """The arrays of a record: moments [h, w, 2C], size int32 [4], context and pooled if kept.

    "others" has the moments of those of `images` that were encoded, "images" the pixels of the
    others, uint8 [H, W, C]. What belongs to the mirrored picture is under "flipped". Moments and
    embeddings are views of the record, in its dtype.
    """
    kinds = named_images.kinds_of(images)
    pictures = [name for name, kind in kinds.items() if kind == "picture"]
    others = named_images.moment_fields(pictures)[1:]

    def side(ending: str) -> dict[str, Any]:
        moments = {
            field: unpack(record[f"{field}{ending}"], record["shape"], encoding.dtype)
            for field in ("moments", *others)
        }
        size = np.asarray(record[f"size{ending}"], np.int32)
        return {"moments": moments.pop("moments"), "others": moments, "size": size}

    found = side("")
    if encoding.flipped:
        found["flipped"] = side("_flipped")
    found["images"] = {
        name: from_png(record[name], kind) for name, kind in kinds.items() if kind != "picture"
    }
    for name in TEXT_FIELDS if encoding.has_text else ():
        if len(record[name]):
            found[name] = unpack(record[name], record[f"{name}_shape"], encoding.dtype)
    return found


def to_png(pixels: np.ndarray) -> bytes:
    """The PNG of uint8 [H, W, 3] or [H, W, 1]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


def from_png(data: bytes, kind: str) -> np.ndarray:
    """The pixels of `to_png`'s file: uint8 [H, W, 3], of a mask [H, W, 1]."""
    if kind == "mask":
        return np.asarray(transforms.decode_mask(data))[..., None]
    return transforms.decode(data)


def pack(array: np.ndarray, dtype: str) -> bytes:
    """The bytes of a float32 array in `dtype`, row-major."""
    return np.ascontiguousarray(array.astype(DTYPES[dtype])).tobytes()


def unpack(data: bytes, shape: Any, dtype: str) -> np.ndarray:
    """The array of `pack`'s bytes, in `dtype`."""
    return np.frombuffer(data, DTYPES[dtype]).reshape(tuple(shape))
