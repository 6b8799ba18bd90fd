"""Metrics of nearest neighbours: precision, recall, density, coverage, memorisation.

Distances between features are Euclidean, in float64, and computed in blocks of rows: memory grows
with the pictures, not with their square.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from sdjax.evaluation.metrics import bootstrap
from sdjax.evaluation.metrics.bootstrap import Estimate

BLOCK = 1024
PRECISION_K = 3  # Kynkaanniemi et al. 2019
DENSITY_K = 5  # Naeem et al. 2020, and the `prdc` package


def squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """The blocks (rows of x, squared distances [rows, M]) of features [N, D] and [M, D].

    Raises ValueError for different widths.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected features of one width, got {list(x.shape)}, {list(y.shape)}")
    lengths = (y**2).sum(1)
    for start in range(0, len(x), BLOCK):
        rows = slice(start, min(start + BLOCK, len(x)))
        block = x[rows]
        found = (block**2).sum(1)[:, None] + lengths - 2 * block @ y.T
        yield rows, found.clip(0)


def radii(features: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of each of features [N, D] to its k-th nearest other one, [N].

    Raises ValueError for k features or fewer.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} pictures have no {k}-th neighbour; give more pictures")
    found = np.empty(len(features))
    for rows, squares in squared_distances(features, features):
        own = np.arange(rows.start, rows.stop)
        squares[np.arange(len(own)), own] = -1.0  # itself is the nearest, whatever the rounding
        found[rows] = np.partition(squares, k, axis=1)[:, k]
    return found


def precision_recall(
    generated: np.ndarray,
    reference: np.ndarray,
    *,
    k: int = PRECISION_K,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    precision: share of generated pictures within the k-th neighbour's distance of some reference
    picture; recall: the same with the two exchanged. Intervals resample the pictures that are
    counted, generated ones for precision and reference ones for recall; the spheres stay.
    """
    own, theirs = radii(generated, k), radii(reference, k)
    precise = np.zeros(len(generated), bool)
    recalled = np.zeros(len(reference), bool)
    for rows, squares in squared_distances(generated, reference):
        precise[rows] = (squares <= theirs).any(1)
        recalled |= (squares <= own[rows, None]).any(0)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "details": {"k": k}}
    return {
        "precision": bootstrap.mean(precise, share=True, **options),
        "recall": bootstrap.mean(recalled, share=True, **options),
    }


def density_coverage(
    generated: np.ndarray,
    reference: np.ndarray,
    *,
    k: int = DENSITY_K,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The density and coverage (Naeem et al. 2020, section 3.2), as in the `prdc` package.

    density: the number of the reference's spheres that a generated picture lies in, over k; it can
      be
    above 1. coverage: share of reference pictures with a generated one in their sphere. Intervals
    resample generated pictures for density, reference ones for coverage; the spheres stay.
    """
    theirs = radii(reference, k)
    inside = np.zeros(len(generated))
    nearest = np.full(len(reference), np.inf)
    for rows, squares in squared_distances(generated, reference):
        inside[rows] = (squares < theirs).sum(1)
        nearest = np.minimum(nearest, squares.min(0))
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "details": {"k": k}}
    return {
        "density": bootstrap.mean(inside / k, **options),
        "coverage": bootstrap.mean(nearest < theirs, share=True, **options),
    }


def nearest(features: np.ndarray, bank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of the nearest in bank [M, D] to each of features [N, D], and its distance, [N].

    The distance is computed from the pair itself: matrix products lose the digits of a small one.
    """
    where = np.empty(len(features), np.int64)
    for rows, squares in squared_distances(features, bank):
        where[rows] = squares.argmin(1)
    pairs = zip(np.asarray(features, np.float64), bank[where], strict=True)
    return where, np.array([np.linalg.norm(one - np.float64(other)) for one, other in pairs])


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The closeness of generated pictures to training pictures.

    memorised: the share of generated pictures that are closer to a training picture than a bound.
    The bound is the `percentile` of the same distance of held-out pictures. Without memorisation
    the share is `percentile` %.
    pairs: (generated, training, distance), the closest first.
    """

    memorised: Estimate
    pairs: tuple[tuple[int, int, float], ...]


def memorisation(
    generated: np.ndarray,
    train: np.ndarray,
    held_out: np.ndarray,
    *,
    percentile: float = 5.0,
    pairs: int = 16,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> Nearest:
    """Compare the distances of generated and of held-out pictures to the training pictures.

    Distances alone mean little: a dataset of near copies has near neighbours everywhere. Held-out
    pictures, which cannot be memorised, show which distances are usual (Meehan et al. 2020).

    Args:
      generated, train, held_out: features [N, D].
    """
    where, distances = nearest(generated, train)
    _, usual = nearest(held_out, train)
    bound = float(np.percentile(usual, percentile))
    details = {
        "percentile": percentile,
        "threshold": bound,
        "expected": percentile / 100,
        "median_distance": float(np.median(distances)),
        "median_distance_held_out": float(np.median(usual)),
    }
    share = bootstrap.mean(
        distances < bound,
        share=True,
        resamples=resamples,
        seed=seed,
        higher_is_better=False,
        details=details,
    )
    order = np.argsort(distances, kind="stable")[:pairs]
    return Nearest(share, tuple((int(i), int(where[i]), float(distances[i])) for i in order))
