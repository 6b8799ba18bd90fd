"""Modules that are several here and one in a file: query, key and value side by side.

A LoRA of the whole has one `lora_down` for all and the rows of its `lora_up` for each. Several
LoRAs become one whose `lora_up` is block-diagonal; its rank is the sum of theirs. Such a one is
taken apart again, factor by factor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sdjax.families.single_file import Change
from sdjax.formats.adapters.layers import (
    BIAS,
    DORA,
    WHOLE,
    AdapterLayer,
    delta,
    fitted,
    per_input,
)
from sdjax.formats.adapters.spellings import Target

_LOW_RANK = ("lora", "dora")


def split_layer(
    layer: AdapterLayer, target: Target, shapes: Sequence[tuple[int, ...]]
) -> list[tuple[str, AdapterLayer]]:
    """Return (path, change) of each module of a target; those that do not change are left out.

    Args:
        shapes: of the modules' weights.

    Raises:
        ValueError: the rows are not those of the modules, or the change cannot be divided.
    """
    if target.is_plain:
        return [(target.parts[0], layer)]
    if layer.kind == "lokr":  # whose product is made here: it has to be of the modules' size
        layer = fitted(layer, (sum(shape[0] for shape in shapes), *shapes[0][1:]))
    layer = _in_rows(layer, "read")
    rows = max(len(layer.factors[part]) for part in _row_parts(layer))
    ends = np.cumsum([shape[0] for shape in shapes])
    if rows not in ends:  # the first of them alone are there in files of XLabs
        raise ValueError(f"its outputs are {rows:,}; the modules {', '.join(target.parts)} have "
                         f"{', '.join(str(shape[0]) for shape in shapes)}")  # fmt: skip
    count = int(np.searchsorted(ends, rows)) + 1
    spans = [slice(end - shape[0], end) for end, shape in zip(ends, shapes, strict=True)][:count]
    used = _own_columns(layer, spans)
    found = []
    for path, place, span, columns in zip(target.parts, target.places, spans, used, strict=False):
        if columns is not None and not columns.any():
            continue
        found.append((path, _rows(layer, span, place.from_file, columns)))
    return found


def join_layers(
    layers: Sequence[AdapterLayer | None], target: Target, shapes: Sequence[tuple[int, ...]]
) -> AdapterLayer:
    """Return the change of the one module in a file that several are; the inverse of `split_layer`.

    Args:
        layers: of each module of the target; None where it does not change.

    Raises:
        ValueError: saying why they do not go together.
    """
    if target.is_plain:
        assert layers[0] is not None
        return layers[0]
    every = [None if layer is None else _in_rows(layer, "written") for layer in layers]
    there = [layer for layer in every if layer is not None]
    turned = [
        None if layer is None else _rows(layer, slice(None), place.to_file, None)
        for layer, place in zip(every, target.places, strict=True)
    ]
    if len(target.parts) == 1:
        assert turned[0] is not None
        return turned[0]
    kinds = {layer.kind for layer in there}
    names = ", ".join(target.parts)
    if len(kinds) > 1 or not kinds <= {*_LOW_RANK, "full"}:
        raise ValueError(
            f"{names} are one module in such a file and cannot be joined: they are of the kind "
            f"{' and '.join(sorted(kinds))}; merge the adapter into its model instead (--lora)"
        )
    if kinds == {"dora"} and len(there) < len(layers):
        raise ValueError(
            f"{names} are one module in such a file, and not all of them are DoRA; train all, "
            "write --format=diffusers, or merge the adapter into its model (--lora)"
        )
    factors: dict[str, np.ndarray] = {}
    scale = 1.0
    if kinds <= set(_LOW_RANK):
        scales = {layer.scale for layer in there}
        scale = scales.pop() if len(scales) == 1 else 1.0
        factors = _block_diagonal(turned, shapes, scale)
    for part in ("diff", BIAS, DORA):
        if any(part in layer.factors for layer in there):
            factors[part] = _concatenated(turned, shapes, part)
    return AdapterLayer(there[0].kind, factors, scale)


def _in_rows(layer: AdapterLayer, done: str) -> AdapterLayer:
    """Return a change whose outputs are rows of its factors; LoKr has none, and becomes `full`."""
    if DORA in layer.factors and per_input(layer.factors[DORA]):
        raise ValueError(f"its magnitudes are of inputs, over all outputs of a module in a file; "
                         f"it cannot be {done}")  # fmt: skip
    if layer.kind != "lokr" or DORA in layer.factors:
        if DORA in layer.factors and layer.kind == "lokr":
            raise ValueError(f"a LoKr with magnitudes over several modules cannot be {done}")
        return layer
    kept = {BIAS: layer.factors[BIAS]} if BIAS in layer.factors else {}
    return AdapterLayer("full", {"diff": delta(layer), **kept})


def _row_parts(layer: AdapterLayer) -> list[str]:
    """The factors whose first axis is that of the outputs."""
    parts = ("lora_up", "hada_w1_a", "hada_w2_a", "diff", WHOLE, BIAS, DORA)
    return [part for part in parts if part in layer.factors]


def _rows(
    layer: AdapterLayer, span: slice, change: Change, columns: np.ndarray | None
) -> AdapterLayer:
    """Return some outputs of a change, in another order, and some of its ranks."""
    factors = dict(layer.factors)
    for part in _row_parts(layer):
        factors[part] = np.ascontiguousarray(change(factors[part][span]))
    if columns is not None:
        factors["lora_up"] = np.ascontiguousarray(factors["lora_up"][:, columns])
        factors["lora_down"] = np.ascontiguousarray(factors["lora_down"][columns])
    return dataclasses.replace(layer, factors=factors)


def _own_columns(layer: AdapterLayer, spans: Sequence[slice]) -> list[np.ndarray | None]:
    """Return which ranks are each module's own, bool [r]; None for all, where they share some."""
    nothing: list[np.ndarray | None] = [None] * len(spans)
    if layer.kind not in _LOW_RANK or len(spans) == 1:
        return nothing
    up = layer.factors["lora_up"]
    used = [np.any(up[span] != 0, axis=tuple({0, *range(2, up.ndim)})) for span in spans]
    counts = np.sum(used, axis=0)
    if counts.max() != 1 or (layer.kind == "dora" and not all(u.any() for u in used)):
        return nothing
    if BIAS in layer.factors:
        return nothing
    return list(used)


