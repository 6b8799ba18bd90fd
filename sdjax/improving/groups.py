"""Groups of prompts: by the attributes that captions of captioned_shapes state, by words, by tags.

A prompt is in every group that its caption names, so groups overlap.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from sdjax.data.builders import shapes
from sdjax.errors import UserError

KINDS = ("auto", "attributes", "words", "tags")
PAIR = "colour and shape"  # of one object; it is not blamed where its colour or its shape is
OBJECTS = "objects"
_TAGS = 3  # tags of a caption, at least, that make it a list of them
_WORD = re.compile(r"[^\W\d_][\w'-]+")
# Words that say nothing of what is in a picture: articles, prepositions, pronouns, forms of "be",
# and what captions call themselves.
_EMPTY = frozenset(
    """a an the and or of in on at to by for from with without into onto over under as is are was
    were be been being it its this that these those there their his her he she they them i you we
    my your our some any no not one two three four has have had while who which very picture photo
    image drawing photograph""".split()
)


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of prompts.

    kind: "colour", "shape", PAIR, "size", "position", "relation", OBJECTS, "word" or "tag".
    value: as "red", "red circle", "2".
    """

    kind: str
    value: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.value}"

    @classmethod
    def parse(cls, text: str) -> Group:
        """Return the group that `str` has written."""
        kind, _, value = text.partition(": ")
        return cls(kind, value)


GroupsOf = Callable[[str], frozenset[Group]]


def attributes(caption: str) -> frozenset[Group]:
    """The groups of a caption of captioned_shapes. Raises ValueError for any other."""
    wanted = shapes.parse_caption(caption)
    found = {Group(OBJECTS, str(len(wanted)))}
    for one in wanted:
        found |= {
            Group("colour", one.colour),
            Group("shape", one.shape),
            Group(PAIR, f"{one.colour} {one.shape}"),
        }
        for kind in ("size", "position", "relation"):
            if value := getattr(one, kind):
                found.add(Group(kind, value))
    return frozenset(found)


def words(caption: str) -> frozenset[Group]:
    """The words of a caption, in lower case, without those that describe nothing."""
    found = set(_WORD.findall(caption.lower())) - _EMPTY
    return frozenset(Group("word", word) for word in found)


def tags(caption: str, separator: str = ",") -> frozenset[Group]:
    """The texts between separators, in lower case."""
    found = {tag.strip().lower() for tag in caption.split(separator.strip() or separator)}
    return frozenset(Group("tag", tag) for tag in found - {""})


def choose(how: str, captions: Sequence[str], separator: str = ",") -> tuple[str, GroupsOf]:
    """Return the kind of groups, and what gives those of a caption.

    "auto" is attributes where all captions are of captioned_shapes, tags where most have several
    separators, and words otherwise.

    Raises:
        UserError: attributes were asked for, and a caption states none.
    """

    def of_tags(caption: str) -> frozenset[Group]:
        return tags(caption, separator)

    strange = _first_strange(captions)
    if how == "attributes" and strange is not None:
        raise UserError(
            f"--group_by=attributes: {strange!r} is no caption of captioned_shapes; group by words "
            "or tags"
        )
    if how == "auto":
        several = sum(len(of_tags(caption)) >= _TAGS for caption in captions)
        how = (
            "attributes" if strange is None else "tags" if 2 * several > len(captions) else "words"
        )
    return how, {"attributes": _attributes_or_none, "words": words, "tags": of_tags}[how]


def _first_strange(captions: Iterable[str]) -> str | None:
    for caption in captions:
        try:
            shapes.parse_caption(caption)
        except ValueError:
            return caption
    return None


def _attributes_or_none(caption: str) -> frozenset[Group]:
    """Training captions may have come from elsewhere, as those of a folder that was added."""
    try:
        return attributes(caption)
    except ValueError:
        return frozenset()


def count(captions: Iterable[str], of: GroupsOf) -> Mapping[Group, int]:
    """How many of the captions are in each group."""
    return collections.Counter(group for caption in captions for group in of(caption))
