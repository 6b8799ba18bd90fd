"""The first step: a shard of raw data -> its usable examples, and an index of what is in it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from sdjax.data import transforms
from sdjax.data.image_files import ImageError
from sdjax.data.prepare.duplicates import difference_hash
from sdjax.data.prepare.index import Entry, Index, counts, read_index
from sdjax.data.prepare.settings import Place, Settings
from sdjax.data.raw import folder, formats
from sdjax.data.raw.clean import Example, clean
from sdjax.data.raw.rows import Row, Shard, Skip
from sdjax.system import paths

THUMBNAIL = 96  # pixels


def clean_shard(job: tuple[int, Shard], *, place: Place, settings: Settings) -> dict[str, int]:
    """Writes `place.cleaned` and `place.index` of a shard, unless they are there.

    Returns counts by reason, of what was used as "used".
    """
    from array_record.python import array_record_module

    number, shard = job
    if place.index(number).exists():
        return counts(read_index(place, number))
    passed_over: Counter[str] = Counter()
    index = Index([], [], {}, {})
    serialize = _serializer(settings.scores)
    tell = _teller(place, number, shard)
    with place.writing(place.cleaned(number)) as local:
        writer = array_record_module.ArrayRecordWriter(str(local), "group_size:1")
        for item in formats.read(shard, settings.fields, passed_over=passed_over):
            image = item.image if isinstance(item, Row) else None
            tell(len(image or b""))
            made = clean(item, settings.rules) if isinstance(item, Row) else item
            if isinstance(made, Skip):
                _note(index, made, image, settings)
            else:
                record = serialize(made)
                writer.write(record)
                index.entries.append(_entry(made, len(record)))
        writer.close()
    index.passed_over.update(passed_over)
    place.write_json(place.index(number), dataclasses.asdict(index))
    return counts(index)


def _teller(place: Place, number: int, shard: Shard) -> Callable[[int], None]:
    """Leaves a file that says how far a worker is: is told the bytes of each row's image."""
    if paths.is_remote(place.work):  # where a file costs a request
        return lambda size: None
    rows = seen = whole = 0
    told = time.monotonic()
    if shard.format != folder.FORMAT and not paths.is_remote(shard.path):
        with contextlib.suppress(OSError):  # which the reader reports
            whole = os.stat(shard.path).st_size

    def tell(size: int) -> None:
        nonlocal rows, seen, told
        rows, seen = rows + 1, seen + size
        if time.monotonic() > told + 1:
            told = time.monotonic()
            part = seen / whole if whole else rows / folder.ROWS_PER_SHARD
            with contextlib.suppress(OSError):  # of a full disk what matters more will tell
                place.part(number).write_text(f"{min(part, 0.99):.4f}")

    return tell


def how_far(place: Place, numbers: list[int]) -> Callable[[], float]:
    """A function that says how many of these shards are clean, parts of them counted."""

    def count() -> float:
        names = {path.name for path in place.work.iterdir()}
        left = [number for number in numbers if place.index(number).name not in names]
        begun = [place.part(number) for number in left if place.part(number).name in names]
        return len(numbers) - len(left) + sum(float(part.read_text() or 0) for part in begun)

    return count


@functools.cache
def features(scores: tuple[str, ...]) -> Any:
    """The TFDS features of the dataset."""
    from sdjax.data.builders.raw_import import feature_types
    from sdjax.data.tfds.tfds_on_cpu import tfds

    return tfds.features.FeaturesDict(feature_types(scores))


def _serializer(scores: tuple[str, ...]) -> Callable[[Example], bytes]:
    """Example -> the bytes of a record as TFDS writes it, the same ones in every process."""
    from sdjax.data.builders.raw_import import feature_values
    from sdjax.data.tfds.tfds_on_cpu import tfds

    types = features(scores)
    maker = tfds.core.example_serializer.ExampleSerializer(types.get_serialized_info())

    def serialize(example: Example) -> bytes:
        encoded = types.encode_example(feature_values(example))
        # TFDS leaves the order of the features to protobuf, which draws it anew in each process.
        return maker.get_tf_example(encoded).SerializeToString(deterministic=True)

    return serialize


def _entry(example: Example, size: int) -> Entry:
    height, width = example.pixels.shape[:2]
    shape = f"{width}x{height} ".encode()
    return Entry(
        name=example.name,
        split=example.split,
        digest=hashlib.sha256(shape + example.pixels.tobytes()).hexdigest()[:32],
        alike=f"{difference_hash(example.pixels):016x}",
        width=width,
        height=height,
        bytes=size,
        chars=len(example.text),
        captions=1 + len(example.captions),
        scores=list(example.scores.values()),
        changed=list(example.changed),
    )


def _note(index: Index, skip: Skip, image: bytes | None, settings: Settings) -> None:
    """Lists what was left out, with a small picture of the first ones of each reason."""
    index.skips.append(skip)
    shown = index.thumbnails.setdefault(skip.reason, [])
    if len(shown) < settings.thumbnails:
        shown.append((skip.name, skip.detail, thumbnail(image, settings.rules.pixel_limit)))


def thumbnail(encoded: bytes | None, max_pixels: int) -> str:
    """A small JPEG in base64; "" where nothing can be seen."""
    try:
        pixels = transforms.decode(encoded or b"", max_pixels=max_pixels)
    except ImageError:
        return ""
    small = Image.fromarray(np.ascontiguousarray(pixels))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=75)
    return base64.b64encode(buffer.getvalue()).decode()


def read_records(place: Place, number: int, rows: list[int]) -> list[bytes]:
    """Examples of a shard of the input, serialised, by their numbers."""
    from array_record.python import array_record_module

    if not rows:
        return []
    with paths.reading(place.cleaned(number)) as local:
        reader = array_record_module.ArrayRecordReader(str(local))
        records = reader.read(rows)
        reader.close()
    return records
