"""Adapters of whole networks: given to layers, folded into kernels, kept small."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdjax.errors import UserError
from sdjax.models import weights
from sdjax.models.adapters.factors import (
    Layer,
    Rule,
    kernel_shape,
    make_factors,
    output_norms,
)
from sdjax.models.products import Conv, Linear
from sdjax.models.stacked_paths import block_paths, leading_axes

Array = jax.Array

MARK = ".adapter."  # in the path of every factor, and of nothing else


def attach(network: nnx.Module, rules: Callable[[str, Layer], Rule | None], rngs: Any) -> None:
    """Give layers of a network adapters.

    Args:
        rules: (path of a layer within the network, the layer) -> its rule, or None for no adapter.
        rngs: gives a key for each draw by `rngs.params()`.
    """
    for path, layer in layers(network):
        if rule := rules(path, layer):
            layer.adapter = make_factors(layer, rule, rngs)


def folded(network: nnx.Module) -> dict[str, Array]:
    """Return {path: kernel} of the layers with adapters, as layers without would have them.

    They are float32. Adapters take no keys of dropout.
    """
    found = {}
    for path, layer in layers(network):
        if layer.adapter is not None:
            graph, params = weights.split(layer)

            def kernel(params: Any, graph: Any = graph) -> Array:
                whole = weights.merge(graph, params)
                return whole.adapter.kernel(whole)

            _, lead = kernel_shape(layer)
            fold = jax.jit(jax.vmap(kernel) if lead else kernel)
            found[f"{path}.kernel"] = fold(params)
    return found


def layers(network: nnx.Module) -> list[tuple[str, Layer]]:
    """Return (path, layer) of every layer that may have an adapter, in a lasting order."""
    found = [
        (".".join(map(str, path)), module)
        for path, module in nnx.iter_graph(network)
        if isinstance(module, Linear | Conv)
    ]
    return sorted(found, key=lambda one: one[0])


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression is found in the path of a layer.

    Raises:
        UserError: it is found in some of the blocks that are stacked, and not in all.
    """
    found = [bool(re.search(pattern, one)) for one in block_paths(path)]
    if any(found) and not all(found):
        raise UserError(
            f"the pattern {pattern!r} takes {sum(found)} of the {len(found)} blocks {path}; "
            "stacked blocks are adapted all in the same way: write one that takes all or none"
        )
    return found[0]


def magnitudes(path: str, kernel: np.ndarray) -> np.ndarray:
    """Return the norm of each output of a kernel [..., in, out], [out]; of each stacked block.

    Args:
        path: of the kernel, or of anything in the same layer: it tells stacked ones.
    """
    norm = jax.vmap(output_norms) if leading_axes(path) else output_norms
    return np.asarray(jax.jit(norm)(np.asarray(kernel, np.float32)))


def dropout_keys(paths: Sequence[str], shapes: Sequence[tuple[int, ...]], key: Array) -> dict:
    """Return {path: uint32 [(N,) 2]}, a key for each adapter, different for each.

    Args:
        paths: of the keys.
        shapes: theirs.
    """
    found = {}
    for i, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
        own = jax.random.fold_in(key, i)
        own = jax.random.split(own, shape[0]) if len(shape) > 1 else own
        found[path] = jax.random.key_data(own)
    return found


def within(params: dict[str, Array], scales: Mapping[str, float], most: float) -> dict[str, Array]:
    """Return factors of lora with no change of a kernel larger than `most`.

    Where n = ||s A B|| is larger, both factors are multiplied by sqrt(most / n) (kohya,
    `apply_max_norm_regularization`).

    Args:
        params: {path: array}.
        scales: {path of a layer: s}.
    """
    found = dict(params)
    for layer, scale in scales.items():
        first, second = f"{layer}{MARK}A", f"{layer}{MARK}B"
        if first not in params:
            continue  # of a group that is frozen
        b = params[second]
        a = params[first].reshape(*b.shape[:-2], -1, b.shape[-2])
        # ||A B||^2 is the sum over (A^T A) * (B B^T), which is r x r.
        squared = jnp.sum((a.mT @ a) * (b @ b.mT), (-2, -1), keepdims=True)
        norm = abs(scale) * jnp.sqrt(jnp.maximum(squared, 0))
        ratio = jnp.sqrt(most / jnp.maximum(norm, most))
        found[second] = b * ratio
        found[first] = (a * ratio).reshape(params[first].shape)
    return found
