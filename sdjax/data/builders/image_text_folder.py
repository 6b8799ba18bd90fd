"""TFDS builder `image_text_folder`: a folder of images with captions in `metadata.jsonl`.

The stored dataset is keyed by a fingerprint of the folder (metadata, file names, sizes and times),
so a folder that changed is imported anew. Whatever cannot be used is left out and listed with the
reason in `skipped.json` beside the dataset.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from sdjax.data import transforms
from sdjax.data.builders.folder_metadata import Record, Scan, Skip, scan_folder
from sdjax.data.sources import FORMAT, DataConfig, DataError, prepare_builder
from sdjax.data.tfds_on_cpu import quiet_tfds, tfds

SKIP_REPORT = "skipped.json"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Which images are used; max_aspect 0 is any."""

    min_side: int = 16
    max_aspect: float = 8.0
    max_pixels: int = transforms.MAX_PIXELS


@dataclasses.dataclass(eq=False)
class FolderConfig(tfds.core.BuilderConfig):
    """A scanned folder, and what of it is good enough."""

    scan: Scan | None = dataclasses.field(default=None, repr=False)
    limits: Limits = Limits()
    text_key: str = "text"


def folder_config(scan: Scan, limits: Limits, text_key: str) -> FolderConfig:
    """Names the import by the folder and by a fingerprint of all that its content depends on."""
    identity = f"{scan.fingerprint} {limits}"
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    base = re.sub(r"[^A-Za-z0-9_]+", "_", scan.folder.resolve().name).strip("_") or "folder"
    return FolderConfig(name=f"{base}-{fingerprint}", scan=scan, limits=limits, text_key=text_key)


class ImageTextFolder(tfds.core.GeneratorBasedBuilder):
    """Images and captions imported from a folder.

    Features: image (the file's own bytes where they are a plain RGB PNG, JPEG or WebP, a PNG of
    what was decoded where they are not), the caption by its name in the metadata, and file_name.
    Raise VERSION whenever an image would be chosen or stored in another way.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "PNG, JPEG and WebP as they are, everything else as PNG."}
    url_infos = None  # nothing is downloaded

    def _info(self) -> Any:
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    self.builder_config.text_key: tfds.features.Text(),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=None,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        scan = self.builder_config.scan
        self._skipped = list(scan.skipped)
        generators = {}
        for split, records in scan.splits.items():
            # A split without a single usable image must not be written: look for the first.
            first = next((i for i, record in enumerate(records) if self._load(record)), None)
            if first is None:
                logging.warning("%s: no usable image for the split %s", scan.folder, split)
            else:
                generators[split] = self._generate_examples(records[first:])
        if not generators:
            raise DataError(
                f"data.path is {str(scan.folder)!r}, of which not one image can be used: "
                f"{summary(self._skipped)}; first of them: {_line(self._skipped[0])}"
            )
        return generators

    def _generate_examples(self, records: list[Record]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, record in enumerate(records):
            encoded = self._load(record)
            if encoded is not None:
                example = {"image": io.BytesIO(encoded), "file_name": record.file_name}
                yield index, {**example, self.builder_config.text_key: record.text}
        # data_path is the unfinished dataset here, so the report appears together with it.
        report = [dataclasses.asdict(skip) for skip in self._skipped]
        (self.data_path / SKIP_REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False))

    def _load(self, record: Record) -> bytes | None:
        """An image as it will be stored, checked by decoding all of it; None if it is skipped."""
        limits = self.builder_config.limits
        try:
            encoded = (self.builder_config.scan.folder / record.file_name).read_bytes()
            return checked(encoded, limits)
        except transforms.ImageError as error:
            self._skipped.append(Skip(record.file_name, error.reason, error.detail))
        except OSError as error:
            self._skipped.append(Skip(record.file_name, "missing_file", str(error)))
        return None


def checked(encoded: bytes, limits: Limits) -> bytes:
    """Image bytes -> the bytes to store: the same if plain RGB, else a PNG of what they show.

    Raises ImageError with the reasons of `transforms.decode`, or too_small or aspect_ratio.
    """
    image = transforms.open_image(encoded, max_pixels=limits.max_pixels)
    short, long = sorted(image.size)
    if short < limits.min_side:
        raise transforms.ImageError("too_small", f"short side {short}; min_side {limits.min_side}")
    if limits.max_aspect and long > limits.max_aspect * short:
        raise transforms.ImageError(
            "aspect_ratio", f"{image.size[0]}x{image.size[1]}; max_aspect {limits.max_aspect:g}"
        )
    plain = transforms.is_plain_rgb(image)
    pixels = transforms.decode(encoded, max_pixels=limits.max_pixels)
    return encoded if plain else _png(pixels)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def summary(skipped: list[Skip]) -> str:
    """Counts by reason, as in "3 skipped (2 truncated, 1 no_caption)"."""
    reasons = Counter(skip.reason for skip in skipped).most_common()
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
    return f"{len(skipped)} skipped" + (f" ({counts})" if counts else "")


def _line(skip: Skip) -> str:
    return f"{skip.name}: {skip.reason}" + (f" ({skip.detail})" if skip.detail else "")


@functools.cache
def _warn_once(message: str) -> None:
    logging.warning(message)


def read_skipped(builder: Any) -> list[Skip]:
    """What the import left out, from its report."""
    report = json.loads((builder.data_path / SKIP_REPORT).read_text())
    return [Skip(**entry) for entry in report]


def prepare(config: DataConfig) -> Any:
    """Imports config.path unless that very content is there already; reports what is left out.

    Raises DataError when nothing is usable, or more is skipped than config.max_bad_examples.
    """
    scan = scan_folder(config.path, text_key=config.text_key)
    limits = Limits(config.min_side, config.max_aspect, config.max_pixels)
    with quiet_tfds():
        builder = ImageTextFolder(
            config=folder_config(scan, limits, config.text_key),
            data_dir=config.data_dir or None,
            file_format=FORMAT,
        )
    prepare_builder(builder)
    skipped = read_skipped(builder)
    report = Path(builder.data_path) / SKIP_REPORT
    if skipped:
        _warn_once(f"{config.path}: {summary(skipped)}, listed in {report}")
    if 0 <= config.max_bad_examples < len(skipped):
        some = "\n  ".join(_line(skip) for skip in skipped[:10])
        raise DataError(
            f"{config.path}: {summary(skipped)}, more than data.max_bad_examples = "
            f"{config.max_bad_examples}; mend them or raise the limit. All are in {report}:\n"
            f"  {some}"
        )
    return builder
