"""What becomes of a row: an example that training can use, or a skip with the reason.

Every way of bringing data in goes through `clean`, so that they agree on what is usable.
"""

from __future__ import annotations

import dataclasses
import html
import io
import math
import re
import unicodedata
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sdjax.data import transforms
from sdjax.data.raw.rows import BadRow, Row, Skip, shown

_INVISIBLE = "\u200b\u2060\ufeff"  # zero-width characters that str.split() does not count as space
WHITE = (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class ScoreRule:
    """A number of each row that is kept with it, and which values of it are good enough."""

    column: str
    low: float = -math.inf
    high: float = math.inf


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which images and captions are used, and how they are changed; 0 is no limit."""

    min_side: int = 16
    max_aspect: float = 8.0  # long side over short side
    max_pixels: int = transforms.MAX_PIXELS  # refused before decoding
    background: tuple[int, int, int] = WHITE  # under what is transparent
    min_caption_chars: int = 1
    max_caption_chars: int = 0
    unescape_html: bool = False  # &amp; -> &
    strip_control: bool = False  # control characters that are not white space
    drop_pattern: str = ""  # a caption in which this regular expression is found is not used
    scores: tuple[ScoreRule, ...] = ()


@dataclasses.dataclass(frozen=True)
class Example:
    """A usable row: the encoded image as it is stored, and its captions, cleaned."""

    name: str
    split: str
    image: bytes
    pixels: np.ndarray  # uint8 [H, W, 3], what the image shows, upright
    text: str
    captions: tuple[str, ...]  # others than text
    scores: dict[str, float]


def clean(row: Row, rules: Rules) -> Example | Skip:
    """Checks and mends one row.

    Skips for the reasons of `transforms.decode`, and: missing_image, too_small, aspect_ratio,
    no_caption, caption_not_text, bad_encoding, caption_too_short, caption_too_long,
    caption_pattern, no_score, score.
    """
    try:
        if shown(row.name) != row.name:
            raise BadRow("bad_encoding", "a name that is not UTF-8")
        text, captions = clean_captions(row.text, row.captions, rules)
        scores = _scores(row, rules)
        if row.image is None:
            raise BadRow("missing_image")
        image, pixels = checked(row.image, rules)
    except BadRow as bad:
        return Skip(shown(row.place or row.name), bad.reason, shown(bad.detail))
    except transforms.ImageError as bad:
        # Cut off in the header, a file is corrupt to Pillow, which knows the reason all the same.
        cut = bad.reason == "corrupt" and "truncated" in bad.detail.lower()
        return Skip(shown(row.name), "truncated" if cut else bad.reason, shown(bad.detail))
    return Example(row.name, row.split, image, pixels, text, captions, scores)


def clean_captions(text: Any, others: Any, rules: Rules) -> tuple[str, tuple[str, ...]]:
    """The main caption and its alternatives, which never repeat it.

    A list as the main caption gives both. Alternatives that cannot be used are left out.
    Raises BadRow when the main one cannot be used.
    """
    main, *rest = text if isinstance(text, list) and text else [text]
    main = _caption(main, rules)
    rest += others if isinstance(others, list) else [others]
    good: dict[str, None] = {}
    for other in rest:
        try:
            good[_caption(other, rules)] = None
        except BadRow:
            continue
    good.pop(main, None)
    return main, tuple(good)


def _caption(text: Any, rules: Rules) -> str:
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadRow("bad_encoding", "a caption that is not UTF-8") from error
    if text is None or text == []:
        raise BadRow("no_caption")
    if not isinstance(text, str):
        raise BadRow("caption_not_text", f"a {type(text).__name__}")
    if shown(text) != text:
        raise BadRow("bad_encoding", "half of a surrogate pair")
    if rules.unescape_html:
        text = html.unescape(text)
    if rules.strip_control:
        text = "".join(c for c in text if c.isspace() or unicodedata.category(c) != "Cc")
    text = " ".join(text.split()).strip(_INVISIBLE + " ")
    if not text:
        raise BadRow("no_caption", "blank")
    if len(text) < rules.min_caption_chars:
        raise BadRow("caption_too_short", f"{text!r}: {len(text)} characters")
    if rules.max_caption_chars and len(text) > rules.max_caption_chars:
        raise BadRow("caption_too_long", f"{len(text)} characters")
    if rules.drop_pattern and re.search(rules.drop_pattern, text):
        raise BadRow("caption_pattern", text[:200])
    return text


def _scores(row: Row, rules: Rules) -> dict[str, float]:
    scores = {}
    for rule in rules.scores:
        try:
            value = float(row.columns[rule.column])
        except (TypeError, ValueError, KeyError) as error:
            raise BadRow("no_score", f"no number {rule.column!r}") from error
        if not rule.low <= value <= rule.high:  # false for NaN, too
            raise BadRow("score", f"{rule.column} {value:g}")
        scores[rule.column] = value
    return scores


def checked(encoded: bytes, rules: Rules) -> tuple[bytes, np.ndarray]:
    """Image bytes -> the bytes to store, and their pixels, uint8 [H, W, 3].

    A plain RGB PNG, JPEG or WebP is stored as it is, else a PNG of what it shows.
    Raises ImageError with the reasons of `transforms.decode`, or too_small or aspect_ratio.
    """
    image = transforms.open_image(encoded, max_pixels=rules.max_pixels)
    short, long = sorted(image.size)
    if short < rules.min_side:
        raise transforms.ImageError("too_small", f"short side {short}; min_side {rules.min_side}")
    if rules.max_aspect and long > rules.max_aspect * short:
        raise transforms.ImageError(
            "aspect_ratio", f"{image.size[0]}x{image.size[1]}; max_aspect {rules.max_aspect:g}"
        )
    plain = transforms.is_plain_rgb(image)
    pixels = transforms.decode(encoded, max_pixels=rules.max_pixels)
    if plain:
        return encoded, pixels
    if rules.background != WHITE and image.has_transparency_data:
        pixels = _on_background(encoded, rules.background)
    return _png(pixels), pixels


def _on_background(encoded: bytes, background: tuple[int, int, int]) -> np.ndarray:
    """A transparent image, known to be sound, over a colour -> uint8 [H, W, 3]."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGBA")
    below = Image.new("RGBA", image.size, (*background, 255))
    return np.asarray(Image.alpha_composite(below, image).convert("RGB"))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
