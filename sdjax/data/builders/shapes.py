"""Scenes of one or two coloured shapes: their random choice, their drawing and their captions.

A scene is a pure function of (seed, split, index), through NumPy's counter-based Philox generator,
so any example can be made alone. A fixed hash of a scene's properties decides whether it belongs to
train or to test. So no prompt of the test split describes a training example, although training has
seen every word of it.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64  # px; the sizes below are for this side
MARGIN = 2  # px of background around everything: the reader measures the background there
GAP = 4  # px at least between two objects
SUPERSAMPLE = 4

# Far from one another and from any background, also when mixed with it at an edge.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "green": (25, 165, 55),
    "blue": (30, 70, 220),
    "yellow": (250, 220, 30),
    "purple": (140, 40, 170),
    "orange": (245, 125, 20),
    "cyan": (30, 200, 225),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
CROSS_ARM = 0.36  # thickness of a cross's arms over its width
WIDTHS = {"small": (18.0, 20.0), "large": (30.0, 34.0)}  # px, uniform
BACKGROUND = (228, 250)  # light grey to pastel, per channel
COLOUR_JITTER = 6  # +- per channel
# "named": the colours of PALETTE; "any": all colours, without names in captions, for an
# autoencoder.
COLOURS = ("named", "any")
CONTRAST = 100  # of 255; the least difference from the background in one channel of any colour
PREFIXES = ("", "a picture of ", "a drawing of ")
# column, row in {0, 1, 2} -> words
POSITIONS = {
    "at the top left": (0, 0),
    "at the top": (1, 0),
    "at the top right": (2, 0),
    "on the left": (0, 1),
    "in the center": (1, 1),
    "on the right": (2, 1),
    "at the bottom left": (0, 2),
    "at the bottom": (1, 2),
    "at the bottom right": (2, 2),
}
# Relation of the first named object to the second: (axis, sign of second minus first).
RELATIONS = {
    "to the left of": (0, 1),
    "to the right of": (0, -1),
    "above": (1, 1),
    "below": (1, -1),
}
WORDS = (*PALETTE, *SHAPES, *WIDTHS, *POSITIONS, *RELATIONS)
POSITION_JITTER = 4.0  # px of freedom within each of the nine positions


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One object that a caption describes; an empty string is a property it leaves open.

    relation is that of the first of two objects to the second, and empty on the second.
    """

    colour: str
    shape: str
    size: str = ""
    position: str = ""
    relation: str = ""


