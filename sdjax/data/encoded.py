"""Datasets encoded ahead of training: VAE moments in place of pictures, embeddings beside captions.

A folder of TFDS ArrayRecord files, one record an example (see `features`), and `encoding.json`
with the settings of the encoding. It has moments instead of latents, so that training draws fresh
latents from them every time (as in MLPerf and LDM).
The latent of a mirrored picture is not the mirrored latent to the bit. So mirrored pictures are
encoded too, or the dataset allows only training without `data.flip`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from sdjax.data.config import DataConfig, DataError
from sdjax.system import paths, text_files

FILE = "encoding.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TEXT_FIELDS = {"context": 3, "pooled": 2}  # ranks of the arrays of all captions of an example
Dropped = Mapping[str, Mapping[str, list[str]]]  # examples left out: {split: {reason: names}}
# Fields of the configuration that choose examples, and are not applied a second time.
SELECTING = ("validation_share", "test_share", "fold", "split_key", "score_key", "min_score")
FORMAT = 2  # of the records; raise it when they change


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
    """

    dataset: str
    networks: dict[str, str]
    dtype: str
    resolution: int
    crop: str
    buckets: dict[str, Any]
    flipped: bool
    selection: dict[str, Any]
    format: int = FORMAT

    @property
    def has_text(self) -> bool:
        """Whether it has embeddings of the captions."""
        return set(self.networks) != {"vae"}


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


def features(tfds: Any, *, flipped: bool, text: bool) -> Any:
    """The TFDS features of a record: bytes of arrays (in `dtype`, row-major) with their shapes.

    moments [h, w, 2C]: mean and log-variance. size int32 [4]: see `transforms.Prepared`.
    context [captions, L, D], pooled [captions, P]: of `text` and then each of `captions`.
    main_share: probability of `text`, see `Caption`. weight: of the loss, see
    data.weight_key. height, width: of the crop.
    """
    array = tfds.features.Text  # it keeps bytes as they are
    found = {
        "moments": array(),
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
    if flipped:
        found["moments_flipped"] = array()
        found["size_flipped"] = tfds.features.Tensor(shape=(4,), dtype=np.int32)
    if text:
        for name, rank in TEXT_FIELDS.items():
            found[name] = array()
            found[f"{name}_shape"] = tfds.features.Tensor(shape=(rank,), dtype=np.int32)
    return tfds.features.FeaturesDict(found)


def example(record: Mapping[str, Any], encoding: Encoding) -> dict[str, Any]:
    """The arrays of a record: moments [h, w, 2C], size int32 [4], context and pooled if kept.

    Those of the mirrored picture are under "flipped". All are views of the record, in its dtype.
    """
    found: dict[str, Any] = {
        "moments": unpack(record["moments"], record["shape"], encoding.dtype),
        "size": np.asarray(record["size"], np.int32),
    }
    if encoding.flipped:
        found["flipped"] = {
            "moments": unpack(record["moments_flipped"], record["shape"], encoding.dtype),
            "size": np.asarray(record["size_flipped"], np.int32),
        }
    for name in TEXT_FIELDS if encoding.has_text else ():
        if len(record[name]):
            found[name] = unpack(record[name], record[f"{name}_shape"], encoding.dtype)
    return found


def pack(array: np.ndarray, dtype: str) -> bytes:
    """The bytes of a float32 array in `dtype`, row-major."""
    return np.ascontiguousarray(array.astype(DTYPES[dtype])).tobytes()


def unpack(data: bytes, shape: Any, dtype: str) -> np.ndarray:
    """The array of `pack`'s bytes, in `dtype`."""
    return np.frombuffer(data, DTYPES[dtype]).reshape(tuple(shape))
