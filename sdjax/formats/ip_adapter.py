"""IP-Adapters in files: a .safetensors or a .bin with the names of their authors.

    image_proj.proj.weight [T D, E]   image_proj.norm.weight [D]   (and biases)
    ip_adapter.N.to_k_ip.weight [C, D]   ip_adapter.N.to_v_ip.weight

of the plain form; of Plus image_proj.latents [1, T, W] and a resampler in place of the first line.
N = 1, 3, 5, ... counts the attention layers of diffusers' `attn_processors`, of which every second
is a cross-attention. A .bin has two dictionaries with these names, without the first word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.families.beside.ip_adapter import PART
from sdjax.families.bind import abstract_params
from sdjax.formats.folders import ModelError
from sdjax.formats.torch_file import read_tensors
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.models.weights import (
    WeightsError,
    from_diffusers,
    load_file,
    read_header,
    save_file,
    to_diffusers,
)
from sdjax.system import paths
from sdjax.system.untrusted import explained

FILE = "ip_adapter.safetensors"
_PARTS = ("image_proj", "ip_adapter")
# Weights that kinds have which are not read.
_OTHERS = {
    "image_proj.proj.0.weight": "an IP-Adapter Full Face or FaceID, with layers of its own",
    "image_proj.perceiver_resampler.proj_in.weight": "an IP-Adapter FaceID Plus",
}
_RESAMPLED = re.compile(r"image_proj\.layers\.(\d{1,3})\.")
_EVEN = "even:"
_LAYER = re.compile(r"ip_adapter\.(\d{1,5})\.(to_[kv]_ip\.weight)")


def is_ip_adapter(path: paths.Path) -> bool:
    """Whether a file is one of an IP-Adapter, by its names; a .bin is taken for one."""
    if not path.is_file() or path.suffix != ".safetensors":
        return path.is_file() and path.suffix == ".bin"
    try:
        return any(name.startswith("image_proj.") for name in read_header(path)[0])
    except WeightsError:
        return False


def read_ip_adapter_file(file: paths.Path) -> tuple[IPAdapterConfig, dict[str, np.ndarray]]:
    """Return the config and {path: float32 array} of an IP-Adapter.

    Raises:
        ModelError: it is none, or of a kind that sdjax does not know.
    """
    if file.suffix not in (".safetensors", ".bin"):
        raise ModelError(f"{file}: expected a .safetensors or .bin file of an IP-Adapter")
    try:
        with explained(file, "an IP-Adapter", error=ModelError):
            return _read(file)
    except WeightsError as error:
        raise ModelError(str(error)) from error


def _read(file: paths.Path) -> tuple[IPAdapterConfig, dict[str, np.ndarray]]:
    if file.suffix == ".bin":
        groups = {part: read_tensors(file, inner=(part,)) for part in _PARTS}
        tensors = {f"{part}.{n}": v for part, own in groups.items() for n, v in own.items()}
    else:
        tensors = load_file(file)
    config = _config(file, tensors)
    own = {_ours(name): value for name, value in tensors.items()}
    wanted = abstract_params(PART, config)
    try:
        return config, from_diffusers(own, wanted, spell=_theirs)
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from error


def _config(file: paths.Path, tensors: Mapping[str, np.ndarray]) -> IPAdapterConfig:
    """The shape of what has these weights."""
    for name, kind in _OTHERS.items():
        if name in tensors:
            raise ModelError(
                f"{file} is {kind}, which sdjax does not read; take a plain one, as "
                "ip-adapter_sd15.safetensors is"
            )
    shape = _projection(file, {n: v.shape for n, v in tensors.items()})
    found = {
        int(match[1]): value
        for name, value in tensors.items()
        if (match := _LAYER.fullmatch(name)) and match[2].startswith("to_k") and value.ndim == 2
    }
    if not found or sorted(found) != list(range(1, 2 * len(found), 2)):
        raise ModelError(
            f"{file} has the layers {sorted(found)[:8]} ... of ip_adapter.N.to_k_ip.weight; "
            "expected N = 1, 3, 5, ..."
        )
    try:
        widths = tuple(found[number].shape[0] for number in sorted(found))
        return IPAdapterConfig(**shape, widths=widths)
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from error


def _projection(file: paths.Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The fields of a config that follow from what makes the tokens."""

    def shape(name: str, count: int) -> tuple[int, ...]:
        found = shapes.get(f"image_proj.{name}", ())
        if len(found) != count or not all(found):
            raise ModelError(
                f"{file} has no image_proj.{name} of {count} axes, as files of IP-Adapters have it"
            )
        return found

    if "image_proj.latents" not in shapes:
        (rows, dim), (width,) = shape("proj.weight", 2), shape("norm.weight", 1)
        return {"embedding_dim": dim, "cross_attention_dim": width, "tokens": rows // width}
    _, tokens, own = shape("latents", 3)
    layers = {m[1] for name in shapes if (m := _RESAMPLED.match(name))}
    return {
        "embedding_dim": shape("proj_in.weight", 2)[1],
        "cross_attention_dim": shape("proj_out.weight", 2)[0],
        "tokens": tokens,
        "resampler_layers": len(layers),
        "resampler_width": own,
    }


def _ours(name: str) -> str:
    """The name with the number of the cross-attention, 0, 1, ..., for a file's."""
    if (match := _LAYER.fullmatch(name)) is None:
        return name
    number = int(match[1])
    # An even number is of no cross-attention: it keeps a name that no weight has.
    return f"ip_adapter.{number // 2}.{match[2]}" if number % 2 else _EVEN + name


def _theirs(name: str) -> str:
    """The inverse of `_ours`."""
    if match := _LAYER.fullmatch(name):
        return f"ip_adapter.{2 * int(match[1]) + 1}.{match[2]}"
    return name.removeprefix(_EVEN)


def write_ip_adapter(folder: paths.Path, params: Mapping[str, Any]) -> paths.Path:
    """Write the file that diffusers' `load_ip_adapter` reads, FILE in a folder; return the file.

    Args:
        params: {path without prefix: array}.
    """
    paths.make_folder(folder)
    save_file({_theirs(n): v for n, v in to_diffusers(params).items()}, folder / FILE)
    return folder / FILE
