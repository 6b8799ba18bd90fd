"""LoRAs made of weights: of the difference of two models, and of other LoRAs with more ranks.

The best product of rank r in the Frobenius norm is that of the r largest singular values (Eckart
and Young 1936). Each factor takes the square root of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg

from sdjax.families.family import Model
from sdjax.formats.adapters.layers import BIAS, DORA, WHOLE, Adapter, AdapterLayer, delta, lora_pair
from sdjax.formats.adapters.merging import part, torch_weight
from sdjax.formats.adapters.spellings import modules_of, trainable_names
from sdjax.formats.folders import ModelError
from sdjax.models.params import component
from sdjax.system import progress

Truncated = tuple[np.ndarray, np.ndarray, float]

# How a rank follows from the singular values S of a product (kohya, networks/resize_lora.py):
#   sv_fro         the fewest whose norm is this share of the norm of all
#   sv_cumulative  the fewest whose sum is this share of the sum of all
#   sv_ratio       those that are more than the largest one divided by this number
DYNAMIC = ("sv_fro", "sv_cumulative", "sv_ratio")
_NOTHING = 1e-6  # a largest singular value of no more is that of a change that is none


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The rank to bring a product to.

    most: the rank; with a rule, the largest one. None for any.
    rule, number: one of `DYNAMIC`, and its number; "" for `most` itself.
    """

    most: int | None = None
    rule: str = ""
    number: float = 0.0

    def of(self, values: np.ndarray) -> int:
        """Return the rank for singular values, largest first, at least 1."""
        most = len(values) if self.most is None else min(self.most, len(values))
        if not self.rule:
            return most
        if not len(values) or values[0] <= _NOTHING:
            return min(1, most)
        if self.rule == "sv_ratio":
            return min(max(int(np.sum(values > values[0] / self.number)), 1), most)
        power = 2 if self.rule == "sv_fro" else 1
        shares = np.cumsum(values**power) / np.sum(values**power)
        return min(int(np.searchsorted(shares, self.number**power)) + 1, most)


def extract(base: Model, tuned: Model, rank: int) -> tuple[Adapter, dict[str, float]]:
    """Return a LoRA that turns one model into another, as far as its rank allows.

    Args:
        rank: of each module; less where a module's weight has less.

    Returns:
        The LoRA of every Linear and convolution that differs, and {network: share of the squared
        norm of all its changes that the LoRA has}. Biases and norms are not in it.

    Raises:
        ModelError: the networks are not of one shape, or nothing differs.
    """
    _check_alike(base, tuned)
    adapter: Adapter = {}
    kept: dict[str, float] = {}
    matrices = {path: m for path, m in modules_of(base).items() if len(m.shape) > 1}
    with progress.work("extracting", len(matrices), unit="modules") as work:
        for path, module in matrices.items():
            own, other = part(base.params, module.weight), part(tuned.params, module.weight)
            change = torch_weight(np.asarray(other, np.float32)) - torch_weight(own)
            if np.any(change):
                up, down, _ = _truncated(change.reshape(len(change), -1), Ranks(rank))
                adapter[path] = _lora(up, down, module.shape)
                network = path.partition(".")[0]
                kept[network] = kept.get(network, 0.0) + _squared_product(up, down)
            work.advance(1)
    if not adapter:
        raise ModelError("--extract_lora: no weight of --input differs from --base's")
    return adapter, {name: value / _change(base, tuned, name) for name, value in kept.items()}


def resize(adapter: Adapter, ranks: Ranks, model: Model) -> tuple[Adapter, float]:
    """Return an adapter whose layers have the ranks that are asked for, and the share that is left.

    LoHa, LoKr and whole differences of matrices become LoRA. The magnitudes of a DoRA stay.

    Args:
        model: gives the modules' shapes; its parameters are not read.

    Returns:
        The adapter, and the share of the squared norm of all products that it has.
    """
    modules = modules_of(model)
    found: Adapter = {}
    before = after = 0.0
    for path, layer in adapter.items():
        shape = modules[path].shape
        if len(shape) == 1 or not layer.changes_weight or WHOLE in layer.factors:
            found[path] = layer
            continue
        up, down, total = _product_truncated(*_factors(layer, shape), ranks)
        before, after = before + total, after + _squared_product(up, down)
        new = _lora(up, down, shape)
        kept = {p: v for p, v in layer.factors.items() if p in (DORA, BIAS)}
        kind = "dora" if DORA in kept else "lora"
        found[path] = dataclasses.replace(new, kind=kind, factors={**new.factors, **kept})
    return found, after / before if before else 1.0


