"""The records of a stored TFDS dataset, whose features are decoded on demand.

TFDS decodes all features of a record, each through the description of nested ones that it might be.
For moments and small pictures that takes longer than everything else. Bytes, numbers and arrays
need none of that. Other features of numbers and texts go through TFDS. Pictures and sounds do not:
their decoders would take bytes of unknown origin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.data.config import DataError

Reader = Callable[[Any], Any]  # one feature of a tf.train.Example -> its value


class Records:
    """Random access to the examples of a split: len(), and records[i] -> a Record.

    builder: a TFDS builder, as read from its files. decoders: {feature: SkipDecoding()} for
    features that stay bytes.
    """

    def __init__(self, builder: Any, split: str, decoders: Mapping[str, Any]):
        from sdjax.data.tfds.tfds_on_cpu import tfds

        self.features = builder.info.features
        self.decoders = dict(decoders)
        self._stored = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        found = {key: _bytes if key in decoders else _reader(feature, tfds)
                 for key, feature in self.features.items()}  # fmt: skip
        self.readers = {key: reader for key, reader in found.items() if reader is not None}
        self.composed = {key: tfds.features.FeaturesDict({key: feature})
                         for key, feature in self.features.items()
                         if key not in self.decoders and _is_plain(feature, tfds)}  # fmt: skip

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> Record:
        return Record(self._stored[index], self)

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """Several records at once, in a fraction of the time."""
        return [Record(data, self) for data in self._stored.__getitems__(indices)]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


class Record(Mapping[str, Any]):
    """One example, {feature: value}; every value is None if the storage gave nothing."""

    def __init__(self, data: bytes, records: Records):
        from tensorflow_datasets.proto import tf_example_pb2  # this does not load TensorFlow

        self._data = data
        self._records = records
        self._values = tf_example_pb2.Example.FromString(data).features.feature

    def __getitem__(self, key: str) -> Any:
        if key not in self._records.features:
            raise KeyError(key)
        if not self._data:
            return None
        reader = self._records.readers.get(key)
        if reader is not None and key in self._values:
            return reader(self._values[key])
        if key in self._records.composed:
            return self._records.composed[key].deserialize_example_np(self._data)[key]
        kind = type(self._records.features[key]).__name__
        missing = "is missing" if reader is not None else f"is a {kind}, which is not read here"
        raise DataError(f"its feature {key!r} {missing}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._records.features)

    def __len__(self) -> int:
        return len(self._records.features)


def _reader(feature: Any, tfds: Any) -> Reader | None:
    """The reader of a simple feature, whose values are those of TFDS; None for other features."""
    kind = type(feature)
    if kind is tfds.features.Text:
        return _bytes
    if kind is tfds.features.Sequence and type(feature.feature) is tfds.features.Text:
        return _all_bytes
    if kind is tfds.features.ClassLabel:
        return Numbers(np.dtype(feature.np_dtype), ())
    if kind in (tfds.features.Tensor, tfds.features.Scalar):
        dtype, shape = np.dtype(feature.np_dtype), feature.shape
        stored_plainly = feature.get_serialized_info().np_dtype == dtype  # not as bytes
        if dtype.kind in "iuf" and stored_plainly and None not in shape:
            return Numbers(dtype, tuple(shape))
    return None


def _is_plain(feature: Any, tfds: Any) -> bool:
    """Whether a feature consists of numbers and texts, which numpy alone decodes."""
    kinds = tfds.features
    if type(feature) is kinds.FeaturesDict:
        return all(_is_plain(inner, tfds) for inner in feature.values())
    if type(feature) is kinds.Sequence:
        return _is_plain(feature.feature, tfds)
    plain = (kinds.Tensor, kinds.Scalar, kinds.Text, kinds.ClassLabel, kinds.BBoxFeature)
    # A few bytes of zlib may become any number of bytes.
    return type(feature) in plain and feature._encoding != kinds.Encoding.ZLIB


def _bytes(value: Any) -> bytes:
    return value.bytes_list.value[0]


def _all_bytes(value: Any) -> list[bytes]:
    return list(value.bytes_list.value)


class Numbers:
    """A reader of numbers of one type, a single one as Python's. A class, for worker processes."""

    def __init__(self, dtype: np.dtype, shape: tuple[int, ...]):
        self.dtype = dtype
        self.shape = shape

    def __call__(self, value: Any) -> Any:
        stored = value.int64_list if value.HasField("int64_list") else value.float_list
        array = np.array(stored.value, self.dtype)
        return array.reshape(self.shape) if self.shape else array.item()
