"""A deterministic reader of captioned_shapes pictures: their shapes, colours and positions.

It scores generated pictures against their prompts, so it must work with the edges that a small VAE
blurs. It explains each pixel as background + coverage * (palette colour - background), which keeps
the colour at a blurred edge. A shape is recognised by the overlap of a component's coverage with
templates of the same area around the same centroid.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from sdjax.data.builders import shapes
from sdjax.data.builders.shapes import PALETTE, POSITIONS, RELATIONS, SHAPES, Wanted

MIN_AREA = 60 / 64**2  # of the picture; the smallest drawn shape covers 162 px of 64x64
MIN_OVERLAP = 0.6  # intersection over union with the best template, below which a shape is unknown
SIZE_LIMIT = 25.0 / 64  # of the side: between the widest small and the narrowest large object
FINE = 3  # samples of a template per pixel and axis
AREAS = {  # area over the square of the width
    "circle": np.pi / 4,
    "square": 1.0,
    "triangle": 0.5,
    "cross": 2 * shapes.CROSS_ARM - shapes.CROSS_ARM**2,
}


@dataclasses.dataclass(frozen=True)
class FoundShape:
    """One object of a picture: box is (left, top, right, bottom), exclusive, in pixels.

    shape is "unknown" when no template overlaps enough; overlap is the best template's.
    """

    colour: str
    shape: str
    size: str
    x: float
    y: float
    box: tuple[int, int, int, int]
    area: int
    overlap: float


def read_shapes(image: np.ndarray) -> list[FoundShape]:
    """Read the objects of a picture [H, W, 3] uint8, largest first.

    Raises ValueError for any other kind of array.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"read_shapes: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}; "
            "convert samples in [-1, 1] by (x + 1) * 127.5, rounded and clipped"
        )
    labels, coverage = _explain(_smooth(image.astype(np.float32)))
    height, width = labels.shape
    found = []
    for number, colour in enumerate(PALETTE):
        # The pixels of other objects count as uncovered.
        own = np.where((labels == number) | (labels < 0), coverage[..., number], 0.0)
        for component in _components(labels == number):
            if component.sum() >= MIN_AREA * height * width:
                found.append(_describe(component, own, colour))
    return sorted(found, key=lambda one: -one.area)


def _smooth(image: np.ndarray) -> np.ndarray:
    """Apply a 3x3 binomial filter over the first two axes, against noise."""
    for axis in (0, 1):
        ends = [(1, 1) if a == axis else (0, 0) for a in range(image.ndim)]
        padded = np.pad(image, ends, mode="edge")
        before, here, after = (
            np.take(padded, np.arange(image.shape[axis]) + shift, axis) for shift in range(3)
        )
        image = 0.25 * before + 0.5 * here + 0.25 * after
    return image


