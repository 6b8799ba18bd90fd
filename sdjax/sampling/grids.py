"""Pictures on disk: PNG files that carry their settings, and contact sheets with captions."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sdjax.system import paths


def save_png(
    path: paths.PathLike, image: np.ndarray, settings: Mapping[str, object] | None = None
) -> None:
    """Write uint8 [H, W, 3]; each setting becomes a PNG text field."""
    info = PngInfo()
    for name, value in (settings or {}).items():
        info.add_itxt(name, str(value))
    path = paths.to_path(path)
    paths.make_folder(path.parent)
    with paths.writing(path) as local:
        Image.fromarray(image).save(local, format="PNG", pnginfo=info)


def grid(
    images: np.ndarray | Sequence[np.ndarray],
    captions: Sequence[str] = (),
    *,
    columns: int | None = None,
    min_side: int = 128,
) -> np.ndarray:
    """Contact sheet of uint8 [N, H, W, 3], each with its caption underneath.

    Small pictures are enlarged by whole factors (nearest) to `min_side`, so that captions fit.

    Returns:
        uint8 [H', W', 3].
    """
    images = np.asarray(images)
    count, height, width = images.shape[:3]
    columns = columns or max(1, int(np.ceil(np.sqrt(count))))
    factor = max(1, -(-min_side // width))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(size=11)
    chars = max(8, int(width / font.getlength("abcdefghij") * 10))
    texts = [textwrap.wrap(c, chars)[:4] for c in captions] or [[]] * count
    line = 13
    text_height = 4 + line * max(len(t) for t in texts) if captions else 0
    gap = 6
    rows = -(-count // columns)
    sheet = Image.new(
        "RGB",
        (gap + columns * (width + gap), gap + rows * (height + text_height + gap)),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x = gap + (i % columns) * (width + gap)
        y = gap + (i // columns) * (height + text_height + gap)
        tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        for row, words in enumerate(text):
            pen.text((x, y + height + 2 + row * line), words, fill="black", font=font)
    return np.asarray(sheet)