def _block_diagonal(
    layers: Sequence[AdapterLayer | None], shapes: Sequence[tuple[int, ...]], scale: float
) -> dict[str, np.ndarray]:
    rank = sum(layer.rank for layer in layers if layer is not None)
    up = np.zeros((sum(shape[0] for shape in shapes), rank), np.float32)
    downs, row, column = [], 0, 0
    for layer, shape in zip(layers, shapes, strict=True):
        if layer is not None:
            block = layer.factors["lora_up"] * np.float32(layer.scale / scale)
            up[row : row + shape[0], column : column + layer.rank] = block
            downs.append(layer.factors["lora_down"])
            column += layer.rank
        row += shape[0]
    return {"lora_up": up, "lora_down": np.concatenate(downs)}


def _concatenated(
    layers: Sequence[AdapterLayer | None], shapes: Sequence[tuple[int, ...]], part: str
) -> np.ndarray:
    """Return one part of several changes, one after the other; zeros for those that lack it."""
    sample = next(layer.factors[part] for layer in layers if layer and part in layer.factors)
    rows = []
    for layer, shape in zip(layers, shapes, strict=True):
        if layer is not None and part in layer.factors:
            rows.append(layer.factors[part])
        else:
            rows.append(np.zeros((shape[0], *sample.shape[1:]), np.float32))
    return np.concatenate(rows)
