"""Maximum mean discrepancies (Gretton et al. 2012) between features: KID and CMMD. Float64.

Kernels are computed in blocks of rows: memory grows with the pictures, not with their square.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sdjax.evaluation.metrics import bootstrap
from sdjax.evaluation.metrics.bootstrap import Estimate

BLOCK = 1024  # rows of a kernel matrix that are held at once
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as in torchmetrics and torch-fidelity
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, as in their code

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The kernel (x.y / D + 1)^3 of KID: [N, D], [M, D] -> [N, M]."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The kernel exp(-|x - y|^2 / (2 sigma^2)) of CMMD: [N, D], [M, D] -> [N, M]."""
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.exp(-squares / (2 * CMMD_SIGMA**2))


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared discrepancy of features [N, D] and [M, D] with the cubic kernel."""
    n, m = len(x), len(y)
    xx, yy, xy = cubic(x, x), cubic(y, y), cubic(x, y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def kid(
    generated: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    resamples: int = 200,
    seed: int = 0,
) -> Estimate:
    """The kernel Inception distance (Binkowski et al. 2018) of features [N, D] and [M, D].

    It is the mean of the unbiased discrepancy over random subsets, as in torchmetrics and
    torch-fidelity; if both sets fit in a subset, that of all pictures. details["std"] is the
    deviation over subsets, which is not that of the mean. The interval resamples pictures. The
    unbiased form leaves out pairs of one picture with itself, and so do the resamples.

    Raises ValueError for fewer than 2 features or different widths.
    """
    x, y = _checked(generated, reference)
    sizes = min(subset_size, len(x)), min(subset_size, len(y))
    if sizes == (len(x), len(y)):
        values = np.array([polynomial_mmd(x, y)])
    else:
        rng = np.random.default_rng(seed)

        def subset(features: np.ndarray, size: int) -> np.ndarray:
            return features[rng.permutation(len(features))[:size]]

        values = np.array(
            [polynomial_mmd(subset(x, sizes[0]), subset(y, sizes[1])) for _ in range(subsets)]
        )
    value = float(values.mean())
    low = high = None
    if resamples:
        replicates = _replicates(x, y, cubic, resamples=resamples, seed=seed, with_itself=False)
        low, high = bootstrap.around(value, replicates)
    details = {"std": float(values.std()), "subsets": len(values), "subset_size": sizes[0]}
    return Estimate(value, low, high, False, len(x), details)


def cmmd(
    generated: np.ndarray, reference: np.ndarray, *, resamples: int = 200, seed: int = 0
) -> Estimate:
    """The CLIP-MMD (Jayasumana et al. 2024) of CLIP features [N, D] and [M, D], normalised here.

    The V-statistic, which keeps the pairs of a picture with itself, times 1000, as in the paper's
    code (google-research, cmmd/distance.py).

    Raises ValueError for fewer than 2 features or different widths.
    """
    x, y = (normalised(features) for features in _checked(generated, reference))
    weights = np.full((len(x), 1), 1.0)
    within = _self_mean(y, gaussian)
    value = float(_statistic(x, y, gaussian, weights, with_itself=True)[0] + within)
    low = high = None
    if resamples:
        replicates = _replicates(x, y, gaussian, resamples=resamples, seed=seed, with_itself=True)
        low, high = bootstrap.around(value, replicates)
        low, high = CMMD_SCALE * low, CMMD_SCALE * high
    return Estimate(CMMD_SCALE * value, low, high, False, len(x))


def normalised(features: np.ndarray) -> np.ndarray:
    """The features [N, D] scaled to length 1, float64."""
    features = np.asarray(features, np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def _checked(*sets: np.ndarray) -> list[np.ndarray]:
    """The features as float64; ValueError unless they have one width and at least 2 rows."""
    if any(s.ndim != 2 or len(s) < 2 for s in sets) or len({s.shape[1] for s in sets}) > 1:
        shapes = [list(s.shape) for s in sets]
        raise ValueError(f"mmd: expected features [N >= 2, D] of one D, got {shapes}")
    return [np.asarray(s, np.float64) for s in sets]


def _replicates(
    x: np.ndarray, y: np.ndarray, kernel: Kernel, *, resamples: int, seed: int, with_itself: bool
) -> np.ndarray:
    """The part of the discrepancy that changes with resampled x, [resamples]."""
    weights = bootstrap.counts(len(x), resamples=resamples, seed=seed)
    return _statistic(x, y, kernel, weights, with_itself=with_itself)


def _statistic(
    x: np.ndarray, y: np.ndarray, kernel: Kernel, weights: np.ndarray, *, with_itself: bool
) -> np.ndarray:
    """The value mean k(x, x') - 2 mean k(x, y) for each column of weights [N, R] of x, [R]."""
    own, across = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    total = weights.sum(0)
    pairs = total**2 if with_itself else total**2 - (weights**2).sum(0)
    for start in range(0, len(x), BLOCK):
        block, w = x[start : start + BLOCK], weights[start : start + BLOCK]
        rows = kernel(block, x)  # [b, N]
        if not with_itself:
            rows[np.arange(len(block)), start + np.arange(len(block))] = 0.0
        own += (w * (rows @ weights)).sum(0)
        across += w.T @ sum(kernel(block, y[i : i + BLOCK]).sum(1) for i in range(0, len(y), BLOCK))
    return own / pairs - 2 * across / (total * len(y))


def _self_mean(y: np.ndarray, kernel: Kernel) -> float:
    """The mean of k(y, y') over all pairs."""
    rows = range(0, len(y), BLOCK)
    return float(sum(kernel(y[i : i + BLOCK], y).sum() for i in rows) / len(y) ** 2)
