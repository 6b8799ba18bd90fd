"""Pictures to look at: a folder of them, or a dataset that `sdjax.prepare` wrote."""

from __future__ import annotations

import dataclasses
import functools
import io
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from sdjax.data import transforms
from sdjax.data.config import DataConfig
from sdjax.data.image_files import ImageError, open_image
from sdjax.data.raw import folder as raw_folder
from sdjax.data.raw.files import PathGuard
from sdjax.data.raw.limits import MOST_PICTURE_BYTES
from sdjax.data.raw.rows import BadRow, Fields
from sdjax.errors import UserError
from sdjax.system import paths

INFO = "dataset_info.json"  # of a prepared dataset
MOST = 500_000  # pictures of a collection
MOST_SIZES = 50_000  # pictures whose headers are read for the buckets
SIDES = (256, 1024)  # pixels of a shown picture's longer side, at most


@dataclasses.dataclass(frozen=True)
class Item:
    """A picture: its name, the split it is in, and its caption."""

    name: str
    split: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Opened:
    """The pictures of a folder.

    picture: the number of an item -> the picture, upright, of any mode.
    size: the number of an item -> (height, width), (0, 0) where it cannot be read.
    notes: lines about what is left out.
    """

    items: Sequence[Item]
    picture: Callable[[int], Image.Image]
    size: Callable[[int], tuple[int, int]]
    notes: tuple[str, ...] = ()


class Collection:
    """A folder that was named at the start; it is opened when somebody looks.

    raw: whether it is a folder of pictures, else what `sdjax.prepare` wrote.
    """

    def __init__(self, name: str, folder: paths.Path):
        self.name, self.folder = name, folder
        self.raw = not paths.exists(folder / INFO)
        self._lock = threading.Lock()
        self._opened: Opened | None = None
        self._sizes: np.ndarray | None = None
        self._numbers: dict[str, int] | None = None

    def open(self) -> Opened:
        """Return the pictures. Raises UserError: there are none."""
        with self._lock:
            if self._opened is None:
                self._opened = _open_folder(self.folder) if self.raw else _prepared(self.folder)
            return self._opened

    def item(self, number: int) -> Item:
        """Return a picture's facts. Raises UserError."""
        items = self.open().items
        if not 0 <= number < len(items):
            raise UserError(f"number is {number}; {self.name} has {len(items)} pictures, from 0")
        return items[number]

    def number(self, name: str) -> int | None:
        """Return the number of a picture by its name."""
        items = self.open().items
        if self._numbers is None:
            self._numbers = {item.name: i for i, item in enumerate(items)}
        return self._numbers.get(name)

    def shown(self, number: int, side: int) -> bytes:
        """Return a picture as WebP, at most `side` pixels wide and high.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        name = self.item(number).name
        try:
            return _small(self, number, side)
        except (BadRow, ImageError) as error:
            raise UserError(f"{name[:200]!r} cannot be shown: {error}") from error
        except paths.storage_errors() as error:
            raise UserError(f"{name[:200]!r} cannot be read: {type(error).__name__}") from error

    def sizes(self) -> np.ndarray:
        """Return height and width of the first pictures, int [N, 2]; 0 where not readable."""
        opened = self.open()
        with self._lock:
            if self._sizes is None:
                count = min(len(opened.items), MOST_SIZES)
                self._sizes = np.array([opened.size(i) for i in range(count)], int).reshape(-1, 2)
            return self._sizes


@functools.lru_cache(maxsize=512)
def _small(collection: Collection, number: int, side: int) -> bytes:
    image = transforms.to_rgb(collection.open().picture(number))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=80, method=2)
    return out.getvalue()


def _text(value: Any) -> str:
    """Return a caption as text, whatever is in its place."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text.strip().encode("utf-8", "replace").decode()


def _open_folder(folder: paths.Path) -> Opened:
    survey = raw_folder.survey(str(folder), Fields(), outside=False)
    items: list[Item] = []
    for shard in survey.shards:
        for name, split, caption in raw_folder.described(shard):
            items.append(Item(name, split, _text(caption)))
            if len(items) >= MOST:
                break
    inside = PathGuard(str(folder), outside=False)

    def encoded(number: int) -> bytes:
        return inside.read(folder / items[number].name, MOST_PICTURE_BYTES, "too_many_bytes")

    def picture(number: int) -> Image.Image:
        image = open_image(encoded(number))
        image.draft("RGB", (SIDES[-1], SIDES[-1]))  # a large JPEG need not be decoded whole
        try:
            return transforms.upright(image)
        except Exception as error:  # decoders raise any error for damaged data
            raise ImageError("corrupt", type(error).__name__) from error

    def size(number: int) -> tuple[int, int]:
        try:
            return transforms.upright_size(encoded(number))
        except paths.storage_errors(BadRow, ImageError):
            return 0, 0

    return Opened(items, picture, size, tuple(survey.lines()))


def _prepared(folder: paths.Path) -> Opened:
    from sdjax.data.builders.opening import prepared_builder
    from sdjax.data.sources import open_source

    config = DataConfig(name="prepared", path=str(folder))
    splits = list(prepared_builder(config).info.splits)
    sources = [open_source(config, split) for split in splits]
    items: list[Item] = []
    places: list[tuple[int, int]] = []
    for which, (split, source) in enumerate(zip(splits, sources, strict=True)):
        for index, text in enumerate(source.texts()[: MOST - len(items)]):
            items.append(Item(source.key(index), split, _text(text)))
            places.append((which, index))

    def picture(number: int) -> Image.Image:
        which, index = places[number]
        found = sources[which].example(index)["image"]
        return found if isinstance(found, Image.Image) else Image.fromarray(np.asarray(found))

    def size(number: int) -> tuple[int, int]:
        which, index = places[number]
        return sources[which].size(index)

    return Opened(items, picture, size, tuple(sources[0].notes) if sources else ())
