"""pytorch-fid's distance with every SciPy.

pytorch-fid 0.3.0, its last, asks `scipy.linalg.sqrtm` for the error of the root by `disp=False`,
which SciPy 1.18 no longer takes.
That SciPy finds no root of a product with two columns of zeros, and pytorch-fid then adds to the
diagonals; what it adds by itself, 1e-6, changes the distance by its root.
"""

import types
import warnings
from unittest import mock

import scipy.linalg


def _sqrtm(matrix, disp=True):
    root = scipy.linalg.sqrtm(matrix)
    return root if disp else (root, None)


def calculate_frechet_distance(mu1, sigma1, mu2, sigma2):
    """`pytorch_fid.fid_score.calculate_frechet_distance` of means [D] and covariances [D, D]."""
    from pytorch_fid import fid_score

    linalg = types.SimpleNamespace(sqrtm=_sqrtm)
    with warnings.catch_warnings(), mock.patch.object(fid_score, "linalg", linalg):
        warnings.simplefilter("ignore")  # the root of a singular product
        return fid_score.calculate_frechet_distance(mu1, sigma1, mu2, sigma2, eps=1e-20)
