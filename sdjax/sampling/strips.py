"""The same pictures at one step after another, as columns of one PNG that grows to the right."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sdjax.data.image_files import read_image
from sdjax.sampling.grids import save_png
from sdjax.system import paths

GAP, HEADER = 4, 16  # pixels


def append_column(
    path: paths.PathLike, step: int, images: np.ndarray, *, rows: int = 8, side: int = 96
) -> list[int]:
    """Add the first `rows` of uint8 [N, H, W, 3] to the PNG, made if it is not there.

    Columns of this step and later ones, which a run that went back to a checkpoint draws again, are
    cut off first. Which steps there are stands in the PNG's text field "steps". A file of pictures
    of another number or size is begun anew.

    Args:
        side: height of a picture in the strip, in pixels.

    Returns:
        The steps of the columns.
    """
    images = np.asarray(images)[:rows]
    height, width = side, max(1, round(side * images.shape[2] / images.shape[1]))
    size = (width + GAP, HEADER + len(images) * (height + GAP))
    path = paths.to_path(path)
    steps, old = _read(path, size)
    kept = [s for s in steps if s < step]
    sheet = Image.new("RGB", ((len(kept) + 1) * size[0], size[1]), "white")
    if kept:
        sheet.paste(old.crop((0, 0, len(kept) * size[0], size[1])), (0, 0))
    x = len(kept) * size[0]
    font = ImageFont.load_default(size=11)
    ImageDraw.Draw(sheet).text((x + 1, 1), str(step), fill="black", font=font)
    larger = images.shape[1] < height
    how = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    for i, image in enumerate(images):
        tile = Image.fromarray(image).resize((width, height), how)
        sheet.paste(tile, (x, HEADER + i * (height + GAP)))
    kept.append(step)
    save_png(path, np.asarray(sheet), {"steps": ",".join(map(str, kept))})
    return kept


def _read(path: paths.Path, size: tuple[int, int]) -> tuple[list[int], Image.Image]:
    """The steps of a strip whose columns have this (width, height), and its picture."""
    nothing: tuple[list[int], Image.Image] = ([], Image.new("RGB", (1, 1)))
    if not paths.exists(path):
        return nothing
    try:
        image = read_image(path)
        steps = [int(step) for step in image.text["steps"].split(",")]  # type: ignore[attr-defined]
    except (OSError, AttributeError, KeyError, ValueError):  # not ours, or half a file
        return nothing
    if image.size != (len(steps) * size[0], size[1]):
        return nothing
    return steps, image.convert("RGB")
