"""The cleaning of a row into an example that training can use, or a skip with the reason.

Every way of reading raw data goes through `clean`, so all agree on which rows are usable.
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
from PIL import Image

from sdjax.data import transforms
from sdjax.data.image_files import MOST_PIXELS, ImageError, damaged, open_image
from sdjax.data.named_images import NamedImage
from sdjax.data.raw.limits import MOST_CAPTION_BYTES, MOST_CAPTION_CHARS
from sdjax.data.raw.rows import ORIGINAL, BadRow, Row, Skip, raised, shown
from sdjax.system import text_files

# White space, and zero-width characters that are none to str.split().
_BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u2060\ufeff"
WHITE = (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class ScoreRule:
    """A number of each row that is kept with it, and the range of usable values."""

    column: str
    low: float = -math.inf
    high: float = math.inf


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules for usable images and captions, and for changes to them; 0 is no limit."""

    min_side: int = 16
    max_aspect: float = 8.0  # long side over short side
    max_pixels: int = transforms.MAX_PIXELS  # refused before decoding
    orient: bool = True  # turn by EXIF; if not, keep the pixels as they are in the file
    convert_modes: bool = True  # convert other modes to RGB of 8 bits; if not, skip them
    background: tuple[int, int, int] = WHITE  # under transparent pixels
    min_caption_chars: int = 1  # 0 keeps pictures without a caption
    max_caption_chars: int = 0
    collapse_spaces: bool = True  # any white space becomes one space, none at the ends
    unescape_html: bool = False  # &amp; -> &
    strip_control: bool = False  # control characters that are not white space
    drop_pattern: str = ""  # captions that contain this regular expression are skipped
    scores: tuple[ScoreRule, ...] = ()
    images: tuple[NamedImage, ...] = dataclasses.field(default=(), repr=False)

    @property
    def pixel_limit(self) -> int:
        """The limit `max_pixels`, or Pillow's own, which is the largest."""
        return self.max_pixels or MOST_PIXELS


@dataclasses.dataclass(frozen=True)
class Example:
    """A usable row: the encoded image as it is stored, and its captions, cleaned."""

    name: str
    split: str
    image: bytes
    pixels: np.ndarray  # uint8 [H, W, 3], upright
    text: str
    captions: tuple[str, ...]  # alternatives to text
    scores: dict[str, float]
    original: tuple[int, int]  # height and width, before it was stored smaller if the row has them
    changed: tuple[str, ...] = ()  # the changes, in words for counting
    images: dict[str, bytes] = dataclasses.field(default_factory=dict)  # encoded, by name


def clean(row: Row, rules: Rules) -> Example | Skip:
    """Check and mend one row; any error is a reason to skip it.

    Skips for the reasons of `transforms.decode`, and: missing_image, too_small, aspect_ratio,
    size_differs, colour_mode, no_caption, caption_not_text, bad_encoding, caption_too_short,
    caption_too_long, caption_pattern, git_lfs_pointer, no_score, score, bad_record.
    """
    try:
        return _cleaned(row, rules)
    except Exception as error:
        return Skip(shown(row.place or row.name), *raised(error))


def _cleaned(row: Row, rules: Rules) -> Example | Skip:
    """The result of `clean`, unless an unexpected error is raised."""
    try:
        if shown(row.name) != row.name:
            raise BadRow("bad_encoding", "a name that is not UTF-8")
        text, captions, mended = clean_captions(row.text, row.captions, rules)
        scores = _scores(row, rules)
        if row.image is None:
            raise BadRow("missing_image")
        image, pixels, changed = checked(row.image, rules)
        images = {one.name: _named(row, one, pixels, rules) for one in rules.images}
    except BadRow as bad:
        detail = row.sought if bad.reason == "no_caption" and not bad.detail else bad.detail
        return Skip(shown(row.place or row.name), bad.reason, shown(detail))
    except ImageError as bad:
        # Pillow calls a file that is cut off in its header corrupt, but its message has the reason.
        cut = bad.reason == "corrupt" and "truncated" in bad.detail.lower()
        return Skip(shown(row.name), "truncated" if cut else bad.reason, shown(bad.detail))
    original = _original(row, pixels, turned="turned_upright" in changed)
    changed = mended + changed
    return Example(
        row.name, row.split, image, pixels, text, captions, scores, original, changed, images
    )


