"""The choice of an example's words among its captions, tags and templates.

All randomness comes from the generator of the example's place in the stream.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from sdjax.errors import UserError

EMPTY = ("keep", "skip", "error")
# The words for sides, also in "leftmost", "right-hand" and the tag "looking_left"; not in "bright".
_SIDES = re.compile(r"(?<![^\W_])(left|right)(?=(most|wards?|hand(ed)?)?(?![^\W_]))", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
    """The settings that choose and vary the text of an example."""

    others_key: str = ""  # a feature of more captions, a sequence of texts; "" for none
    main_share: float = 0.5  # probability of data.text_key where there are others
    templates: tuple[str, ...] = ()  # for labels, besides data.label_template: all equally often
    texts: tuple[str, ...] = ()  # in place of captions, equally often; "{}" is the caption
    separator: str = ", "  # between tags: split there, and joined with it again
    shuffle_tags: bool = False  # tags in another order every time
    keep_tags: int = 0  # the first tags, as many, stay in front and are never dropped
    tag_dropout: float = 0.0  # probability that each other tag is left out
    # (least data.score_key, tags): an example gets those of the highest score that it reaches,
    # which are neither shuffled nor dropped.
    quality_tags: tuple[tuple[float, str], ...] = ()
    quality_first: bool = True  # before all other tags; False: after the first keep_tags
    swap_sides: bool = True  # of a mirrored picture "left" and "right" change places
    empty: str = "keep"  # examples without caption: "keep", "skip" (and count) or "error"

    def __post_init__(self) -> None:
        for field in ("main_share", "tag_dropout"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"data.captions.{field} is {getattr(self, field)}; expected 0 to 1")
        if self.keep_tags < 0:
            raise UserError(f"data.captions.keep_tags is {self.keep_tags}; expected 0 or more")
        if not self.separator.strip():
            raise UserError(f"data.captions.separator is {self.separator!r}; expected a sign "
                            "between tags, such as ', '")  # fmt: skip
        if self.empty not in EMPTY:
            raise UserError(f"data.captions.empty is {self.empty!r}; expected one of {EMPTY}")
        for least, tags in self.quality_tags:
            if math.isnan(least) or not _tags(tags, self):
                raise UserError(
                    f"data.captions.quality_tags has ({least}, {tags!r}); expected a number and "
                    "tags, such as (0.8, 'best quality')"
                )
        for template in self.templates:
            if "{}" not in template:
                raise UserError(f"data.captions.templates has {template!r}; expected a '{{}}' in "
                                "it, where the name of the class goes")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Caption:
    """The texts of one example, and the probability of the main one.

    kept: tags at the front that stay there, besides `CaptionConfig.keep_tags`.
    """

    main: str
    others: tuple[str, ...] = ()
    main_share: float = 1.0
    kept: int = 0


def replaced(caption: Caption, texts: tuple[str, ...]) -> Caption:
    """Return texts that take a caption's place, all equally probable; its main text fills "{}"."""
    main, *others = (text.replace("{}", caption.main) for text in texts)
    return Caption(main, tuple(others), 1 / len(texts))


def graded(caption: Caption, score: float, config: CaptionConfig) -> Caption:
    """Return a caption with the quality tags of an example's score; empty texts stay empty."""
    reached = [(least, tags) for least, tags in config.quality_tags if score >= least]
    if not reached:
        return caption
    quality = _tags(max(reached)[1], config)
    first = 0 if config.quality_first else config.keep_tags

    def with_quality(text: str) -> str:
        tags = _tags(text, config)
        return config.separator.join([*tags[:first], *quality, *tags[first:]] if tags else [])

    others = tuple(with_quality(text) for text in caption.others)
    return dataclasses.replace(
        caption, main=with_quality(caption.main), others=others, kept=len(quality)
    )


def choose(caption: Caption, config: CaptionConfig, rng: np.random.Generator) -> str:
    """Choose one of the captions and vary its tags. Nothing is drawn where there is no choice."""
    text = caption.main
    if caption.others and rng.random() >= caption.main_share:
        text = caption.others[int(rng.integers(len(caption.others)))]
    if config.shuffle_tags or config.tag_dropout:
        text = vary_tags(text, config, rng, kept=caption.kept)
    return text


def says_sides(text: str) -> bool:
    """Whether a text says left or right, in English."""
    return bool(_SIDES.search(text))


def swap_sides(text: str) -> str:
    """Return a text with "left" and "right" in one another's places, in their letter case."""

    def other(found: re.Match[str]) -> str:
        word = "right" if found[0].lower() == "left" else "left"
        if found[0].isupper():
            return word.upper()
        return word.capitalize() if found[0][0].isupper() else word

    return _SIDES.sub(other, text)


def vary_tags(text: str, config: CaptionConfig, rng: np.random.Generator, *, kept: int = 0) -> str:
    """Drop and shuffle the tags of a text; the first `keep_tags` and `kept` stay as they are."""
    tags, count = _tags(text, config), config.keep_tags + kept
    front, rest = tags[:count], tags[count:]
    if config.tag_dropout:
        stays = rng.random(len(rest)) >= config.tag_dropout
        rest = [tag for tag, stay in zip(rest, stays, strict=True) if stay]
    if config.shuffle_tags:
        rest = [rest[i] for i in rng.permutation(len(rest))]
    return config.separator.join(front + rest)


def _tags(text: str, config: CaptionConfig) -> list[str]:
    """The tags of a text, without blanks around them."""
    tags = (tag.strip() for tag in text.split(config.separator.strip()))
    return [tag for tag in tags if tag]
