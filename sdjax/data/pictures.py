"""Sets of pictures to evaluate or to compare with: folders and datasets, read in stretches."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from sdjax.data import pipeline, transforms
from sdjax.data.config import DataConfig, parts
from sdjax.data.image_files import ImageError, read_encoded
from sdjax.data.named_images import NamedImage
from sdjax.data.raw.files import safe_name
from sdjax.data.raw.metadata import read_rows
from sdjax.data.raw.rows import BadRow
from sdjax.errors import UserError
from sdjax.system import paths

STRETCH = 512  # pictures that are in memory at once
METADATA = "metadata.jsonl"  # of the imagefolder convention: file_name and text in each line
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Pictures(Protocol):
    """A set of pictures of one size."""

    @property
    def name(self) -> str:
        """The name of the set in files and messages."""
        ...

    @property
    def captions(self) -> Sequence[str]:
        """One caption for each picture; empty if there are none."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """The pictures start..stop-1, uint8 [stop - start, H, W, 3]."""
        ...


def stretches(pictures: Pictures) -> Iterator[np.ndarray]:
    """All pictures in order, `STRETCH` at a time: uint8 [n, H, W, 3]."""
    for start in range(0, len(pictures), STRETCH):
        yield pictures.read(start, min(start + STRETCH, len(pictures)))


@dataclasses.dataclass(frozen=True)
class Folder:
    """The picture files of one folder, resized and cropped to one size.

    Attributes:
      files: in order.
      captions: one for each file, or none.
      size: (height, width) of the pictures; others are resized to cover it and cropped in the
        middle.
    """

    name: str
    files: tuple[paths.Path, ...]
    captions: tuple[str, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The pictures start..stop-1, see `Pictures`; UserError if a file is unreadable."""
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(self._read, self.files[start:stop])))

    def _read(self, file: paths.Path) -> np.ndarray:
        return fitted(_decoded(file), self.size)


def open_folder(
    folder: paths.PathLike, *, size: tuple[int, int] | None = None, count: int | None = None
) -> Folder:
    """Open the pictures of a folder, with the captions of its metadata.jsonl if it has one.

    Args:
      size: (height, width) of the result; by default that of the first picture.
      count: the number of pictures to take, from the first on.

    Raises:
      UserError: it is no folder, has no pictures, or its metadata cannot be read.
    """
    folder = paths.to_path(folder)
    if not paths.exists(folder) or not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected one with pictures")
    captions: dict[str, str] = {}
    metadata = folder / METADATA
    if metadata.exists():
        try:
            captions = {safe_name(row["file_name"]): str(row["text"]) for row in _rows(metadata)}
        except (KeyError, TypeError, BadRow) as error:
            raise UserError(
                f'{metadata}: expected {{"file_name": ..., "text": ...}} in every line ({error!r})'
            ) from error
        files = [folder / name for name in captions]
    else:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    files = files[:count]
    if not files:
        raise UserError(f"{folder} has no pictures ({', '.join(SUFFIXES)})")
    if size is None:
        first = _decoded(files[0])
        size = first.shape[:2]
    return Folder(str(folder), tuple(files), tuple(captions.values())[: len(files)], size)


def _rows(metadata: paths.Path) -> Iterator[dict[str, Any]]:
    """The rows of a metadata file; UserError if one is bad."""
    for line, row in read_rows(metadata):
        if isinstance(row, BadRow):
            raise UserError(f"{metadata} line {line}: {row}; mend the line")
        yield row


def _decoded(file: paths.Path) -> np.ndarray:
    """The decoded picture of a file, uint8 [H, W, 3]; UserError if it is unreadable."""
    try:
        return transforms.decode(read_encoded(file))
    except paths.storage_errors(ImageError) as error:
        raise UserError(f"{file}: not a picture that can be read ({error})") from error


def fitted(image: Any, size: tuple[int, int]) -> np.ndarray:
    """Resize a picture to cover `size` and crop the middle, as training does: uint8 [H, W, 3].

    image: uint8 [H, W, 3] or Pillow's.
    """
    return _cropped(image, size, {}).pixels


def _cropped(image: Any, size: tuple[int, int], images: Mapping[str, Any]) -> transforms.Prepared:
    rng = np.random.default_rng(0)  # not used by a crop of the middle
    return transforms.prepare(
        image, rng, height=size[0], width=size[1], crop="center", flip=False, images=images
    )


@dataclasses.dataclass(frozen=True)
class SplitPictures:
    """The pictures of a dataset's split, as training takes them but cropped in the middle.

    images: the pictures that an example has besides its main one, see `named`.
    """

    sources: tuple[pipeline.Source, ...]
    size: tuple[int, int]
    split: str
    count: int
    images: tuple[NamedImage, ...] = ()

    @property
    def name(self) -> str:
        """The name of the dataset and the split."""
        return " + ".join(source.name for source in self.sources) + f" {self.split}"

    def __len__(self) -> int:
        return self.count

    def _place(self, index: int) -> tuple[pipeline.Source, int]:
        """The source of a picture, and its number there."""
        for source in self.sources:
            if index < len(source):
                return source, index
            index -= len(source)
        raise IndexError(index)

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """The main caption of each picture."""
        places = (self._place(i) for i in range(self.count))
        return tuple(source.text(i) for source, i in places)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The pictures start..stop-1, see `Pictures`."""
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(self._read, range(start, stop))))

    def _read(self, index: int) -> np.ndarray:
        source, i = self._place(index)
        return fitted(source.example(i)["image"], self.size)

    def named(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The pictures of examples with those of data.images, {name: uint8 [n, H, W, C]}.

        "image" is the main one. All are cropped in the middle.
        """
        with ThreadPoolExecutor() as pool:
            rows = list(pool.map(self._named, indices))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _named(self, index: int) -> dict[str, np.ndarray]:
        source, i = self._place(index)
        example = source.example(i)
        made = _cropped(example["image"], self.size, example["images"])
        return {"image": made.pixels, **made.images}

    def identity(self) -> dict[str, Any]:
        """The key of cached features, JSON-able: it differs between different sets of pictures."""
        captions = hashlib.sha256("\n".join(self.captions).encode()).hexdigest()[:16]
        return {
            "dataset": self.name,
            "size": list(self.size),
            "count": self.count,
            "captions": captions,
        }


def open_split(
    config: DataConfig, split: str, *, size: tuple[int, int], count: int | None = None
) -> SplitPictures:
    """Open the first `count` pictures of a split, all by default.

    The parts of a mixture follow one another.

    Raises:
      DataError: there is no such dataset or split.
    """
    sources = tuple(pipeline.open_parts(config, split))
    total = sum(len(source) for source in sources)
    count = total if count is None else min(total, count)
    return SplitPictures(sources, size, split, count, config.images)


def has_pictures(config: DataConfig) -> bool:
    """Whether the dataset has pictures, and not moments alone."""
    return all(part.name != "encoded" for part in parts(config))
