"""Fidelity: whether pictures of captioned_shapes show their captions. It needs no weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdjax.data.builders import shapes
from sdjax.data.builders.shape_reader import judge, read_shapes
from sdjax.data.pictures import Pictures, stretches
from sdjax.evaluation.metrics import bootstrap
from sdjax.evaluation.metrics.bootstrap import Estimate

# The pictures that each share counts. Size, position and relation require right colours and shapes,
# and count only captions that state one.
PROPERTIES = {
    "colour": "pictures with an object of every colour that the caption says",
    "shape": "pictures with every object in its colour and shape",
    "number": "pictures with as many objects as the caption says",
    "size": "pictures whose objects have the sizes that the caption says",
    "position": "pictures whose object stands where the caption says",
    "relation": "pictures whose two objects stand to one another as the caption says",
    "exact": "pictures with all of this, and nothing else in them",
}


def is_of_shapes(captions: Sequence[str]) -> bool:
    """Whether the reader understands all the captions."""
    try:
        for caption in captions:
            shapes.parse_caption(caption)
    except ValueError:
        return False
    return bool(captions)


def verdicts(caption: str, image: np.ndarray) -> dict[str, bool]:
    """Whether a picture, uint8 [H, W, 3], is right in each property that its caption states."""
    wanted = shapes.parse_caption(caption)
    found = read_shapes(image)
    right = judge(wanted, found, image.shape[0])
    said = {
        "colour": right["colour"],
        "shape": right["shape"],
        "number": len(found) == len(wanted),
        "exact": right["exact"],
    }
    if any(one.size for one in wanted):
        said["size"] = right["size"]
    if any(one.position for one in wanted):
        said["position"] = right["place"]
    if any(one.relation for one in wanted):
        said["relation"] = right["place"]
    return said


def fidelity(
    pictures: Pictures, *, resamples: int = bootstrap.RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """The shares {fidelity_PROPERTY: estimate} for each of `PROPERTIES` that a caption states.

    Intervals resample prompts with all their pictures.
    """
    found: dict[str, list[bool]] = {name: [] for name in PROPERTIES}
    groups: dict[str, list[str]] = {name: [] for name in PROPERTIES}
    captions = iter(pictures.captions)
    for images in stretches(pictures):
        for image in images:
            caption = next(captions)
            for name, right in verdicts(caption, image).items():
                found[name].append(right)
                groups[name].append(caption)
    return {
        f"fidelity_{name}": bootstrap.mean(
            np.array(right, float),
            groups=np.array(groups[name]),
            share=True,
            resamples=resamples,
            seed=seed,
            details={"of": PROPERTIES[name]},
        )
        for name, right in found.items()
        if right
    }
