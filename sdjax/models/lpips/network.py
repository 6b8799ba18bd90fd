"""LPIPS: how different two pictures look, by the features of a frozen VGG16 (arXiv:1801.03924).

The maths are those of lpips/lpips.py of its authors, version 0.1 of the linear heads. The heads are
in `heads.safetensors` beside this file, under the authors' licence (LICENSE); the user brings the
VGG16, whose names here are those of torchvision.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdjax.models.layers import Array, Dtype, conv
from sdjax.models.placement import activation
from sdjax.models.weights import load_file

HEADS_FILE = Path(__file__).with_name("heads.safetensors")
LEAST_SIDE = 16  # pixels: four poolings halve a picture
# Of pixels in [-1, 1]: ImageNet's mean and deviation (lpips.py, ScalingLayer).
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10  # lpips/__init__.py, normalize_tensor


@dataclasses.dataclass(frozen=True)
class LPIPSConfig:
    """The shape of the trunk; the defaults are VGG16's.

    widths, layers: of each block, its channels and its convolutions.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    layers: tuple[int, ...] = (2, 2, 3, 3, 3)


class ReLU(nnx.Module):
    """The activation max(x, 0), which stands in VGG's list of layers."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(x)


class MaxPool(nnx.Module):
    """The maximum of each square of 2 x 2; an odd last row or column is left out."""

    def __call__(self, x: Array) -> Array:
        return nnx.max_pool(x, (2, 2), strides=(2, 2))


class LPIPS(nnx.Module):
    """The distance of pictures.

    Args:
        config: the shape.
        dtype: of convolutions and activations; the distance is computed in float32.
        param_dtype: of the parameters.
        remat: takes no effect: the trunk is not trained.
        rngs: draws the parameters; not kept.
    """

    def __init__(
        self,
        config: LPIPSConfig,
        *,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        features: list[nnx.Module] = []
        ends = []  # the last activation of each block: relu1_2, 2_2, 3_3, 4_3, 5_3
        channels = 3
        for i, (width, layers) in enumerate(zip(config.widths, config.layers, strict=True)):
            features += [MaxPool()] if i else []
            for _ in range(layers):
                features += [conv(channels, width, **kw), ReLU()]
                channels = width
            ends.append(len(features) - 1)
        self.ends = tuple(ends)
        self.features = nnx.List(features)
        self.heads = nnx.List(nnx.Param(jnp.ones((w,), param_dtype)) for w in config.widths)
        self.dtype = dtype

    def __call__(self, a: Array, b: Array) -> Array:
        """Map pictures a and b [B, H, W, 3] in [-1, 1] to distances [B], float32, 0 or more."""
        return sum(self.parts(a, b))  # type: ignore[return-value]

    def parts(self, a: Array, b: Array) -> list[Array]:
        """Return the summands of the distance, [B] for each block."""
        pairs = zip(self._activations(a), self._activations(b), self.heads, strict=True)
        return [
            jnp.mean(jnp.square(normalised(f) - normalised(g)) @ head[...], axis=(1, 2))
            for f, g, head in pairs
        ]

    def _activations(self, images: Array) -> list[Array]:
        """The last activation of each block, [B, h, w, C] float32."""
        x = (images.astype(jnp.float32) - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)
        x, found = x.astype(self.dtype), []
        for i, layer in enumerate(self.features):
            x = activation(layer(x))
            if i in self.ends:
                found.append(x.astype(jnp.float32))
        return found


def normalised(features: Array) -> Array:
    """Return features [..., C] over their length along the last axis, plus 1e-10.

    The derivative at zeros is taken to be 0; that of the formula is NaN.
    """
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    some = squares > 0
    length = jnp.sqrt(jnp.where(some, squares, 1.0)) + _EPS
    return jnp.where(some, features / length, 0.0)


def shipped_heads() -> dict[str, Any]:
    """Return {path: float32 array} of the learned heads of version 0.1 for VGG16."""
    return load_file(HEADS_FILE)
