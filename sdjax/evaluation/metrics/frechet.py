"""The Frechet distance between the Gaussians of two sets of features (Heusel et al. 2017: FID).

|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), as pytorch-fid's fid_score.py. pytorch-fid takes a
square root of the product, which need not be symmetric. Here the trace of the root is the sum of
the roots of the eigenvalues of S2^(1/2) S1 S2^(1/2). This matrix is symmetric and has the same
eigenvalues as S1 S2. The sum is real whatever the rounding, also with fewer pictures than features,
where pytorch-fid may have to add 1e-6 to the diagonals.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sdjax.evaluation.metrics import bootstrap
from sdjax.evaluation.metrics.bootstrap import Estimate


@dataclasses.dataclass(frozen=True)
class Moments:
    """The mean [D] and covariance [D, D] of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """The moments of features [N, D], N at least 2, with the unbiased covariance, as pytorch-fid's.

    Raises ValueError for another shape.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"moments: expected features [N >= 2, D], got {list(features.shape)}")
    return Moments(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def distance(one: Moments, other: Moments) -> float:
    """The Frechet distance; ValueError if the features are of different widths."""
    if one.mu.shape != other.mu.shape:
        raise ValueError(
            f"frechet.distance: features of {one.mu.shape[0]} and {other.mu.shape[0]} numbers"
        )
    root = _root(other.sigma)
    shared = _sum_of_roots(root @ one.sigma @ root)
    offset = one.mu - other.mu
    return float(offset @ offset + np.trace(one.sigma) + np.trace(other.sigma) - 2 * shared)


def frechet(
    generated: np.ndarray,
    reference: Moments,
    *,
    resamples: int = bootstrap.RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The distance of features [N, D] to those of a reference, with its interval.

    The interval resamples `influence`, the first order of each picture's contribution. A resample
    then costs a mean, instead of the moments of N pictures and the eigenvalues of a D x D matrix.
    It is also more accurate with few pictures. With N = 80, D = 128, other pictures gave a
    deviation of 0.094, this 0.105. Moments of resampled pictures, half of which are repeats, gave
    0.18.
    """
    generated = np.asarray(generated, np.float64)
    value = distance(moments(generated), reference)
    low = high = None
    if resamples:
        each = influence(generated, reference)
        found = bootstrap.replicate(
            lambda rows: float(each[rows].mean()), len(each), resamples=resamples, seed=seed
        )
        low, high = bootstrap.around(value, found)
        low = max(low, 0.0)
    return Estimate(value, low, high, higher_is_better=False, count=len(generated))


def influence(features: np.ndarray, reference: Moments) -> np.ndarray:
    """The change of the distance with the weight of each of features [N, D]: [N], of mean 0.

    It is the derivative in the direction of one picture's delta. That of tr S - 2 tr (S S2)^(1/2)
    by the covariance S is I - T. T = R (R S R)^(-1/2) R, R = S2^(1/2), is the optimal map of one
    Gaussian to the other (Takatsu 2011, on the Wasserstein geometry of Gaussians).
    """
    centred = np.asarray(features, np.float64) - np.mean(features, axis=0, dtype=np.float64)
    n = len(centred)
    offset = np.mean(features, axis=0, dtype=np.float64) - reference.mu
    turned = centred @ _root(reference.sigma)
    values, vectors = np.linalg.eigh(turned.T @ turned / (n - 1))
    kept = values > values.max() * 1e-12  # with N below D the others are zero up to rounding
    scores = (turned @ vectors[:, kept]) ** 2 / np.sqrt(values[kept])
    spread = ((centred**2).sum(1) - scores.sum(1)) * n / (n - 1)
    found = 2 * centred @ offset + spread
    return found - found.mean()


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _sum_of_roots(matrix: np.ndarray) -> float:
    """The sum of the roots of the eigenvalues of a symmetric, positive semidefinite matrix."""
    return float(np.sqrt(np.linalg.eigvalsh((matrix + matrix.T) / 2).clip(0)).sum())