@dataclasses.dataclass(frozen=True)
class Placed:
    """A drawn object: its properties, and its centre and width in pixels.

    colour is "" where it has no name.
    """

    colour: str
    shape: str
    size: str
    position: str
    x: float
    y: float
    width: float
    rgb: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two objects on a background; relation is "" for one object."""

    objects: tuple[Placed, ...]
    relation: str
    background: tuple[int, int, int]


def is_held_out(objects: tuple[Placed, ...] | tuple[Wanted, ...]) -> bool:
    """Whether these objects belong to the test split (about a tenth of all combinations).

    One object is identified by its size, colour, shape and position; two by the unordered pair of
    their colours and shapes.
    """
    if len(objects) == 1:
        one = objects[0]
        key = f"{one.size} {one.colour} {one.shape} {one.position}"
    else:
        key = " & ".join(sorted(f"{o.colour} {o.shape}" for o in objects))
    return zlib.crc32(key.encode()) % 10 == 0


_NONE: Mapping[str, float] = {}


def parse_rare(rare: Sequence[str]) -> dict[str, float]:
    """Parse ("red=0.02", ...) to {"red": 0.02}. Raises ValueError for another word or share."""
    found = {}
    for one in rare:
        word, _, share = one.partition("=")
        try:
            found[word] = float(share)
        except ValueError:
            found[word] = -1.0
        if word not in WORDS or not 0 <= found[word] <= 1:
            raise ValueError(
                f"{one!r}; expected WORD=SHARE with a share of 0 to 1, such as 'red=0.02', and a "
                f"word of {', '.join(WORDS)}"
            )
    return found


def make_example(
    seed: int,
    split: str,
    index: int,
    *,
    pair_fraction: float = 0.35,
    colours: str = "named",
    rare: Mapping[str, float] = _NONE,
    needs: Collection[str] = (),
) -> tuple[np.ndarray, str, Scene]:
    """The image [64, 64, 3] uint8, caption and scene number `index` of `split`.

    Test captions always name size and position (one object), so that they describe the held-out
    combination. Train captions leave properties out at random. colours is one of `COLOURS`.

    rare: {word: share}; of the scenes of `train` that have a word of `WORDS`, so many are kept.
    needs: words that the scene must have, and its caption says, all of one object.
    """
    stream = {"train": 0, "test": 1}[split]
    rng = np.random.Generator(np.random.Philox(key=[seed, (stream << 40) | index]))
    while True:
        make = _pair if rng.random() < pair_fraction else _single
        scene = make(rng, colours == "any")
        if is_held_out(scene.objects) != (split == "test") or not _has(scene, needs):
            continue
        own = _words(scene) if split == "train" else ()
        if all(rng.random() < share for word, share in rare.items() if word in own):
            break
    caption = _caption(rng, scene, complete=split == "test" or bool(needs))
    return draw(scene), caption, scene


def _words(scene: Scene) -> set[str]:
    """The words of `WORDS` that describe a scene."""
    own = {word for o in scene.objects for word in (o.colour, o.shape, o.size, o.position)}
    return own | {scene.relation}


def _has(scene: Scene, needs: Collection[str]) -> bool:
    """Whether one object, with the relation of the scene, has all the words."""
    return any(
        set(needs) <= {o.colour, o.shape, o.size, o.position, scene.relation} for o in scene.objects
    )


def _look(rng: np.random.Generator, size: str, any_colour: bool) -> tuple[str, str, float]:
    """A random colour, shape and width of an object."""
    colour = "" if any_colour else str(rng.choice(list(PALETTE)))
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    return colour, shape, float(rng.uniform(*WIDTHS[size]))


def _jittered(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    """The rgb of a colour with a random deviation; of "" a random colour of enough contrast."""
    if not colour:
        while True:
            r, g, b = rng.integers(0, 256, 3).tolist()
            if min(r, g, b) < BACKGROUND[0] - CONTRAST:
                return r, g, b
    jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
    r, g, b = np.clip(np.asarray(PALETTE[colour]) + jitter, 0, 255).tolist()
    return r, g, b


def _background(rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = rng.integers(BACKGROUND[0], BACKGROUND[1] + 1, 3).tolist()
    return r, g, b


def _single(rng: np.random.Generator, any_colour: bool) -> Scene:
    """A scene of one object."""
    size = ("small", "large")[int(rng.integers(2))]
    colour, shape, width = _look(rng, size, any_colour)
    position = list(POSITIONS)[int(rng.integers(len(POSITIONS)))]
    low = MARGIN + width / 2
    high = IMAGE_SIZE - low
    starts = (low, IMAGE_SIZE / 2 - POSITION_JITTER / 2, high - POSITION_JITTER)
    x, y = (starts[place] + rng.uniform(0, POSITION_JITTER) for place in POSITIONS[position])
    one = Placed(colour, shape, size, position, x, y, width, _jittered(rng, colour))
    return Scene((one,), "", _background(rng))


def _pair(rng: np.random.Generator, any_colour: bool) -> Scene:
    """Two objects of different colours side by side or one above the other, one large at most."""
    sizes = (("small", "small"), ("small", "large"), ("large", "small"))[int(rng.integers(3))]
    looks = [_look(rng, size, any_colour) for size in sizes]
    while looks[1][0] == looks[0][0] and not any_colour:
        looks[1] = _look(rng, sizes[1], any_colour)
    relation = list(RELATIONS)[int(rng.integers(len(RELATIONS)))]
    axis, sign = RELATIONS[relation]
    # Along the axis: margin, near object, gap, far object, margin; the slack is divided at random.
    near, far = (0, 1) if sign > 0 else (1, 0)
    slack = IMAGE_SIZE - 2 * MARGIN - GAP - looks[0][2] - looks[1][2]
    before, between = np.sort(rng.uniform(0, slack, 2))
    along = [0.0, 0.0]
    along[near] = MARGIN + before + looks[near][2] / 2
    along[far] = MARGIN + between + GAP + looks[near][2] + looks[far][2] / 2
    objects = []
    for (colour, shape, width), size, place in zip(looks, sizes, along, strict=True):
        across = IMAGE_SIZE / 2 + rng.uniform(-8, 8)
        x, y = (place, across) if axis == 0 else (across, place)
        rgb = _jittered(rng, colour)
        objects.append(Placed(colour, shape, size, "", float(x), float(y), width, rgb))
    return Scene(tuple(objects), relation, _background(rng))


def draw(scene: Scene) -> np.ndarray:
    """Draw a scene as an image [64, 64, 3] uint8, edges smoothed by 4x4 supersampling."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    canvas[:] = scene.background
    for placed in scene.objects:
        cover = _coverage(placed)[..., None]  # [H, W, 1]
        canvas += cover * (np.asarray(placed.rgb, np.float32) - canvas)
    return np.round(canvas).astype(np.uint8)