def _check_alike(base: Model, tuned: Model) -> None:
    names = trainable_names(base)
    if base.family is not tuned.family or not names or names != trainable_names(tuned):
        raise ModelError(
            f"--input has {', '.join(tuned.networks)} of {tuned.family.title}, --base "
            f"{', '.join(base.networks)} of {base.family.title}; expected the same networks"
        )
    for name in names:
        ours, theirs = component(base.params, name), component(tuned.params, name)
        shapes = {path: np.shape(value) for path, value in theirs.items()}
        differing = [
            f"{name}.{path} is {shapes.get(path)}, --base's {np.shape(value)}"
            for path, value in ours.items()
            if shapes.get(path) != np.shape(value)
        ]
        if differing:
            raise ModelError(f"--input and --base differ in shape: {'; '.join(differing[:4])}")


def _change(base: Model, tuned: Model, network: str) -> float:
    """The squared norm of every change of a network, biases and norms included."""
    own, other = component(base.params, network), component(tuned.params, network)
    return sum(_squared(other[path] - value) for path, value in own.items())


def _squared(value: np.ndarray) -> float:
    return float(np.sum(np.square(value, dtype=np.float64)))


def _squared_product(up: np.ndarray, down: np.ndarray) -> float:
    """The squared norm of up @ down, without making it."""
    left, right = up.astype(np.float64), down.astype(np.float64)
    return float(np.sum((left.T @ left) * (right @ right.T)))


def _truncated(matrix: np.ndarray, ranks: Ranks) -> Truncated:
    """(up [m, r], down [r, n], squared norm of all) of the best product of a rank.

    Eigenvectors of the smaller Gram matrix, in float64, are the singular vectors of that side. They
    take a fraction of the time of a whole decomposition, and float32 weights have no more digits.
    """
    wide = matrix.astype(np.float64)
    turned = wide.shape[0] > wide.shape[1]
    wide = wide.T if turned else wide
    size = len(wide)
    gram = wide @ wide.T
    needed = size if ranks.rule or ranks.most is None else min(ranks.most, size)
    squares, vectors = scipy.linalg.eigh(gram, subset_by_index=(size - needed, size - 1))
    squares, vectors = squares[::-1].clip(0.0), vectors[:, ::-1]
    rank = ranks.of(np.sqrt(squares))
    squares, vectors = squares[:rank], vectors[:, :rank]
    roots = squares**0.25  # of the singular values
    up, down = vectors * roots, (vectors.T @ wide) / np.where(roots > 0, roots, 1.0)[:, None]
    up, down = (down.T, up.T) if turned else (up, down)
    return _float32(up), _float32(down), float(np.trace(gram))


def _product_truncated(up: np.ndarray, down: np.ndarray, ranks: Ranks) -> Truncated:
    """`_truncated` of up @ down, through the triangles of both factors."""
    if up.shape[1] >= min(len(up), down.shape[1]):
        return _truncated(up @ down, ranks)
    left, left_core = np.linalg.qr(up.astype(np.float64))
    right, right_core = np.linalg.qr(down.astype(np.float64).T)
    own, values, other = np.linalg.svd(left_core @ right_core.T)
    rank = ranks.of(values)
    roots = np.sqrt(values[:rank])
    new_up, new_down = (left @ own[:, :rank]) * roots, (right @ other[:rank].T * roots).T
    return _float32(new_up), _float32(new_down), float(np.sum(values**2))


def _float32(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value, np.float32)


def _factors(layer: AdapterLayer, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(up [out, r], down [r, in * kh * kw]) of a change before any magnitudes, scaled."""
    if layer.kind in ("lora", "dora"):
        up, down = lora_pair(layer)
        return up * np.float32(layer.scale), down
    bare = {part: value for part, value in layer.factors.items() if part != DORA}
    whole = delta(dataclasses.replace(layer, factors=bare)).reshape(shape[0], -1)
    return np.eye(len(whole), dtype=np.float32), whole


def _lora(up: np.ndarray, down: np.ndarray, shape: tuple[int, ...]) -> AdapterLayer:
    ones = (1,) * (len(shape) - 2)
    factors = {
        "lora_down": down.reshape(len(down), *shape[1:]),
        "lora_up": up.reshape(*up.shape, *ones),
    }
    return AdapterLayer("lora", factors)
