"""The pictures that an example has besides its main one: a condition, a mask, the other of a pair.

They share the geometry of the main picture: one resize, one crop, one flip and one bucket for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from sdjax.data.conditions import CONDITIONS
from sdjax.errors import UserError

KINDS = ("picture", "condition", "mask")
# The main picture, grey where the picture "mask" is white; datasets that are encoded ahead have it.
MASK, MASKED = "mask", "masked"
ALPHA = "alpha"  # the key of a mask that is the alpha channel of the main picture
# Fields of batches, records and examples; beginnings and endings of others.
_TAKEN = ("image", "moments", "shape", "size", "weight", "context", "pooled", "text", "caption",
          "captions", "main_share", "file_name", "width", "height", "original_width", "name",
          "original_height", "flipped", "images", "numbers", "target", "original")  # fmt: skip
_BEGINNINGS, _ENDINGS = ("tokens",), ("_moments", "_flipped", "_shape")


@dataclasses.dataclass(frozen=True)
class NamedImage:
    """A picture besides the main one, with the same resize, crop, flip and bucket.

    Raises UserError where a field is out of its range or does not go with another.
    """

    name: str = ""  # the field of a batch, such as "control", "mask" or "before"
    key: str = ""  # where it is read, see docs/data.md; "" is the name
    # "picture" is RGB in [-1, 1], "condition" RGB in [0, 1], "mask" one channel in [0, 1].
    kind: str = "picture"
    made: str = ""  # a condition made of the main picture, such as "canny", and not read

    def __post_init__(self) -> None:
        if self.made and self.made not in CONDITIONS:
            raise UserError(f"made is {self.made!r}; expected '' or one of {tuple(CONDITIONS)}")
        if self.made and (self.kind != "condition" or self.key):
            raise UserError(
                f"made is {self.made!r}, with kind {self.kind!r} and key {self.key!r}; expected "
                "the kind 'condition' and no key: it is made of the main picture"
            )
        if self.kind not in KINDS:
            raise UserError(f"kind is {self.kind!r}; expected one of {KINDS}")
        if (
            not self.name.isidentifier()
            or self.name in _TAKEN
            or self.name.startswith(_BEGINNINGS)
            or self.name.endswith(_ENDINGS)
        ):
            raise UserError(
                f"name is {self.name!r}; expected a word such as 'control' or 'mask', which no "
                "other field of a batch has"
            )

    @property
    def origin(self) -> str:
        """The key, or the name where the key is empty."""
        return self.key or self.name

    @property
    def is_alpha(self) -> bool:
        """Whether it is the alpha channel of the main picture, in raw data."""
        return self.kind == "mask" and self.key == ALPHA

    @property
    def channels(self) -> int:
        """The number of channels: 1 of a mask, 3 of others."""
        return 1 if self.kind == "mask" else 3


def check(images: Iterable[NamedImage]) -> None:
    """Raise a UserError if two pictures have one name."""
    names = [image.name for image in images]
    if len(set(names)) < len(names):
        raise UserError(f"data.images has the names {names}; expected names that differ")


def stored(images: Iterable[NamedImage]) -> tuple[NamedImage, ...]:
    """Return the pictures that are read, and not made of the main one."""
    return tuple(image for image in images if not image.made)


def kinds_of(images: Iterable[NamedImage]) -> dict[str, str]:
    """The kinds of the pictures by name."""
    return {image.name: image.kind for image in images}


def parse(text: str) -> NamedImage:
    """Return the picture of "NAME=KEY", "NAME=KEY:KIND" or "NAME". Raises UserError."""
    name, _, rest = text.partition("=")
    key, _, kind = rest.rpartition(":") if ":" in rest else (rest, "", "")
    return NamedImage(name, key, kind or "picture")


def described(kinds: Mapping[str, str]) -> str:
    """Words for pictures by name: "control (condition), mask (mask)"."""
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"


def moment_fields(names: Iterable[str]) -> tuple[str, ...]:
    """The fields of moments: of the main picture and of those that are named."""
    return ("moments", *(f"{name}_moments" for name in names))
