"""The layers of an adapter: the factors of one module's change, and the change itself.

Symbols: W [out, in] or [out, in, kh, kw], the base weight in torch's layout; dW its change; r the
rank; s the scale, alpha / r, or alpha / sqrt(r) of rsLoRA.

    lora   dW = s up down                          Hu et al. 2021, section 4.1
    dora   W + dW = m (W + s up down) / ||W + s up down||      Liu et al. 2024, equation 5
    loha   dW = s (w1_a w1_b) * (w2_a w2_b)        LyCORIS, modules/loha.py
    lokr   dW = s kron(w1, w2)                     LyCORIS, modules/lokr.py
    full   dW = diff, or W + dW = set_weight

Convolutions: `lora_down` [r, in, kh, kw], `lora_up` [out, r, 1, 1]; Tucker's form has `lora_down`
[r, in, 1, 1] and the kernel in `lora_mid` [r, r, kh, kw].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

KINDS = ("lora", "dora", "loha", "lokr", "full")
DORA = "dora_scale"  # the magnitudes m, of LoHa and LoKr too
BIAS = "diff_b"  # a change of the bias, [out], which no scale multiplies
WHOLE = "set_weight"  # a weight in the place of the base's, as ComfyUI calls it


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterLayer:
    """The change of one module.

    kind: of `KINDS`.
    factors: {part: float32 array} in torch's layouts, under the names of kohya and LyCORIS without
        ".weight": lora_down, lora_up, lora_mid, hada_w1_a, ..., lokr_w1, ..., dora_scale, diff,
        diff_b, set_weight.
    scale: s; the factors are not scaled. A bias, `diff` and `dora_scale` are final.
    """

    kind: str
    factors: Mapping[str, np.ndarray]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The rank r; 0 where no factor has one."""
        for part in ("lora_down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
            if part in self.factors:
                tucker = part == "hada_w1_b" and "hada_t1" in self.factors
                return self.factors[part].shape[0] if not tucker else len(self.factors["hada_t1"])
        return 0

    @property
    def changes_weight(self) -> bool:
        """Whether it changes the weight, and not the bias alone."""
        return self.kind != "full" or "diff" in self.factors or WHOLE in self.factors

    @property
    def alpha(self) -> float:
        """The alpha of which readers make s, by alpha / r."""
        return self.scale * (self.rank or 1)


Adapter = dict[str, AdapterLayer]  # {path of a module, its network first: its change}


def delta(layer: AdapterLayer, weight: np.ndarray | None = None) -> np.ndarray:
    """Return the change of a weight, float32, in torch's layout.

    Args:
        weight: W; of a convolution it also says the kernel's size, where the factors do not.

    Raises:
        ValueError: a DoRA, or a weight in the place of W, without W.
    """
    if WHOLE in layer.factors:
        if weight is None:
            raise ValueError(f"{WHOLE} is a whole weight: its change needs the base weight")
        return layer.factors[WHOLE] - weight
    change = _product(layer)
    kernel = _kernel(layer)
    if weight is not None:
        change = change.reshape(weight.shape)
    elif kernel:
        change = change.reshape(len(change), -1, *kernel)
    if DORA not in layer.factors:
        return change
    if weight is None:
        raise ValueError("a DoRA says a weight by its direction: its change needs the base weight")
    return decomposed(weight.astype(np.float32) + change, layer.factors[DORA]) - weight


def decomposed(weight: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Return a weight with the direction of `weight` and the magnitudes given, float32.

    Args:
        weight: [out, in, ...].
        magnitude: [out], [out, 1, ...] of norms over each output's row; or [1, in, ...] of norms
            over each input's column, as older LyCORIS and OneTrainer have it.
    """
    by_input = per_input(magnitude)
    axes = tuple(axis for axis in range(weight.ndim) if axis != int(by_input))
    norm = np.sqrt(np.sum(np.square(weight, dtype=np.float64), axis=axes, keepdims=True))
    ratio = magnitude.reshape(norm.shape) / np.where(norm > 0, norm, 1.0)
    return np.asarray(weight * ratio, np.float32)


def per_input(magnitude: np.ndarray) -> bool:
    """Whether magnitudes are those of inputs: [1, in, ...] and not [out, 1, ...]."""
    return magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] != 1


def bias_delta(layer: AdapterLayer) -> np.ndarray | None:
    """Return the change of a module's bias, [out]; None where there is none."""
    return layer.factors.get(BIAS)


def _product(layer: AdapterLayer) -> np.ndarray:
    """Return s times the product of the factors, float32 [out, in * kh * kw], or [n] of a norm."""
    if layer.kind == "full":
        found = layer.factors["diff"]
        return found if found.ndim == 1 else found.reshape(len(found), -1)
    product = {"lora": low_rank, "dora": low_rank, "loha": _hadamard, "lokr": _kronecker}
    return np.float32(layer.scale) * product[layer.kind](layer)


def low_rank(layer: AdapterLayer) -> np.ndarray:
    """Return up times down, [out, in * kh * kw], without the scale."""
    up, down = lora_pair(layer)
    return up @ down


def lora_pair(layer: AdapterLayer) -> tuple[np.ndarray, np.ndarray]:
    """Return up [out, r] and down [r, in * kh * kw] of a LoRA, whose Tucker core is in down."""
    up, down = layer.factors["lora_up"], layer.factors["lora_down"]
    up = up.reshape(len(up), -1)
    if "lora_mid" in layer.factors:
        mid = layer.factors["lora_mid"]  # dW[o,i,h,w] = sum up[o,p] mid[p,q,h,w] down[q,i]
        down = np.einsum("pqhw,qi->pihw", mid, down.reshape(len(down), -1))
    return up, down.reshape(len(down), -1)


def _hadamard(layer: AdapterLayer) -> np.ndarray:
    halves = [_whole(layer.factors, f"hada_w{n}", f"hada_t{n}") for n in (1, 2)]
    return np.asarray(halves[0] * halves[1])


def _kronecker(layer: AdapterLayer) -> np.ndarray:
    """dW[o, i] = w1[o // b, i // d] w2[o % b, i % d], out = a b, in = c d, w1 [a, c], w2 [b, d].

    A kernel counts as the fast end of w2's second axis, and so of the product's.
    """
    w1 = _whole(layer.factors, "lokr_w1", "")
    return np.kron(w1, _whole(layer.factors, "lokr_w2", "lokr_t2"))


def _whole(factors: Mapping[str, np.ndarray], name: str, core: str) -> np.ndarray:
    """Return a factor [rows, columns * kh * kw] of its own two factors, if it has these.

    Args:
        core: of Tucker's form, [r, r, kh, kw]; its two factors are [r, rows] and [r, columns].
    """
    if name in factors:
        return factors[name].reshape(len(factors[name]), -1)
    a, b = factors[f"{name}_a"], factors[f"{name}_b"]
    if core in factors:
        product = np.einsum("ijhw,ip,jq->pqhw", factors[core], a, b)
        return product.reshape(len(product), -1)
    return a @ b.reshape(len(b), -1)


def _kernel(layer: AdapterLayer) -> tuple[int, ...]:
    """Return (kh, kw) where factors have a kernel; () for a matrix, or where they do not say."""
    for part in ("lora_mid", "lora_down", "hada_t1", "lokr_t2", "lokr_w2", "diff"):
        if part in layer.factors:
            return layer.factors[part].shape[2:]
    return ()


def fitted(layer: AdapterLayer, shape: Sequence[int]) -> AdapterLayer:
    """Return the layer in the layout of a module: a 1x1 convolution and a matrix are the same.

    Args:
        shape: of the module's weight, in torch's layout.

    Raises:
        ValueError: saying which factor has which shape, and what the module takes.
    """
    factors = dict(layer.factors)
    if layer.kind in ("lora", "dora") and "lora_mid" not in factors:
        ones = (1,) * (len(shape) - 2)
        for part in ("lora_down", "lora_up"):
            value = factors[part]
            if value.ndim != len(shape) and math.prod(value.shape[2:]) == 1:
                factors[part] = value.reshape(*value.shape[:2], *ones)
    if DORA in factors and len(shape) > 1:
        factors[DORA] = _magnitude(factors[DORA], shape)
    new = dataclasses.replace(layer, factors=factors)
    if problem := _misfit(new, tuple(shape)):
        raise ValueError(problem)
    return new


def _magnitude(value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return magnitudes as [out, 1, ...], or [1, in, ...] where their shape says so."""
    ones = (1,) * (len(shape) - 2)
    if value.shape[:2] == (1, shape[1]) and value.size == shape[1]:
        return value.reshape(1, shape[1], *ones)
    if value.size == shape[0]:
        return value.reshape(shape[0], 1, *ones)
    return value


def _misfit(layer: AdapterLayer, shape: tuple[int, ...]) -> str:
    """Return why factors do not make a change of `shape`, or ""."""
    found = {part: value.shape for part, value in layer.factors.items()}
    said = ", ".join(f"{part} is {size}" for part, size in found.items() if part != BIAS)
    if BIAS in found and found[BIAS] != shape[:1]:
        return f"{BIAS} is {found[BIAS]}, the module has {shape[0]} outputs"
    problem = f"{said}; the module's weight is {shape}"
    try:
        fits = _fits(layer, found, shape)
    except (IndexError, KeyError):
        fits = False
    return "" if fits else problem


def _fits(
    layer: AdapterLayer, found: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> bool:
    ones = (1,) * (len(shape) - 2)
    rows, columns = (shape[0], 1, *ones), (1, *shape[1:2], *ones)
    if DORA in found and (len(shape) < 2 or found[DORA] not in (rows, columns)):
        return False
    if layer.kind == "full":
        return all(found[part] == shape for part in ("diff", WHOLE) if part in found)
    if len(shape) < 2:
        return False
    flat = (shape[0], math.prod(shape[1:]))
    r = layer.rank
    if not r and layer.kind != "lokr":
        return False
    if layer.kind in ("lora", "dora"):
        if "lora_mid" in found:
            core = found["lora_mid"]
            return (
                len(shape) == 4
                and core[2:] == shape[2:]
                and found["lora_down"] == (core[1], shape[1], *ones)
                and found["lora_up"] == (shape[0], core[0], *ones)
            )
        return found["lora_down"] == (r, *shape[1:]) and found["lora_up"] == (shape[0], r, *ones)
    if layer.kind == "loha":
        halves = [_span(found, f"hada_w{n}", f"hada_t{n}", shape) for n in (1, 2)]
        return halves == [flat, flat]
    w1, w2 = _span(found, "lokr_w1", "", shape), _span(found, "lokr_w2", "lokr_t2", shape)
    return (w1[0] * w2[0], w1[1] * w2[1]) == flat


def _span(
    found: Mapping[str, tuple[int, ...]], name: str, core: str, shape: tuple[int, ...]
) -> tuple[int, int]:
    """Return the shape that `_whole` makes, (-1, -1) where the factors do not go together."""
    if name in found:
        return found[name][0], math.prod(found[name][1:])
    a, b = found[f"{name}_a"], found[f"{name}_b"]
    if core in found:
        t = found[core]
        whole = len(t) == 4 and len(a) == len(b) == 2 and t[:2] == (a[0], b[0])
        return (a[1], b[1] * math.prod(t[2:])) if whole and t[2:] == shape[2:] else (-1, -1)
    return (a[0], math.prod(b[1:])) if len(a) == 2 and a[1] == b[0] else (-1, -1)
