"""Weights and inputs of known values, whose outputs in the references are on record."""

import numpy as np

from sdjax.models import weights


def filled(shapes, *, leave=()):
    """{torch name: array}: 0.05 cos(0.1 k + j) for element k of the j-th name, norm scales + 1."""
    blank = {path: np.broadcast_to(np.float32(0), s.shape) for path, s in shapes.items()}
    tensors = {}
    for j, (name, array) in enumerate(sorted(weights.to_diffusers(blank).items())):
        waves = 0.05 * np.cos(0.1 * np.arange(array.size) + j).reshape(array.shape)
        scale = array.ndim == 1 and name.endswith("weight")
        if name not in leave:
            tensors[name] = (waves + scale).astype(np.float32)
    return tensors


def wave(phase, *shape):
    """The values sin(0.37 k + phase), in the given shape."""
    return np.sin(0.37 * np.arange(np.prod(shape)) + phase).reshape(shape).astype(np.float32)


def summary(array):
    """[sum, sum of squares, and the first values] of an array in float64."""
    array = np.asarray(array, np.float64)
    return [array.sum(), np.square(array).sum(), *array.reshape(-1)[:4]]
