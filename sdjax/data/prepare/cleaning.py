"""The first step: a shard of raw data -> its usable examples, and an index of them."""

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
from sdjax.data.named_images import NamedImage
from sdjax.data.prepare.duplicates import difference_hash
from sdjax.data.prepare.index import Index, IndexEntry, counts, read_index
from sdjax.data.prepare.settings import Settings, Workspace
from sdjax.data.raw import folder, formats, mended
from sdjax.data.raw.clean import Example, clean
from sdjax.data.raw.rows import Row, Shard, Skip
from sdjax.errors import UserError
from sdjax.system import paths, text_files

THUMBNAIL = 96  # pixels


def clean_shard(
    job: tuple[int, Shard], *, workspace: Workspace, settings: Settings
) -> dict[str, int]:
    """Write `workspace.cleaned` and `workspace.index` of a shard, unless they exist.

    Returns counts by reason; the count of usable examples is "used".
    """
    from array_record.python import array_record_module

    number, shard = job
    if workspace.index(number).exists():
        return counts(read_index(workspace, number))
    passed_over: Counter[str] = Counter()
    index = Index([], [], {}, {})
    serialize = _serializer(settings.scores, settings.fields.images)
    note_row = _progress_writer(workspace, number, shard)
    with workspace.writing(workspace.cleaned(number)) as local:
        writer = array_record_module.ArrayRecordWriter(str(local), "group_size:1")
        for item in formats.read(shard, settings.fields, passed_over=passed_over):
            image = item.image if isinstance(item, Row) else None
            note_row(len(image or b""))
            made = _mended(item, settings) if isinstance(item, Row) else item
            if isinstance(made, Skip):
                _note(index, made, image, settings)
            else:
                record = serialize(made)
                writer.write(record)
                index.entries.append(_entry(made, len(record)))
        writer.close()
    index.passed_over.update(passed_over)
    workspace.write_json(workspace.index(number), dataclasses.asdict(index))
    return counts(index)


def _mended(row: Row, settings: Settings) -> Example | Skip:
    """Clean a row with the caption that --captions_from has for it, if it has one."""
    captions = (
        mended.of_run(settings.captions_from, settings.captions_sha256)
        if settings.captions_from
        else {}
    )
    if row.name not in captions:
        return clean(row, settings.rules)
    made = clean(dataclasses.replace(row, text=captions[row.name]), settings.rules)
    if isinstance(made, Skip):
        return made
    return dataclasses.replace(made, changed=("caption_mended", *made.changed))


def _progress_writer(workspace: Workspace, number: int, shard: Shard) -> Callable[[int], None]:
    """Return a function of each row's image bytes, which writes the worker's progress to a file."""
    if paths.is_remote(workspace.work):  # there a file costs a request
        return lambda size: None
    rows = seen = whole = 0
    written = time.monotonic()
    if shard.format != folder.FORMAT and not paths.is_remote(shard.path):
        with contextlib.suppress(OSError):  # the reader reports it
            whole = os.stat(shard.path).st_size

    def note_row(size: int) -> None:
        nonlocal rows, seen, written
        rows, seen = rows + 1, seen + size
        if time.monotonic() > written + 1:
            written = time.monotonic()
            part = seen / whole if whole else rows / folder.ROWS_PER_SHARD
            with contextlib.suppress(OSError):  # more important writes report a full disk
                workspace.part(number).write_text(f"{min(part, 0.99):.4f}")

    return note_row


def how_far(workspace: Workspace, numbers: list[int]) -> Callable[[], float]:
    """A function that returns how many of these shards are clean, parts of them counted."""

    def share(part: paths.Path) -> float:
        try:
            found = float(text_files.read_text(part, most=100) or 0)
        except (UserError, ValueError):  # it is told, and no more
            return 0.0
        return found if 0 <= found <= 1 else 0.0

    def count() -> float:
        names = {path.name for path in workspace.work.iterdir()}
        left = [number for number in numbers if workspace.index(number).name not in names]
        begun = [workspace.part(number) for number in left if workspace.part(number).name in names]
        return len(numbers) - len(left) + sum(share(part) for part in begun)

    return count


@functools.cache
def features(scores: tuple[str, ...], images: tuple[NamedImage, ...] = ()) -> Any:
    """The TFDS features of the dataset."""
    from sdjax.data.builders.raw_import import feature_types
    from sdjax.data.tfds.tfds_on_cpu import tfds

    return tfds.features.FeaturesDict(feature_types(scores, images))


def _serializer(
    scores: tuple[str, ...], images: tuple[NamedImage, ...]
) -> Callable[[Example], bytes]:
    """A function from an example to the bytes of TFDS's record, the same in every process."""
    from sdjax.data.builders.raw_import import feature_values
    from sdjax.data.tfds.tfds_on_cpu import tfds

    types = features(scores, images)
    maker = tfds.core.example_serializer.ExampleSerializer(types.get_serialized_info())

    def serialize(example: Example) -> bytes:
        encoded = types.encode_example(feature_values(example))
        # TFDS leaves the order of the features to protobuf, where it differs between processes.
        return maker.get_tf_example(encoded).SerializeToString(deterministic=True)

    return serialize


def _entry(example: Example, size: int) -> IndexEntry:
    """The index entry of an example."""
    height, width = example.pixels.shape[:2]
    shape = f"{width}x{height} ".encode()
    digest = hashlib.sha256(shape + example.pixels.tobytes())
    for encoded in example.images.values():  # pictures of one subject may differ in these alone
        digest.update(encoded)
    return IndexEntry(
        name=example.name,
        split=example.split,
        digest=digest.hexdigest()[:32],
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
    """Add a skip to the index, with a small picture for the first ones of each reason."""
    index.skips.append(skip)
    shown = index.thumbnails.setdefault(skip.reason, [])
    if len(shown) < settings.thumbnails:
        shown.append((skip.name, skip.detail, thumbnail(image, settings.rules.pixel_limit)))


def thumbnail(encoded: bytes | None, max_pixels: int) -> str:
    """A small JPEG in base64; "" if the picture cannot be decoded."""
    try:
        pixels = transforms.decode(encoded or b"", max_pixels=max_pixels)
    except ImageError:
        return ""
    small = Image.fromarray(np.ascontiguousarray(pixels))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=75)
    return base64.b64encode(buffer.getvalue()).decode()


def read_records(workspace: Workspace, number: int, rows: list[int]) -> list[bytes]:
    """Examples of a shard of the input, serialised, by their numbers."""
    from array_record.python import array_record_module

    if not rows:
        return []
    with paths.reading(workspace.cleaned(number)) as local:
        reader = array_record_module.ArrayRecordReader(str(local))
        records = reader.read(rows)
        reader.close()
    return records