def _named(row: Row, named: NamedImage, main: np.ndarray, rules: Rules) -> bytes:
    """The bytes to store of a named picture. Raises BadRow and ImageError, which name it."""
    what = f"the picture {named.name!r}"
    encoded = row.image if named.is_alpha else row.images.get(named.name)
    if encoded is None:
        raise BadRow("missing_image", f"{what}, of the key {named.origin!r}")
    try:
        if named.kind == "mask":
            stored, pixels = _checked_mask(encoded, named, rules)
        else:
            stored, pixels, _ = checked(encoded, rules)
        transforms.check_geometry(named.name, transforms.size_of(pixels), main.shape[:2])
    except ImageError as bad:
        raise ImageError(bad.reason, f"{what}: {bad.detail}") from bad
    return stored


def _checked_mask(encoded: bytes, named: NamedImage, rules: Rules) -> tuple[bytes, np.ndarray]:
    """The PNG of a mask, and its pixels, uint8 [H, W]. Raises ImageError as `checked`."""
    try:
        mask = transforms.decode_mask(
            encoded, alpha=named.is_alpha, orient=rules.orient, max_pixels=rules.pixel_limit
        )
        pixels = np.asarray(mask)
        return _png(pixels), pixels
    except ImageError:
        raise
    except Exception as error:
        raise damaged(error) from error


