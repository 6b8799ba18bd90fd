"""Where each array lives: rules by parameter path and shape -> NamedSharding.

Models never mention a mesh. A parameter is split over `tensor` if its path matches a rule, and then
over `fsdp` along its largest dimension that divides evenly; optimizer moments and EMA follow their
parameter because they have its shape. Small arrays (biases, norms) stay whole. The first axis of
stacked blocks is never split: each block is gathered when it runs.

What only the update needs, moments and EMA, can be split over `data` as well, of which every device
holds a copy of the parameters: ZeRO-1 (arXiv:1910.02054), as XLA computes it (arXiv:2004.13336).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.models.stacked_paths import leading_axes
from sdjax.parallel.mesh import MeshConfig, count_slices

# Below this many elements splitting costs more in latency than it saves in memory.
MIN_FSDP_SIZE = 2**14

EMBEDDINGS = r"(^|\.)(embedding|token_embedding\.rows)$"
# Tables that are read by rows, and the first axis that may be split, stacked blocks aside. A
# look-up in a table that is split by rows would add up whole batches over all devices.
TABLES = ((EMBEDDINGS, 1), (r"(^|\.)pos_embed\.pos_embed$", 2))

# (path, dimension split over `tensor`). Column-parallel into the heads or the hidden width, then
# row-parallel out of it (Megatron-LM, arXiv:1909.08053, section 3).
TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"\.(to_q|to_k|to_v|q_proj|k_proj|v_proj|add_q_proj|add_k_proj|add_v_proj)\.kernel$", 1),
    (r"\.(to_out\.0|out_proj|to_add_out)\.kernel$", 0),
    (r"\.((ff|ff_context)\.net\.0\.proj|mlp\.fc1)\.kernel$", 1),
    (r"\.((ff|ff_context)\.net\.2|mlp\.fc2)\.kernel$", 0),
    # T5
    (r"\.(SelfAttention\.[qkv]|DenseReluDense\.(wi|wi_0|wi_1))\.kernel$", 1),
    (r"\.(SelfAttention\.o|DenseReluDense\.wo)\.kernel$", 0),
    # The modulations of a block, a quarter of an MMDiT, from one vector of each example.
    (r"\.(norm1|norm1_context)\.linear\.kernel$", 1),
    # FLUX.1's single blocks. The rows of proj_out are those of the heads and then of an MLP: a
    # device's part of both is elsewhere in the array, so that rows of the weight move between
    # devices when a block runs.
    (r"\.single_transformer_blocks\..*\.(norm\.linear|proj_mlp)\.kernel$", 1),
    (r"\.single_transformer_blocks\..*\.proj_out\.kernel$", 0),
)

# The fields of a moment in 8 bits: codes uint8, of the parameter's shape, and the scales of blocks.
BLOCKWISE = ("codes", "scales")


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """PartitionSpec of one parameter."""
    axes: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    if tensor > 1:
        for pattern, dim in TENSOR_RULES:
            dim += leading_axes(path)
            if re.search(pattern, path) and shape[dim] % tensor == 0:
                axes[dim] = "tensor"
    if fsdp > 1 and _size(path, shape) >= MIN_FSDP_SIZE:
        dims = range(_first_dim(path), len(shape))
        free = [d for d in dims if axes[d] is None and shape[d] % fsdp == 0]
        if free:
            axes[max(free, key=lambda d: shape[d])] = "fsdp"
    return P(*axes)


def update_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """PartitionSpec of what only the update needs: that of the parameter, and `data` besides.

    `data` shares a dimension with `fsdp` if it can: then a gradient is scattered over both at once.
    """
    axes = list(param_spec(path, shape, mesh))
    data = mesh.shape["data"]
    if data > 1 and _size(path, shape) >= MIN_FSDP_SIZE:
        dims = range(_first_dim(path), len(shape))
        fits = [d for d in dims if shape[d] % (data * _ways(axes[d], mesh)) == 0]
        if fits:
            dim = max(fits, key=lambda d: (axes[d] == "fsdp", axes[d] is None, shape[d]))
            axes[dim] = (*_names(axes[dim]), "data")
    return P(*axes)


def block_specs(path: str, shape: tuple[int, ...], mesh: Mesh, axes: Iterable[str]) -> tuple[P, P]:
    """Return the specs of a moment in 8 bits: of its codes, and of its scales [blocks, n].

    The codes have the parameter's shape. Both are split along `split_dim` alone, which no block
    crosses; `n` is its size. The `axes` that do not divide it leave them whole.
    """
    dim = split_dim(path, shape)
    taken: tuple[str, ...] = ()
    for axis in axes:
        if shape[dim] % (mesh.shape[axis] * _ways(taken, mesh)) == 0 and mesh.shape[axis] > 1:
            taken = (*taken, axis)
    own = taken or None
    return P(*(own if d == dim else None for d in range(len(shape)))), P(None, own)


def split_dim(path: str, shape: tuple[int, ...]) -> int:
    """The dimension that is split first, whatever the mesh: the largest."""
    return max(range(_first_dim(path), len(shape)), key=lambda d: shape[d])


def _first_dim(path: str) -> int:
    """The first axis that may be split."""
    rows = next((first for pattern, first in TABLES if re.search(pattern, path)), 0)
    return leading_axes(path) + rows


def _size(path: str, shape: tuple[int, ...]) -> int:
    """The elements of a parameter; of a stacked one, those of one block."""
    return math.prod(shape[leading_axes(path) :])


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis or ()


def _ways(axis: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    return math.prod(mesh.shape[name] for name in _names(axis))


def within_slices(mesh: Mesh, slices: int) -> Mesh:
    """The same devices with `data` cut in two: `slice`, and `data` within a slice."""
    if slices == 1:
        return mesh
    data, *others = mesh.devices.shape
    grid = mesh.devices.reshape(slices, data // slices, *others)
    return Mesh(grid, ("slice", *mesh.axis_names), axis_types=(mesh.axis_types[0],) * grid.ndim)


def state_shardings(
    state: Any,
    params: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    *,
    spec: Callable[[str, tuple[int, ...], Mesh], P] = param_spec,
) -> Any:
    """Shardings of a pytree whose leaves sit under parameter paths (parameters, moments, EMA).

    A leaf is placed by `spec` of parameter `path` if `path` is one of its dict keys and the shapes
    agree, or if it is part of a moment in 8 bits; anything else (counters, factored moments) is
    replicated.
    """
    replicated = NamedSharding(mesh, P())

    def place(key_path: tuple, leaf: Any) -> NamedSharding:
        part = getattr(key_path[-1], "name", "") if key_path else ""
        for entry in key_path:
            path = getattr(entry, "key", "")
            if path not in params:
                continue
            shape = params[path].shape
            if part in BLOCKWISE:
                axes = (name for axis in spec(path, shape, mesh) for name in _names(axis))
                codes, scales = block_specs(path, shape, mesh, axes)
                return NamedSharding(mesh, codes if part == "codes" else scales)
            if shape == leaf.shape:
                return NamedSharding(mesh, spec(path, shape, mesh))
        return replicated

    return jax.tree_util.tree_map_with_path(place, state)


def train_shardings(
    state: Mapping[str, Any],
    params: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    config: MeshConfig,
) -> tuple[dict[str, Any], dict[str, NamedSharding] | None]:
    """Return the shardings of the train state, and of gradients and parameters in the update.

    The second is None where each device computes the update of its part of the parameters.
    """
    whole = {name: state_shardings(part, params, mesh) for name, part in state.items()}
    if not config.shard_optimizer or mesh.shape["data"] == 1:
        return whole, None
    inner = within_slices(mesh, count_slices(config, list(mesh.devices.flat)))
    split = {name: state_shardings(state[name], params, inner, spec=update_spec)
             for name in ("opt_state", "ema")}  # fmt: skip
    update = {p: NamedSharding(inner, update_spec(p, v.shape, inner)) for p, v in params.items()}
    # Where the moments lie, which in 8 bits may be elsewhere.
    leaves = jax.tree_util.tree_leaves_with_path(state["opt_state"])
    for (key_path, leaf), own in zip(leaves, jax.tree.leaves(split["opt_state"]), strict=True):
        for path in (getattr(entry, "key", "") for entry in key_path):
            if path in params and params[path].shape == leaf.shape:
                update[path] = own
    return whole | split, update


def placed(abstract: Any, shardings: Any) -> Any:
    """The same shapes with their shardings, as a restore wants them."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )


def placed_like(tree: Any, like: Any) -> Any:
    """The arrays of `tree` where those of `like` lie; the same arrays if they lie there already."""
    return jax.tree.map(
        lambda x, y: x if x.sharding == y.sharding else jax.device_put(x, y.sharding), tree, like
    )


def to_host(array: Any) -> np.ndarray:
    """A whole array on every host, also where its shards are spread over several.

    All hosts must call it, for the same arrays in the same order. Gather leaf by leaf: every device
    holds the one under way in full for a moment.
    """
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.ascontiguousarray(array)
