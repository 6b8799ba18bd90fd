"""The files of weights in a folder of a diffusers or transformers checkpoint: found and written.

A network's folder has one of, or several:

    STEM.safetensors                        the weights
    STEM.safetensors.index.json             a list of the files they are spread over,
    STEM-00001-of-00002.safetensors         which have these names
    STEM.VARIANT.safetensors,
    STEM.safetensors.index.VARIANT.json     the same, in half precision or without EMA
    STEM.bin                                a pickle, which sdjax does not read: it can run code
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from sdjax.models.weights import WeightsError, save_file, tensor_shapes, to_diffusers
from sdjax.system import paths

STEMS = ("diffusion_pytorch_model", "model")  # of diffusers and of transformers
# As in save_pretrained of diffusers, and of transformers until 5.
MAX_SHARD_SIZES = dict(zip(STEMS, ("10GB", "5GB"), strict=True))
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack")


def find_weights(folder: paths.Path, variant: str = "") -> paths.Path:
    """The safetensors file of a network, or the index of its files.

    Args:
        folder: of the network.
        variant: which one, as "fp16" or "non_ema". "" takes the plain one, and the only variant
            where there is no plain one.

    Raises:
        WeightsError: there is none, or a choice has to be made; says which there are.
    """
    found = _by_variant(folder)
    if variant in found:
        return found[variant]
    if variant:
        has = ", ".join(_label(name) for name in found) or "none"
        raise WeightsError(f"{folder}: no weights of variant {variant!r}; it has: {has}")
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise WeightsError(
            f"{folder}: weights of several variants and none without: {', '.join(found)}; "
            "say which (--variant), or delete the others"
        )
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLES)
    if pickles:
        raise WeightsError(
            f"{folder}: weights only as {', '.join(pickles)}, which sdjax does not read, as a "
            "pickle can run code. Write safetensors where torch is installed: load the pipeline "
            "with from_pretrained(DIR), then save_pretrained(NEW, safe_serialization=True)"
        )
    raise WeightsError(
        f"{folder}: no weights; expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors"
    )


def _by_variant(folder: paths.Path) -> dict[str, paths.Path]:
    """{variant: file}, "" for the plain weights. A single file wins over an index."""
    found: dict[str, paths.Path] = {}
    for stem in STEMS:
        for file in sorted(folder.glob(f"{stem}.*json")):
            middle = file.name.removeprefix(stem).removesuffix(".json").removesuffix(".index")
            # "X.safetensors.index.fp16" or, with an older diffusers, "X.fp16.safetensors.index"
            parts = [part for part in middle.split(".") if part not in ("", "safetensors", "index")]
            if ".safetensors" in middle:
                found[".".join(parts)] = file
        for file in sorted(folder.glob(f"{stem}.*safetensors")):
            middle = file.name.removeprefix(stem).removesuffix("safetensors")
            if "-of-" not in middle:  # not one of several files
                found[middle.strip(".")] = file
    return found


def _label(variant: str) -> str:
    return repr(variant) if variant else "one without a variant"


def parse_size(text: str) -> int:
    """Bytes of a size as "10GB", "500MB" or "2GiB". WeightsError if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise WeightsError(f"max_shard_size is {text!r}; expected a size as 5GB, 500MB or 2GiB")
    return size


def write_weights(
    folder: paths.Path,
    params: Mapping[str, np.ndarray],
    *,
    name: str,
    text: bool,
    prefix: str,
    dtype: str = "float32",
    max_shard_size: str = "",
) -> None:
    """Writes one network's parameters under the names of diffusers, in one file or several.

    Only one file's worth of converted weights is in memory at a time, and one parameter.

    Args:
        folder: of the network; exists.
        params: `{path: array}` of the network.
        name: of the network, for messages.
        text: whether it is a text encoder, whose files are those of transformers.
        prefix: put before the name of each weight.
        dtype: of the weights in the files.
        max_shard_size: the weights are spread over files of at most this, as "2GB", except that a
            larger weight has a file of its own; "" takes the library's.

    Raises:
        WeightsError: a weight overflows in `dtype`, or the size is none.
        OSError: the disk's own error.
    """
    stem = STEMS[1 if text else 0]
    itemsize = jnp.dtype(dtype).itemsize
    limit = parse_size(max_shard_size or MAX_SHARD_SIZES[stem])
    counts = _shards(tensor_shapes(params), itemsize, limit)
    files = [f"{stem}.safetensors"]
    if len(counts) > 1:
        total = len(counts)
        files = [f"{stem}-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    weight_map: dict[str, str] = {}
    tensors: dict[str, np.ndarray] = {}
    file = 0
    for path, value in params.items():
        # transformers 4 insists on this prefix, and 5 takes it off where it is; a head has none.
        head = path.startswith("text_projection.")
        for key, tensor in to_diffusers({path: value}, prefix="" if head else prefix).items():
            tensors[key] = cast(f"{name}: {key}", tensor, dtype)
            if len(tensors) == counts[file]:
                save_file(tensors, folder / files[file])
                weight_map |= dict.fromkeys(tensors, files[file])
                tensors, file = {}, file + 1
    if len(files) > 1:
        size = sum(v.size for v in params.values()) * itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        listed = json.dumps(index, indent=2) + "\n"
        paths.write_text(folder / f"{stem}.safetensors.index.json", listed)


def _shards(shapes: Mapping[str, Sequence[int]], itemsize: int, limit: int) -> list[int]:
    """How many weights each file has, in order."""
    counts, room = [0], limit
    for shape in shapes.values():
        size = math.prod(shape) * itemsize
        if size > room and counts[-1]:
            counts.append(0)
            room = limit
        counts[-1] += 1
        room -= size
    return counts


def untied(
    tensors: Mapping[str, np.ndarray], tied: Mapping[str, str], file: object
) -> dict[str, np.ndarray]:
    """Return the weights of a file with each tied one under one name.

    Args:
        tied: {another name of a weight: its own}; a file has either or both.

    Raises:
        WeightsError: a file has both, and they differ.
    """
    found = dict(tensors)
    for alias, name in tied.items():
        if alias not in found:
            continue
        value = found.pop(alias)
        if not np.array_equal(found.setdefault(name, value), value):
            raise WeightsError(
                f"{file}: {alias} and {name} are one weight, and differ; get the file again"
            )
    return found


def cast(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """`value` in `dtype`. WeightsError, with `name`, if it is too large for that."""
    with np.errstate(over="ignore"):
        new = value.astype(jnp.dtype(dtype), copy=False)
    if new.dtype != value.dtype and np.any(np.isinf(new) & np.isfinite(value)):
        limit, other = float(jnp.finfo(dtype).max), "bfloat16" if dtype == "float16" else "float32"
        raise WeightsError(
            f"{name} reaches {np.abs(value).max():.3g}, beyond {dtype}'s {limit:.6g}; use {other}"
        )
    return new
