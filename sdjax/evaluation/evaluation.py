"""The quality of pictures, in the field's numbers: `judge` computes what its inputs allow.

inputs = Inputs(captions, inception=inception_tower(FILE), reference=open_split(...), ...)
names, left_out = choose(None, inputs)
results = judge(dataclasses.replace(inputs, pictures=draw_folder(...)), names)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.data.pictures import Folder, SplitPictures
from sdjax.evaluation import losses, reference
from sdjax.evaluation.conditions import Masked, masked_errors
from sdjax.evaluation.features import ClipTower
from sdjax.evaluation.losses import ExampleLosses
from sdjax.evaluation.metrics import frechet, mmd, neighbours, similarity
from sdjax.evaluation.metrics.bootstrap import RESAMPLES, Estimate
from sdjax.evaluation.metrics.fidelity import fidelity
from sdjax.evaluation.metrics.neighbours import Nearest
from sdjax.evaluation.reference import PixelTower, Reference, Tower
from sdjax.system import paths

FEATURES = ("inception", "clip", "pixels")
FEW = 2048  # pictures, below which FID's bias is worth a warning
KERNEL_RESAMPLES = 200  # at most: pairs of pictures cost more to resample


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of metrics; an input of None leaves out the metrics that need it.

    captions: one for each picture; () if they have none, None if there are no pictures.
    pictures: the pictures to judge; `choose` does not need them.
    inception, clip: networks that make features.
    features: one of `FEATURES`, for the metrics of neighbours and of diversity. "" takes inception,
      else clip (else pixels, for `memorised` alone).
    reference: pictures to compare with; statistics: theirs, read from a file.
    train: pictures that the model was trained on, none of them in the reference.
    masked: the pictures that a model for inpainting draws parts of.
    validate: makes losses [N, n] and timesteps [n].
    example_losses: makes the losses of the examples of a split. draws: whether a model is there.
    cache: folder where features of reference and train are kept.
    """

    captions: Sequence[str] | None = None
    pictures: Folder | None = None
    inception: Tower | None = None
    clip: ClipTower | None = None
    features: str = ""
    reference: SplitPictures | None = None
    statistics: Reference | None = None
    train: SplitPictures | None = None
    masked: Masked | None = None
    validate: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None
    example_losses: Callable[[], ExampleLosses] | None = None
    draws: bool = False
    cache: paths.PathLike = "references"


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of an evaluation.

    curves: {name: {"x", "y", "low", "high", "x_label"}}.
    nearest: the closest pairs, if they were computed; examples: likewise.
    tables: more tables of rich for the terminal.
    """

    metrics: Mapping[str, Estimate]
    curves: Mapping[str, Mapping[str, Any]]
    warnings: tuple[str, ...]
    nearest: Nearest | None = None
    tables: tuple[Any, ...] = ()
    examples: ExampleLosses | None = None


def made_by(found: Reference, tower: Tower) -> bool:
    """Whether statistics were made by a tower."""
    return found.meta.get("tower", reference.PYTORCH_FID_TOWER) == tower.name


def tower_of(inputs: Inputs) -> Tower | None:
    """The tower of the features that metrics of neighbours use."""
    clip = inputs.clip.images if inputs.clip is not None else None
    towers = {"inception": inputs.inception, "clip": clip, "pixels": PixelTower()}
    return towers[inputs.features] if inputs.features else inputs.inception or clip


def tower_for(inputs: Inputs, metric: str) -> Tower | None:
    """The tower of the features of a metric."""
    if metric in ("fid", "kid"):
        return inputs.inception
    if metric in ("cmmd", "clip_score"):
        return inputs.clip.images if inputs.clip is not None else None
    return tower_of(inputs) or (PixelTower() if metric == "memorised" else None)


class _FeatureCache:
    """The features of the inputs, each computed once."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self._made: dict[tuple[str, str], Any] = {}

    def generated(self, tower: Tower) -> np.ndarray:
        """The features of the generated pictures, float32 [N, D]."""
        return self._once("generated", tower, lambda: self._features(tower))

    def _features(self, tower: Tower) -> np.ndarray:
        assert self.inputs.pictures is not None
        return reference.features_of(tower, self.inputs.pictures)

    def reference(self, tower: Tower) -> Reference:
        """The statistics of the reference."""
        given = self.inputs.statistics
        if given is not None and made_by(given, tower):
            return given
        return self._once("reference", tower, lambda: self._cached(self.inputs.reference, tower))

    def compared(self, tower: Tower) -> np.ndarray:
        """The features of the reference, float32 [N, D]."""
        found = self.reference(tower).features
        assert found is not None  # `lacking` has checked it
        return found

    def train(self, tower: Tower) -> np.ndarray:
        """The features of the training pictures, float32 [N, D]."""
        found = self._once("train", tower, lambda: self._cached(self.inputs.train, tower))
        return found.features

    def _cached(self, pictures: SplitPictures | None, tower: Tower) -> Reference:
        assert pictures is not None
        return reference.cached(self.inputs.cache, tower, pictures, pictures.identity())

    def _once(self, what: str, tower: Tower, make: Callable[[], Any]) -> Any:
        key = what, tower.digest
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def judge(
    inputs: Inputs, names: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Results:
    """Compute metrics that `choose` allows.

    On several hosts all must call it. It does not depend on how the pictures were made.

    Args:
        resamples: of the bootstrap, 0 for no intervals.

    Raises:
        UserError: a network's features are not finite.
    """
    features = _FeatureCache(inputs)
    metrics: dict[str, Estimate] = {}
    curves: dict[str, Mapping[str, Any]] = {}
    nearest = None
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    metrics |= _distances(features, names, resamples, seed)
    metrics |= _neighbours(features, names, options)
    if "memorised" in names:
        nearest = _memorised(features, options)
        metrics["memorised"] = nearest.memorised
    metrics |= _of_prompts(features, names, options)
    if "validation_loss" in names:
        assert inputs.validate is not None
        metrics["validation_loss"], curves["validation_loss"] = losses.validation(
            *inputs.validate(), **options
        )
    examples = None
    if "example_loss" in names:
        assert inputs.example_losses is not None
        examples = inputs.example_losses()
        metrics |= losses.estimates(examples, **options)
    warnings = _warnings(inputs, names)
    return Results(metrics, curves, warnings, nearest, examples=examples)


def _distances(
    features: _FeatureCache, names: Sequence[str], resamples: int, seed: int
) -> dict[str, Estimate]:
    """The metrics that are distances between distributions."""
    found = {}
    inception, clip = features.inputs.inception, features.inputs.clip
    if "fid" in names and inception is not None:
        found["fid"] = frechet.frechet(
            features.generated(inception),
            features.reference(inception).moments,
            resamples=resamples,
            seed=seed,
        )
    few = min(resamples, KERNEL_RESAMPLES)
    if "kid" in names and inception is not None:
        found["kid"] = mmd.kid(
            features.generated(inception), features.compared(inception), resamples=few, seed=seed
        )
    if "cmmd" in names and clip is not None:
        found["cmmd"] = mmd.cmmd(
            features.generated(clip.images),
            features.compared(clip.images),
            resamples=few,
            seed=seed,
        )
    return found


def _neighbours(
    features: _FeatureCache, names: Sequence[str], options: Mapping[str, Any]
) -> dict[str, Estimate]:
    pairs = {
        ("precision", "recall"): neighbours.precision_recall,
        ("density", "coverage"): neighbours.density_coverage,
    }
    found: dict[str, Estimate] = {}
    tower = tower_of(features.inputs)
    for both, compute in pairs.items():
        if tower is not None and set(both) & set(names):
            made = compute(features.generated(tower), features.compared(tower), **options)
            found |= {name: _with(made[name], tower) for name in both if name in names}
    return found


def _with(estimate: Estimate, tower: Tower) -> Estimate:
    details = {**estimate.details, "features": tower.name}
    return dataclasses.replace(estimate, details=details)


def _memorised(features: _FeatureCache, options: Mapping[str, Any]) -> Nearest:
    tower = tower_of(features.inputs) or PixelTower()
    found = neighbours.memorisation(
        features.generated(tower), features.train(tower), features.compared(tower), **options
    )
    return dataclasses.replace(found, memorised=_with(found.memorised, tower))


def _of_prompts(
    features: _FeatureCache, names: Sequence[str], options: Mapping[str, Any]
) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    inputs = features.inputs
    texts, numbers = np.unique(inputs.captions or (), return_inverse=True)
    if "clip_score" in names and inputs.clip is not None:
        of_texts = inputs.clip.texts([str(text) for text in texts])[numbers]
        found["clip_score"] = similarity.clip_score(
            features.generated(inputs.clip.images), of_texts, prompts=numbers, **options
        )
    tower = tower_of(inputs)
    if "diversity" in names and tower is not None:
        found["diversity"] = _with(
            similarity.diversity(features.generated(tower), numbers, **options), tower
        )
    if "fidelity" in names and inputs.pictures is not None:
        found |= fidelity(inputs.pictures, **options)
    if {"inside_error", "outside_error"} & set(names):
        assert inputs.pictures is not None and inputs.masked is not None
        errors = masked_errors(inputs.masked, inputs.pictures, inputs.captions or (), **options)
        found |= {name: error for name, error in errors.items() if name in names}
    return found


def _warnings(inputs: Inputs, names: Sequence[str]) -> tuple[str, ...]:
    found = []
    count = len(inputs.pictures) if inputs.pictures is not None else 0
    if "fid" in names and count < FEW:
        found.append(
            f"FID of {count} pictures is far above that of many, for it is biased: compare it with "
            f"that of as many pictures alone, or look at KID. {FEW} or more are wanted"
        )
    return tuple(found)
