"""Kernels of frozen networks in int8: a code for each weight, a scale for each output.

    w[..., o] = scale[o] q[..., o],    scale[o] = max |w[..., o]| / 127,    q in -127 to 127

(symmetric, by the largest weight, as LLM.int8() has its weights, arXiv:2208.07339). A code is exact
in bfloat16, so a product is taken with the codes and its outputs are multiplied by their scales
(`products.dense_int8`). The codes are at PATH.kernel, the scales, float32, at PATH.kernel_scale;
biases, norms and tables stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdjax.models.adapters.networks import layers
from sdjax.models.products import Linear
from sdjax.models.stacked_paths import leading_axes

MOST = 127
_SCALE = "_scale"  # after the path of a kernel


@dataclasses.dataclass(frozen=True)
class Int8:
    """The change that has every kernel of some networks in int8; see `families.family.Change`."""

    names: tuple[str, ...]

    def __call__(self, name: str, network: Any, rngs: Any) -> None:
        """Give every dense layer and convolution codes and scales, zeros and ones."""
        for _, layer in layers(network) if name in self.names else ():
            shape = layer.kernel.shape
            lead = shape[: len(shape) - (2 if isinstance(layer, Linear) else 4)]
            layer.kernel = nnx.Param(jnp.zeros(shape, jnp.int8))
            layer.kernel_scale = nnx.Param(jnp.ones((*lead, shape[-1])))


def quantised(path: str, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes int8, scales float32) of a kernel [..., in, out], at most scale / 2 from it.

    Args:
        path: of the kernel; it tells stacked ones, whose scales are [N, out].
    """
    if leading_axes(path):  # one after the other: whole ones in float64 may be 10 GB
        codes, scales = zip(*(_quantised(one) for one in kernel), strict=True)
        return np.stack(codes), np.stack(scales)
    return _quantised(np.asarray(kernel))


def _quantised(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    most = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1))).astype(np.float32)
    scale = np.where(most == 0, np.float32(1), most / np.float32(MOST))
    codes = np.rint(kernel / scale.astype(np.float64))
    return np.clip(codes, -MOST, MOST).astype(np.int8), scale


def scale_path(kernel: str) -> str:
    """Return the path of the scales of a kernel."""
    return kernel + _SCALE


def in_files(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of `wanted`, by path, that files have: all but the scales."""
    return {path: want for path, want in wanted.items() if not path.endswith(f".kernel{_SCALE}")}