def _coverage(placed: Placed) -> np.ndarray:
    """The share of each pixel that the object covers, [64, 64] float32."""
    side = IMAGE_SIZE * SUPERSAMPLE
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)

    def at(u: float, v: float) -> tuple[float, float]:  # object coordinates in [0, 1] -> canvas
        x = placed.x + (u - 0.5) * placed.width
        y = placed.y + (v - 0.5) * placed.width
        return x * SUPERSAMPLE - 0.5, y * SUPERSAMPLE - 0.5

    low, high = 0.5 - CROSS_ARM / 2, 0.5 + CROSS_ARM / 2
    match placed.shape:
        case "circle":
            pen.ellipse([at(0, 0), at(1, 1)], fill=255)
        case "square":
            pen.rectangle([at(0, 0), at(1, 1)], fill=255)
        case "triangle":
            pen.polygon([at(0.5, 0), at(1, 1), at(0, 1)], fill=255)
        case "cross":
            pen.rectangle([at(low, 0), at(high, 1)], fill=255)
            pen.rectangle([at(0, low), at(1, high)], fill=255)
    small = mask.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def _name(placed: Placed, with_size: bool) -> str:
    """The words for an object, with its article."""
    words = " ".join(filter(None, (placed.size if with_size else "", placed.colour, placed.shape)))
    return ("an " if words[0] in "aeiou" else "a ") + words


def _caption(rng: np.random.Generator, scene: Scene, *, complete: bool) -> str:
    """A random caption of the scene; unless complete, it leaves some properties out."""
    prefix = PREFIXES[int(rng.choice(len(PREFIXES), p=(0.6, 0.2, 0.2)))]
    with_sizes = [complete or rng.random() < 0.75 for _ in scene.objects]
    names = [_name(o, size) for o, size in zip(scene.objects, with_sizes, strict=True)]
    if len(names) == 1:
        with_position = complete or rng.random() < 0.65
        return prefix + names[0] + (f" {scene.objects[0].position}" if with_position else "")
    relation = scene.relation if complete or rng.random() < 0.8 else "and"
    return f"{prefix}{names[0]} {relation} {names[1]}"


def _any_of(words: object) -> str:
    """A regular expression of any of the words, longest first."""
    return "|".join(sorted(words, key=len, reverse=True))  # type: ignore[call-overload]


_OBJECT = rf"an? (?:({_any_of(WIDTHS)}) )?({_any_of(PALETTE)}) ({_any_of(SHAPES)})"
_CAPTION = re.compile(
    rf"(?:{_any_of(p for p in PREFIXES if p)})?{_OBJECT}"
    rf"(?: ({_any_of(POSITIONS)})| ({_any_of(RELATIONS)}|and) {_OBJECT})?"
)


def parse_caption(text: str) -> list[Wanted]:
    """The objects that a caption describes: the inverse of `_caption`.

    Raises ValueError when the text is no caption of this dataset.
    """
    found = _CAPTION.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(
            f"not a caption of captioned_shapes: {text!r}; expected for instance "
            "'a large red circle at the top left' or 'a blue square above a small green cross'"
        )
    size, colour, shape, position, relation, *second = found.groups()
    if relation is None:
        return [Wanted(colour, shape, size or "", position or "")]
    relation = "" if relation == "and" else relation
    other = Wanted(second[1], second[2], second[0] or "")
    return [Wanted(colour, shape, size or "", relation=relation), other]
