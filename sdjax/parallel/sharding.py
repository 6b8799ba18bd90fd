"""Where each array lives: rules by parameter path and shape -> NamedSharding.

Models never mention a mesh. A parameter is split over `tensor` if its path matches a rule, and then
over `fsdp` along its largest dimension that divides evenly; optimizer moments and EMA follow their
parameter because they have its shape. Small arrays (biases, norms) stay whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Below this many elements splitting costs more in latency than it saves in memory.
MIN_FSDP_SIZE = 2**14

# (path, dimension split over `tensor`). Column-parallel into the heads or the hidden width, then
# row-parallel out of it (Megatron-LM, arXiv:1909.08053, section 3).
# A look-up in a table that is split by rows would add up whole batches over all devices.
EMBEDDINGS = r"_embedding\.embedding$"

TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"\.(to_q|to_k|to_v|q_proj|k_proj|v_proj)\.kernel$", 1),
    (r"\.(to_out\.0|out_proj)\.kernel$", 0),
    (r"\.(ff\.net\.0\.proj|mlp\.fc1)\.kernel$", 1),
    (r"\.(ff\.net\.2|mlp\.fc2)\.kernel$", 0),
)


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """PartitionSpec of one parameter."""
    axes: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    if tensor > 1:
        for pattern, dim in TENSOR_RULES:
            if re.search(pattern, path) and shape[dim] % tensor == 0:
                axes[dim] = "tensor"
    if fsdp > 1 and np.prod(shape) >= MIN_FSDP_SIZE:
        dims = range(1 if re.search(EMBEDDINGS, path) else 0, len(shape))
        free = [d for d in dims if axes[d] is None and shape[d] % fsdp == 0]
        if free:
            axes[max(free, key=lambda d: shape[d])] = "fsdp"
    return P(*axes)


def state_shardings(state: Any, params: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> Any:
    """Shardings of a pytree whose leaves sit under parameter paths (parameters, moments, EMA).

    A leaf is placed like parameter `path` if `path` is one of its dict keys and the shapes agree;
    anything else (counters, factored moments) is replicated.
    """
    replicated = NamedSharding(mesh, P())

    def place(key_path: tuple, leaf: Any) -> NamedSharding:
        for entry in key_path:
            path = getattr(entry, "key", "")
            if path in params and params[path].shape == leaf.shape:
                return NamedSharding(mesh, param_spec(path, leaf.shape, mesh))
        return replicated

    return jax.tree_util.tree_map_with_path(place, state)


def placed(abstract: Any, shardings: Any) -> Any:
    """The same shapes with their shardings, as a restore wants them."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )


def to_host(array: Any) -> np.ndarray:
    """A whole array on every host, also where its shards are spread over several.

    All hosts must call it, for the same arrays in the same order. Gather leaf by leaf: every device
    holds the one under way in full for a moment.
    """
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.ascontiguousarray(array)