def clean_captions(
    text: Any, others: Any, rules: Rules
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The main caption, its alternatives, which never repeat it, and the changes to it.

    A list as the main caption gives both. Alternatives that cannot be used are left out.
    Raises BadRow when the main one cannot be used.
    """
    main, *rest = text if isinstance(text, list) and text else [text]
    main, changed = _caption(main, rules)
    rest += others if isinstance(others, list) else [others]
    good: dict[str, None] = {}
    for other in rest:
        try:
            good[_caption(other, rules)[0]] = None
        except BadRow:
            continue
    good.pop(main, None)
    good.pop("", None)
    return main, tuple(good), changed


def _caption(text: Any, rules: Rules) -> tuple[str, tuple[str, ...]]:
    """A caption after the rules, and the changes to it. Raises BadRow if it cannot be used."""
    if isinstance(text, bytes):
        if len(text) > MOST_CAPTION_BYTES:
            raise BadRow("caption_too_long", f"{len(text):,} bytes")
        reason = "git_lfs_pointer" if text_files.is_pointer(text) else "bad_encoding"
        try:
            text = text_files.decode(text)
        except text_files.TextError as error:
            raise BadRow(reason, f"a caption: {error}") from error
    if text is None or text == []:
        text = ""
    if not isinstance(text, str):
        raise BadRow("caption_not_text", f"a {type(text).__name__}")
    if len(text) > MOST_CAPTION_CHARS:
        detail = f"{len(text):,} characters; at most {MOST_CAPTION_CHARS:,} are read"
        raise BadRow("caption_too_long", detail)
    if shown(text) != text:
        raise BadRow("bad_encoding", "half of a surrogate pair")
    text, changed = _mended(text, rules)
    if not text.strip(_BLANK):
        if rules.min_caption_chars:
            raise BadRow("no_caption", "blank" if text else "")
        return "", ()
    if len(text) < rules.min_caption_chars:
        raise BadRow("caption_too_short", f"{text!r}: {len(text)} characters")
    if rules.max_caption_chars and len(text) > rules.max_caption_chars:
        raise BadRow("caption_too_long", f"{len(text)} characters")
    if rules.drop_pattern and re.search(rules.drop_pattern, text):
        raise BadRow("caption_pattern", text[:200])
    return text, changed


def _mended(text: str, rules: Rules) -> tuple[str, tuple[str, ...]]:
    """A caption after the rules, and words for the changes to it."""
    changed = []
    if rules.unescape_html and (plain := html.unescape(text)) != text:
        text = plain
        changed.append("caption_html")
    if rules.strip_control:
        kept = "".join(c for c in text if c.isspace() or unicodedata.category(c) != "Cc")
        if kept != text:
            text = kept
            changed.append("caption_control")
    if rules.collapse_spaces:
        ends = text.strip(_BLANK)  # every .txt ends in a new line, which counts as no change
        text = " ".join(text.split()).strip(_BLANK)
        if text != ends:
            changed.append("caption_spaces")
    return text, tuple(changed)


def _scores(row: Row, rules: Rules) -> dict[str, float]:
    """The scores of a row. Raises BadRow if one is missing or out of its range."""
    scores = {}
    for rule in rules.scores:
        try:
            value = float(row.columns[rule.column])
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise BadRow("no_score", f"no number {rule.column!r}") from error
        if not rule.low <= value <= rule.high:  # false for NaN, too
            raise BadRow("score", f"{rule.column} {value:g}")
        scores[rule.column] = value
    return scores


def _original(row: Row, pixels: np.ndarray, *, turned: bool) -> tuple[int, int]:
    """The height and width that the row states, if they can be those before a reduction."""
    height, width = pixels.shape[:2]
    try:
        high, wide = (int(row.columns[name]) for name in ORIGINAL)
    except (TypeError, ValueError, KeyError, OverflowError):
        return height, width
    if turned and (high > wide) != (height > width):
        high, wide = wide, high  # they are the size in the file, before turning
    possible = height <= high < 2**31 and width <= wide < 2**31
    return (high, wide) if possible else (height, width)


def checked(encoded: bytes, rules: Rules) -> tuple[bytes, np.ndarray, tuple[str, ...]]:
    """The bytes to store of an image, their pixels, uint8 [H, W, 3], and the changes.

    A plain RGB PNG, JPEG or WebP is stored as it is, else as a PNG of its pixels.
    Raises ImageError with the reasons of `transforms.decode`, or too_small, aspect_ratio or
    colour_mode.
    """
    try:
        return _checked(encoded, rules)
    except ImageError:
        raise
    except Exception as error:
        raise damaged(error) from error


def _checked(encoded: bytes, rules: Rules) -> tuple[bytes, np.ndarray, tuple[str, ...]]:
    image = open_image(encoded, max_pixels=rules.pixel_limit)
    short, long = sorted(image.size)
    if short < rules.min_side:
        raise ImageError("too_small", f"short side {short}; min_side {rules.min_side}")
    if rules.max_aspect and long > rules.max_aspect * short:
        raise ImageError(
            "aspect_ratio", f"{image.size[0]}x{image.size[1]}; max_aspect {rules.max_aspect:g}"
        )
    modes, turned = _colour_modes(image), transforms.is_turned(image)
    changed = ["first_frame"] if _is_animated(image) else []
    changed += modes
    changed += ["turned_upright"] if turned and rules.orient else []
    plain = transforms.is_plain_rgb(image) and not modes
    pixels = transforms.decode(encoded, max_pixels=rules.pixel_limit)
    if modes and not rules.convert_modes:
        raise ImageError("colour_mode", " and ".join(modes))
    if plain:
        return encoded, pixels, tuple(changed)
    if (turned and not rules.orient) or ("transparency" in modes and rules.background != WHITE):
        pixels = _otherwise(encoded, rules)
    return _png(pixels), pixels, (*changed, "stored_as_png")


def _colour_modes(image: Image.Image) -> list[str]:
    """Words for the conversions to RGB of 8 bits; [] for none."""
    words = {"P": "palette", "CMYK": "cmyk", "1": "grey", "L": "grey", "LA": "grey"}
    found = []
    # Pillow has no mode for colours of 16 bits, and reads them as 8.
    if image.mode.startswith("I") or any(
        ";16" in str(tile[3]) for tile in getattr(image, "tile", ())
    ):
        found.append("16_bit")
    if image.has_transparency_data:
        found.append("transparency")
    if image.mode in words:
        found.append(words[image.mode])
    elif image.mode not in ("RGB", "RGBA") and not found:
        found.append(f"mode_{image.mode}")
    return found


def _is_animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:
        return False  # the second frame is damaged, but only the first is used


def _otherwise(encoded: bytes, rules: Rules) -> np.ndarray:
    """The pixels of a sound image after rules that differ from those of `transforms.decode`."""
    image = open_image(encoded, max_pixels=rules.pixel_limit)
    image.load()
    if rules.orient:
        image = transforms.upright(image)
    if image.has_transparency_data and not image.mode.startswith("I"):
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*rules.background, 255))
        image = Image.alpha_composite(below, image)
    return np.asarray(transforms.to_rgb(image).convert("RGB"))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
