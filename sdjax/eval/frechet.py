"""Frechet distance between the Gaussians of two sets of features (Heusel et al. 2017: FID).

|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), as pytorch-fid's fid_score.py. That takes a square
root of the product, which need not be symmetric; here the trace of the root is the sum of the roots
of the eigenvalues of S2^(1/2) S1 S2^(1/2), which is symmetric and has the same eigenvalues as
S1 S2. It is real whatever the rounding, also with fewer pictures than features, where pytorch-fid
may have to add 1e-6 to the diagonals.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sdjax.eval import bootstrap
from sdjax.eval.bootstrap import Estimate


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Of features [N, D], N at least 2; the covariance is the unbiased one, as pytorch-fid's."""
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
    generated: np.ndarray, reference: Moments, *, resamples: int = 100, seed: int = 0
) -> Estimate:
    """The distance of features [N, D] to those of a reference, with its interval.

    Each replicate is the distance of the moments of resampled features. The reference's root is
    taken once and multiplied into the features, so that a replicate costs the eigenvalues of one
    symmetric matrix of min(N, D) rows.
    """
    generated = np.asarray(generated, np.float64)
    value = distance(moments(generated), reference)
    low = high = None
    if resamples:
        replicates = _Replicates(generated, reference)
        found = bootstrap.replicate(replicates, len(generated), resamples=resamples, seed=seed)
        low, high = bootstrap.around(value, found)
        low = max(low, 0.0)
    return Estimate(value, low, high, higher_is_better=False, count=len(generated))


class _Replicates:
    """The distance of resampled features, by their indices."""

    def __init__(self, generated: np.ndarray, reference: Moments):
        # About the reference's mean: what is far from it would lose digits in the products.
        self._features = generated - reference.mu
        self._turned = self._features @ _root(reference.sigma)  # [N, D]
        self._squares = (self._features**2).sum(1)
        self._trace = float(np.trace(reference.sigma))
        wide = self._turned.shape[0] < self._turned.shape[1]
        self._gram = self._turned @ self._turned.T if wide else None

    def __call__(self, rows: np.ndarray) -> float:
        n = len(rows)
        offset = self._features[rows].mean(0)
        own_trace = (self._squares[rows].sum() - n * offset @ offset) / (n - 1)
        if self._gram is None:
            turned = self._turned[rows]
            turned = turned - turned.mean(0)
            product = turned.T @ turned
        else:  # the same eigenvalues but for zeros
            product = self._gram[np.ix_(rows, rows)]
            product = product - product.mean(0) - product.mean(1)[:, None] + product.mean()
        shared = _sum_of_roots(product / (n - 1))
        return float(offset @ offset + own_trace + self._trace - 2 * shared)


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _sum_of_roots(matrix: np.ndarray) -> float:
    """Of the eigenvalues of a symmetric matrix without negative ones, but for rounding."""
    return float(np.sqrt(np.linalg.eigvalsh((matrix + matrix.T) / 2).clip(0)).sum())
