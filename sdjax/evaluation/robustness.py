"""Robustness: how far pictures move when their prompts, or their noise, change a little.

Each picture is drawn again from the same noise with another prompt, and with its prompt from noise
near its own. What is drawn again is compared with the picture, and with the prompt as it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sdjax.data.pictures import Folder, stretches
from sdjax.evaluation.features import ClipTower
from sdjax.evaluation.metrics import bootstrap, similarity
from sdjax.evaluation.metrics.bootstrap import Estimate
from sdjax.evaluation.metrics.fidelity import is_of_shapes, verdicts
from sdjax.evaluation.metrics.mmd import normalised
from sdjax.evaluation.reference import Tower
from sdjax.sampling.drawing import Prompts

_TYPO = 4  # letters of a word that may get one


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """One way to draw again.

    Attributes:
      words: prompt -> another one.
      turn: radians on the sphere of noise from the picture's own towards another.
    """

    words: Callable[[str], str] = lambda text: text
    turn: float = 0.0

    def prompts(self, prompts: Prompts) -> Prompts:
        """Return the changed prompts, in the same order."""
        return dataclasses.replace(prompts, texts=tuple(map(self.words, prompts.texts)))


def _rng(text: str, what: str) -> np.random.Generator:
    """A generator that depends on the text alone."""
    digest = hashlib.sha256(f"{what}\0{text}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def misspelt(text: str) -> str:
    """Swap two neighbouring letters within half of the words that have four or more, at least one.

    The first and the last letter of a word stay. A text without such a word stays as it is.
    """
    rng, words = _rng(text, "misspelt"), text.split(" ")
    places = [
        (i, [j for j in range(1, len(word) - 2) if word[j] != word[j + 1]])
        for i, word in enumerate(words)
        if len(word) >= _TYPO
    ]
    places = [(i, inner) for i, inner in places if inner]
    if not places:
        return text
    chosen = rng.permutation(len(places))[: -(-len(places) // 2)]
    for which in chosen:
        i, inner = places[which]
        j, word = inner[int(rng.integers(len(inner)))], words[i]
        words[i] = word[:j] + word[j + 1] + word[j] + word[j + 2 :]
    return " ".join(words)


def shuffled(text: str) -> str:
    """Put the words in another order; one that has no other stays as it is."""
    rng, words = _rng(text, "shuffled"), text.split()
    if len(set(words)) < 2:
        return text
    while (found := [words[i] for i in rng.permutation(len(words))]) == words:
        pass
    return " ".join(found)


PERTURBATIONS: Mapping[str, Perturbation] = {
    "misspelt": Perturbation(misspelt),
    "shuffled": Perturbation(shuffled),
    "upper_case": Perturbation(str.upper),
    "empty": Perturbation(lambda text: ""),
    "noise_0.1": Perturbation(turn=0.1),
    "noise_0.3": Perturbation(turn=0.3),
}


class DrawAgain(Protocol):
    """Draws the pictures of an evaluation once more."""

    def __call__(self, name: str, perturbation: Perturbation) -> Folder:
        """Return as many pictures, with the same numbers; `name` is that of a folder."""


Findings = dict[str, dict[str, Estimate]]  # {perturbation: {measure: estimate}}


def find(
    pictures: Folder,
    captions: Sequence[str],
    draw: DrawAgain,
    *,
    tower: Tower,
    clip: ClipTower | None,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> Findings:
    """Draw again in each of `PERTURBATIONS`, and compare.

    The measures: "mse", the mean squared difference of pixels in [0, 1]; "features", the cosine
    distance of features; "fidelity" (of captioned_shapes) and "clip_score": by how much they grow,
    for the captions as they were. Intervals resample prompts with all their pictures.

    Args:
        pictures, captions: as they were drawn first, and of what.
        tower: makes the features.
    """
    _, groups = np.unique(captions, return_inverse=True)
    measure = _Measure(captions, tower, clip)
    first = measure(pictures)
    found: Findings = {}
    for name, perturbation in PERTURBATIONS.items():
        again = draw(name, perturbation)
        second = measure(again)
        apart = first["features"] - second["features"]  # of length 1: 1 - cos = apart^2 / 2
        changes = {"mse": _squared(pictures, again), "features": (apart**2).sum(1) / 2}
        for what in ("fidelity", "clip_score"):
            if what in first:
                changes[what] = second[what] - first[what]
        better = {"fidelity": True, "clip_score": True}
        found[name] = {
            what: bootstrap.mean(
                values, groups=groups, resamples=resamples, seed=seed,
                higher_is_better=better.get(what),
            )
            for what, values in changes.items()
        }  # fmt: skip
    return found


def _squared(ones: Folder, others: Folder) -> np.ndarray:
    """The mean squared difference of each two pictures in [0, 1], float64 [N]."""
    parts = [
        np.mean((one / 255.0 - other / 255.0) ** 2, axis=(1, 2, 3))
        for one, other in zip(stretches(ones), stretches(others), strict=True)
    ]
    return np.concatenate(parts)


class _Measure:
    """The measures of every picture, {name: [N, ...]}."""

    def __init__(self, captions: Sequence[str], tower: Tower, clip: ClipTower | None):
        self._captions, self._tower, self._clip = list(captions), tower, clip
        self._shapes = is_of_shapes(self._captions)
        self._texts: np.ndarray | None = None
        if clip is not None:
            texts, numbers = np.unique(self._captions, return_inverse=True)
            self._texts = clip.texts([str(text) for text in texts])[numbers]

    def __call__(self, pictures: Folder) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {}
        start = 0
        for images in stretches(pictures):
            rows = slice(start, start + len(images))
            start += len(images)
            made = {"features": normalised(self._tower(images))}
            if self._shapes:
                pairs = zip(self._captions[rows], images, strict=True)
                made["fidelity"] = np.array(
                    [verdicts(text, im)["exact"] for text, im in pairs], float
                )
            if self._clip is not None and self._texts is not None:
                features = self._clip.images(images)
                made["clip_score"] = similarity.clip_scores(features, self._texts[rows])
            for name, values in made.items():
                parts.setdefault(name, []).append(values)
        return {name: np.concatenate(values) for name, values in parts.items()}


def metrics(findings: Findings) -> dict[str, Estimate]:
    """The metrics {robustness_NAME: how far features move}."""
    return {f"robustness_{name}": found["features"] for name, found in findings.items()}


def to_json(findings: Findings, tower: Tower) -> dict[str, Any]:
    """Return what metrics.json has of it."""
    every = {
        name: {
            what: {"value": one.value, "low": one.low, "high": one.high}
            for what, one in found.items()
        }
        for name, found in findings.items()
    }
    return {"features": tower.name, "changes": every}


def table(findings: Findings) -> Any:
    """Return a table of rich: a row for each change, values with their intervals."""
    from rich.table import Table

    measures = list(dict.fromkeys(what for found in findings.values() for what in found))
    shown = Table(title="drawn again, from the same noise or near it: what changes")
    shown.add_column("change")
    for what in measures:
        shown.add_column(what.replace("_", " "), justify="right")
    for name, found in findings.items():
        shown.add_row(name.replace("_", " "), *(_text(found[what]) for what in measures))
    return shown


def _text(one: Estimate) -> str:
    within = "" if one.low is None else f" ({one.low:.3g} to {one.high:.3g})"
    return f"{one.value:.3g}{within}"
