"""Pictures of a run for the report: small enough to be carried inside the page."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from etils import epath
from PIL import Image

from sdjax.data.image_files import read_image
from sdjax.system import paths, text_files

T = TypeVar("T")
SIDE = 960  # pixels, of the longer side; a grid of 16 with its captions stays readable
QUALITY = 80
MOST_PICTURES = 48  # read and shrunk, which takes some 20 ms each
SAMPLE_BYTES = 3_500_000  # of all grids together; base64 makes a third more of them
STRIP_COLUMNS = 20  # steps of a strip
STRIP_BYTES = 600_000  # of all strips, as they stand in the page
_NAME = re.compile(r"0*(\d+)(?:-(.+))?\.png")
_STRIP = re.compile(r"strip(?:-(.+))?\.png")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    uri: a data: address. size: (width, height). prompts: "" if the file names none. step: the one
    that a grid was drawn at.
    """

    name: str
    uri: str
    size: tuple[int, int]
    prompts: str = ""
    step: int = 0

    @property
    def bytes(self) -> int:
        """The size of its part of the page."""
        return len(self.uri)


@dataclasses.dataclass(frozen=True)
class Row:
    """The grids of one kind over time. kind: "" or what their names say after the step."""

    kind: str
    pictures: tuple[Picture, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The step of each picture."""
        return tuple(picture.step for picture in self.pictures)

    @property
    def prompts(self) -> list[str]:
        """The prompts of the newest grid."""
        return [line for line in text_files.lines(self.pictures[-1].prompts) if line.strip()]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """The pictures of a run.

    rows: by kind. strips: (kind, strip.png or its like). found: grids in the folder, of which those
    in `rows` are shown. unreadable: names of files that are no pictures.
    """

    rows: tuple[Row, ...]
    strips: tuple[tuple[str, Picture], ...]
    found: int
    unreadable: tuple[str, ...]

    @property
    def shown(self) -> int:
        """How many grids are on the page."""
        return sum(len(row.pictures) for row in self.rows)


EMPTY = Gallery((), (), 0, ())


def embed(path: paths.Path, *, side: int = SIDE) -> Picture:
    """Read a picture and shrink it to `side` pixels at most, as WebP.

    Raises:
        OSError, ValueError: it cannot be read, or is no picture.
    """
    stat = epath.Path(path).stat()
    return _embed(path, side, stat.length, stat.mtime)


# A run that refreshes its report reads only what is new; a large grid takes half a second.
@functools.lru_cache(maxsize=2 * MOST_PICTURES)
def _embed(path: paths.Path, side: int, length: int, mtime: float) -> Picture:
    """Embed the file that has this length and this time."""
    image = read_image(path)
    texts = getattr(image, "text", {})
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return packed(path.name, small, str(texts.get("prompts", "")))


def packed(name: str, image: Image.Image, prompts: str = "") -> Picture:
    """Return an RGB picture as WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=2)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(name, uri, image.size, prompts)


def embed_strip(path: paths.Path) -> Picture:
    """Read a strip as `strips.append_column` writes it, and thin its columns to STRIP_COLUMNS.

    Raises:
        OSError, ValueError: it cannot be read, or is no picture.
    """
    image = read_image(path)
    steps = re.findall(r"\d+", str(getattr(image, "text", {}).get("steps", "")))
    sheet = image.convert("RGB")
    if len(steps) <= STRIP_COLUMNS or sheet.width % len(steps):
        sheet.thumbnail((4 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
        return packed(path.name, sheet)
    width = sheet.width // len(steps)
    chosen = evenly(range(len(steps)), STRIP_COLUMNS)
    thinned = Image.new("RGB", (width * len(chosen), sheet.height))
    for place, column in enumerate(chosen):
        box = (column * width, 0, (column + 1) * width, sheet.height)
        thinned.paste(sheet.crop(box), (place * width, 0))
    return packed(path.name, thinned)


def gather(workdir: paths.PathLike) -> Gallery:
    """Read the grids of WORKDIR/samples: STEP.png, STEP-KIND.png and strip.png, strip-KIND.png.

    Of more than fit, those shown are spread evenly over the steps, the first and last included.
    """
    folder = paths.to_path(workdir) / "samples"
    if not folder.exists():
        return EMPTY
    kinds: dict[str, dict[int, paths.Path]] = {}
    for path in sorted(folder.glob("*.png"), key=lambda p: p.name):
        match = _NAME.fullmatch(path.name)
        if match:
            kinds.setdefault(match[2] or "", {})[int(match[1])] = path
    unreadable: list[str] = []

    def read(embed: Callable[[paths.Path], Picture], path: paths.Path) -> list[Picture]:
        """The picture, or none."""
        try:
            return [embed(path)]
        except paths.storage_errors(ValueError, SyntaxError):  # of a PNG cut short
            unreadable.append(path.name)
            return []

    most = max(2, MOST_PICTURES // max(1, len(kinds)))
    rows = []
    for kind, by_step in sorted(kinds.items()):
        chosen = strided(sorted(by_step), most)
        grids = [(step, picture) for step in chosen for picture in read(embed, by_step[step])]
        rows.append(Row(kind, tuple(dataclasses.replace(p, step=step) for step, p in grids)))
    while sum(p.bytes for row in rows for p in row.pictures) > SAMPLE_BYTES * 4 / 3:
        longest = max(len(row.pictures) for row in rows)
        if longest <= 2:
            break
        rows = [Row(row.kind, tuple(evenly(row.pictures, -(-longest // 2)))) for row in rows]
    strips, room = [], STRIP_BYTES
    for path in sorted(folder.glob("strip*.png"), key=lambda p: p.stem):
        if match := _STRIP.fullmatch(path.name):
            fitting = [strip for strip in read(embed_strip, path) if strip.bytes <= room]
            strips += [(match[1] or "", strip) for strip in fitting]
            room -= sum(strip.bytes for strip in fitting)
    found = sum(len(by_step) for by_step in kinds.values())
    kept = tuple(row for row in rows if row.pictures)
    return Gallery(kept, tuple(strips), found, tuple(unreadable))


def strided(items: Sequence[int], most: int) -> list[int]:
    """Return at most `most` items: every one, or every second, fourth, ..., and the last.

    Unlike `evenly` it mostly keeps to its choice as more of them come, and so to what is cached.
    """
    stride = 1
    while -(-len(items) // stride) + 1 > most and stride < len(items):
        stride *= 2
    return list(dict.fromkeys([*items[::stride], *items[-1:]]))


def evenly(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` items, spread evenly, with the first and the last."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))]