def _explain(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels [H, W] and coverage [H, W, colours] in [0, 1] of a smoothed picture [H, W, 3].

    A label is the index of the palette colour that explains the pixel best, -1 for background;
    the coverage is that of each colour if it alone covered the pixel.
    """
    edge = max(1, image.shape[0] // 32)
    frame = np.ones(image.shape[:2], bool)
    frame[edge:-edge, edge:-edge] = False
    background = np.median(image[frame], axis=0)  # [3]
    directions = np.asarray(list(PALETTE.values()), np.float32) - background  # [colours, 3]
    lengths = (directions**2).sum(-1)
    usable = lengths > 60.0**2  # a colour like the background cannot be recognised
    offset = image - background  # [H, W, 3]
    coverage = offset @ directions.T / np.maximum(lengths, 1.0)  # [H, W, colours]
    explained = np.clip(coverage, 0.0, 1.1)[..., None] * directions  # [H, W, colours, 3]
    residual = ((offset[:, :, None] - explained) ** 2).sum(-1)
    residual[..., ~usable] = np.inf
    best = residual.argmin(-1)
    cover = np.take_along_axis(coverage, best[..., None], -1)[..., 0]
    return np.where((cover >= 0.5) & usable[best], best, -1), np.clip(coverage, 0.0, 1.0)


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected components of a boolean mask [H, W], by union of the rows' runs."""
    if not mask.any():
        return []
    parent: list[int] = []

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    runs: list[tuple[int, int, int]] = []  # row, start, stop
    above: list[int] = []
    for row in range(mask.shape[0]):
        steps = np.flatnonzero(np.diff(mask[row].astype(np.int8), prepend=0, append=0))
        current = []
        for start, stop in zip(steps[::2].tolist(), steps[1::2].tolist(), strict=True):
            number = len(runs)
            runs.append((row, start, stop))
            parent.append(number)
            current.append(number)
            for other in above:
                if runs[other][1] < stop and start < runs[other][2]:
                    parent[root(other)] = root(number)
        above = current
    components: dict[int, np.ndarray] = {}
    for number, (row, start, stop) in enumerate(runs):
        component = components.setdefault(root(number), np.zeros_like(mask))
        component[row, start:stop] = True
    return list(components.values())


def _describe(component: np.ndarray, coverage: np.ndarray, colour: str) -> FoundShape:
    """Describe a component [H, W] bool by the template that its coverage [H, W] overlaps best.

    Blur moves coverage about but keeps its sum and its centroid. Both place each template: at the
    width that gives the sum, around the centroid.
    """
    side = component.shape[0]
    near = component
    for _ in range(max(2, side // 32)):
        near = _grown(near)
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    window = np.ix_(rows, columns)
    cover = np.where(near[window], coverage[window], 0.0)  # [h, w]
    mass = float(cover.sum())
    y = float((cover.sum(1) * (rows + 0.5)).sum()) / mass
    x = float((cover.sum(0) * (columns + 0.5)).sum()) / mass
    overlaps, widths = [], []
    for shape in SHAPES:
        width = (mass / AREAS[shape]) ** 0.5
        template = _template(shape, width, rows - y, columns - x)
        overlaps.append(
            float(np.minimum(cover, template).sum() / np.maximum(cover, template).sum())
        )
        widths.append(width)
    best = int(np.argmax(overlaps))
    rows, columns = np.flatnonzero(component.any(1)), np.flatnonzero(component.any(0))
    return FoundShape(
        colour=colour,
        shape=SHAPES[best] if overlaps[best] >= MIN_OVERLAP else "unknown",
        size="large" if widths[best] >= SIZE_LIMIT * side else "small",
        x=x,
        y=y,
        box=(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1),
        area=int(component.sum()),
        overlap=overlaps[best],
    )


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask [H, W] with its four neighbours."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _template(shape: str, width: float, top: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The coverage of pixels [h, w] by a shape, softened as small VAEs do.

    top and left: pixel corners relative to the shape's centroid.
    """
    fine = (np.arange(FINE) + 0.5) / FINE
    centroid = 2 / 3 if shape == "triangle" else 0.5  # of the height, from the top
    v = ((top[:, None] + fine).reshape(-1) / width + centroid)[:, None]  # [h*FINE, 1]
    u = ((left[:, None] + fine).reshape(-1) / width + 0.5)[None]  # [1, w*FINE]
    inside = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
    arm = shapes.CROSS_ARM / 2
    match shape:
        case "circle":
            inside = (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25
        case "triangle":
            inside &= np.abs(u - 0.5) <= v / 2
        case "cross":
            inside &= (np.abs(u - 0.5) <= arm) | (np.abs(v - 0.5) <= arm)
    pixels = inside.reshape(len(top), FINE, len(left), FINE).mean((1, 3))  # [h, w]
    return _smooth(_smooth(pixels.astype(np.float32)))


def _in_position(found: FoundShape, position: str, side: int) -> bool:
    """Whether an object's box is at a position, by its share of the free travel."""
    left, top, right, bottom = found.box
    for place, low, high in zip(POSITIONS[position], (left, top), (right, bottom), strict=True):
        travel = side - 2 * shapes.MARGIN * side / shapes.IMAGE_SIZE - (high - low)
        share = (low - shapes.MARGIN * side / shapes.IMAGE_SIZE) / max(travel, 1.0)
        if place != (0 if share < 0.3 else 2 if share > 0.7 else 1):
            return False
    return True


def judge(wanted: Sequence[Wanted], found: Sequence[FoundShape], side: int) -> dict[str, bool]:
    """Whether a picture (of `side` pixels) is right in each property of its caption.

    colour: every wanted object has a found object of its colour, no found object counted twice.
    shape: every wanted object has one of its colour and shape. size, place: these also have the
    caption's size, and its position or relation. exact: all that, and nothing else in the picture.
    Each property is judged by the assignment with the most right properties.
    """
    verdicts = [_judge_match(wanted, match, side) for match in _matches(wanted, found)]
    best = max(verdicts, key=lambda v: sum(v.values()), default=None)
    if best is None:
        return dict.fromkeys(("colour", "shape", "size", "place", "exact"), False)
    everything = all(best.values()) and len(found) == len(wanted)
    return {**best, "exact": everything}


def _matches(wanted: Sequence[Wanted], found: Sequence[FoundShape]) -> list[tuple[FoundShape, ...]]:
    """All assignments of found objects (the largest few) to the wanted ones."""
    return list(itertools.permutations(found[:6], len(wanted)))


def _judge_match(
    wanted: Sequence[Wanted], match: Sequence[FoundShape], side: int
) -> dict[str, bool]:
    """Whether one assignment is right in each property."""
    pairs = list(zip(wanted, match, strict=True))
    colour = all(w.colour == f.colour for w, f in pairs)
    shape = colour and all(w.shape == f.shape for w, f in pairs)
    size = shape and all(not w.size or w.size == f.size for w, f in pairs)
    place = shape and all(not w.position or _in_position(f, w.position, side) for w, f in pairs)
    if place and wanted[0].relation:
        axis, sign = RELATIONS[wanted[0].relation]
        first, second = ((f.x, f.y)[axis] for f in match)
        place = (second - first) * sign > 0.1 * side
    return {"colour": colour, "shape": shape, "size": size, "place": place}


def score(
    prompts: Sequence[str | Sequence[Wanted]], images: np.ndarray | Sequence[np.ndarray]
) -> dict[str, float]:
    """Score images [N, H, W, 3] uint8 against captions (or the objects they want).

    Returns the share of pictures right in each property of `judge`, and `samples`, their number.
    Raises ValueError unless there are as many prompts as images, and at least one.
    """
    if len(prompts) != len(images) or not len(images):
        raise ValueError(f"score: {len(prompts)} prompts for {len(images)} images; expected as "
                         "many, and at least one")  # fmt: skip
    verdicts = []
    for prompt, image in zip(prompts, images, strict=True):
        wanted = shapes.parse_caption(prompt) if isinstance(prompt, str) else list(prompt)
        verdicts.append(judge(wanted, read_shapes(np.asarray(image)), image.shape[0]))
    means = {name: float(np.mean([v[name] for v in verdicts])) for name in verdicts[0]}
    return {**means, "samples": float(len(verdicts))}
