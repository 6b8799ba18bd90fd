"""Adapters: small trained factors beside the frozen kernel of a layer.

    lora   y = x W + s (x A) B + b                       (arXiv:2106.09685)
    dora   y = m / n (x W + s (x A) B) + b, n = ||W + s A B|| of each output (arXiv:2402.09353)
    loha   y = x (W + s (A1 B1) * (A2 B2)) + b           (arXiv:2108.06098)
    lokr   y = x (W + s kron(w1, w2)) + b                (LyCORIS, arXiv:2309.14859)

Kernels are [in, out], or [kH, kW, in, out]; then A is a convolution [kH, kW, in, r] and B [r, out].
The first two are computed from activations, so a frozen W costs no product for its gradient. Blocks
that are stacked have factors with the same leading axis.

The factors of a layer are `PATH.adapter.A` and so on, float32; products are in the layer's dtype.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from sdjax.errors import UserError
from sdjax.models import weights
from sdjax.models.products import Conv, Linear
from sdjax.models.stacked_paths import block_paths, leading_axes

Array = jax.Array
Layer = Linear | Conv

KINDS = ("lora", "dora", "loha", "lokr")
INITS = ("kaiming", "gaussian")
MARK = ".adapter."  # in the path of every factor, and of nothing else
KEY = "key"  # of dropout, uint32 [2]


@dataclasses.dataclass(frozen=True)
class Dropout:
    """The rates, each in [0, 1), at which parts of adapters are dropped while training.

    inputs: of values of x, before A, as PEFT's lora_dropout.
    hidden: of values between A and B, as kohya's network_dropout.
    rank: of ranks, the same ones at every position of an example, as kohya's rank_dropout.
    module: of whole adapters, for all of the batch, as kohya's module_dropout.
    """

    inputs: float = 0.0
    hidden: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one layer is adapted.

    rank: of the factors, at least 1.
    scale: s of the formulas.
    init: of A: "kaiming", U(+-1/sqrt(fan_in)) as PEFT and kohya have it, or "gaussian", N(0, 1/r^2)
        as the examples of diffusers.
    factor: of lokr, see `factorization`.
    full_matrix: of lokr, whether w2 is never split into two of rank r.
    dropout: of the training loss alone.
    """

    kind: str = "lora"
    rank: int = 4
    scale: float = 1.0
    init: str = "kaiming"
    factor: int = -1
    full_matrix: bool = False
    dropout: Dropout = Dropout()


class LowRank(nnx.Module):
    """The factors of lora and dora."""

    def __init__(self, layer: Layer, rule: Rule, rngs: Any):
        shape, lead = _shape(layer)
        self.A = nnx.Param(_first(rule, (*lead, *shape[:-1], rule.rank), len(lead), rngs))
        self.B = nnx.Param(jnp.zeros((*lead, rule.rank, shape[-1])))
        # The norm of a kernel that is there; see `magnitudes`.
        own = nnx.Param(jnp.ones((*lead, shape[-1])))
        self.magnitude = own if rule.kind == "dora" else None
        _add_key(self, rule, lead)
        self.rule = rule

    def __call__(self, layer: Layer, x: Array) -> Array:
        """See `products.Adapter`."""
        a, b, drop = self.A[...], self.B[...], _Dropped(self)
        seen = drop.inputs(x)
        hidden = drop.hidden(layer.product(seen, a))
        change = drop.module(self.rule.scale * hidden) @ b.astype(x.dtype)
        y = layer.product(x, layer.kernel[...])
        if self.magnitude is None:
            return layer.biased(y + change)
        # A constant in the gradient (section 4.3 of the paper), so no kernel is kept for it.
        ratio = self._ratio(lax.stop_gradient(_norm(self._sum(layer)))).astype(x.dtype)
        if seen is x:
            return layer.biased(ratio * (y + change))
        again = layer.product(seen, layer.kernel[...])  # as PEFT
        return layer.biased(y + (ratio - 1) * again + ratio * change)

    def kernel(self, layer: Layer) -> Array:
        """Return the kernel that gives the same as the layer with this."""
        total = self._sum(layer)
        return total if self.magnitude is None else self._ratio(_norm(total)) * total

    def _ratio(self, norm: Array) -> Array:
        assert self.magnitude is not None
        return self.magnitude[...] / jnp.where(norm == 0, 1, norm)  # outputs that are still zero

    def _sum(self, layer: Layer) -> Array:
        a, b = self.A[...], self.B[...]
        return layer.kernel[...].astype(a.dtype) + self.rule.scale * (a @ b)


class Hadamard(nnx.Module):
    """The factors of loha."""

    def __init__(self, layer: Layer, rule: Rule, rngs: Any):
        shape, lead = _shape(layer)
        normal = jax.random.normal
        into, out = (*lead, *shape[:-1], rule.rank), (*lead, rule.rank, shape[-1])
        # The laws of LyCORIS, loha.py.
        self.A1 = nnx.Param(normal(rngs.params(), into))
        self.B1 = nnx.Param(0.1 * normal(rngs.params(), out))
        self.A2 = nnx.Param(normal(rngs.params(), into))
        self.B2 = nnx.Param(jnp.zeros(out))
        _add_key(self, rule, lead)
        self.rule = rule

    def __call__(self, layer: Layer, x: Array) -> Array:
        """See `products.Adapter`."""
        return layer.biased(layer.product(x, self.kernel(layer)))

    def kernel(self, layer: Layer) -> Array:
        """Return the kernel that gives the same as the layer with this."""
        return _changed(self, layer, (self.A1[...] @ self.B1[...]) * (self.A2[...] @ self.B2[...]))


class Kronecker(nnx.Module):
    """The factors of lokr: w1 [c, a] and w2 [(kH, kW,) d, b] of a kernel [c d, a b]."""

    def __init__(self, layer: Layer, rule: Rule, rngs: Any):
        shape, lead = _shape(layer)
        (a, b), (c, d) = (factorization(shape[axis], rule.factor) for axis in (-1, -2))
        window = shape[:-2]
        self.w1 = nnx.Param(_uniform(rngs, (*lead, c, a), c))
        whole = is_whole(rule, b, d)
        self.w2 = nnx.Param(jnp.zeros((*lead, *window, d, b))) if whole else None
        if not whole:
            self.A2 = nnx.Param(jnp.zeros((*lead, *window, d, rule.rank)))
            self.B2 = nnx.Param(_uniform(rngs, (*lead, rule.rank, b), rule.rank))
        _add_key(self, rule, lead)
        # With both factors whole there is no rank to divide by: readers take the scale for 1.
        self.rule = dataclasses.replace(rule, scale=1.0) if self.w2 is not None else rule

    def __call__(self, layer: Layer, x: Array) -> Array:
        """See `products.Adapter`."""
        return layer.biased(layer.product(x, self.kernel(layer)))

    def kernel(self, layer: Layer) -> Array:
        """Return the kernel that gives the same as the layer with this."""
        small = self.w2[...] if self.w2 is not None else self.A2[...] @ self.B2[...]
        change = jnp.einsum("ca,...db->...cdab", self.w1[...], small)
        return _changed(self, layer, change.reshape(layer.kernel.shape))


_MODULES: dict[str, Callable[..., nnx.Module]] = {
    "lora": LowRank,
    "dora": LowRank,
    "loha": Hadamard,
    "lokr": Kronecker,
}


def attach(network: nnx.Module, rules: Callable[[str, Layer], Rule | None], rngs: Any) -> None:
    """Give layers of a network adapters.

    Args:
        rules: (path of a layer within the network, the layer) -> its rule, or None for no adapter.
        rngs: gives a key for each draw by `rngs.params()`.
    """
    for path, layer in layers(network):
        if rule := rules(path, layer):
            layer.adapter = _MODULES[rule.kind](layer, rule, rngs)


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

            _, lead = _shape(layer)
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


def is_pointwise(layer: Layer) -> bool:
    """Whether a layer is dense, or a convolution of 1 x 1."""
    return isinstance(layer, Linear) or layer.kernel.shape[:2] == (1, 1)


def magnitudes(path: str, kernel: np.ndarray) -> np.ndarray:
    """Return the norm of each output of a kernel [..., in, out], [out]; of each stacked block.

    Args:
        path: of the kernel, or of anything in the same layer: it tells stacked ones.
    """
    norm = jax.vmap(_norm) if leading_axes(path) else _norm
    return np.asarray(jax.jit(norm)(np.asarray(kernel, np.float32)))


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Return (a, b), a <= b, with a b = size: the sizes of the factors of a Kronecker product.

    Args:
        factor: a divisor of size gives (factor, size / factor) in order; -1 the pair nearest to the
            square root; any other number the largest divisor up to it.

    Source: LyCORIS, functional/general.py, `factorization`.
    """
    if factor > 0 and size % factor == 0:
        pair = factor, size // factor
        return min(pair), max(pair)
    most = factor if factor > 0 else size
    small = max(n for n in range(1, min(most, math.isqrt(size)) + 1) if size % n == 0)
    return small, size // small


def is_whole(rule: Rule, b: int, d: int) -> bool:
    """Whether the second factor of lokr, [d, b], is one matrix and not two of rank r."""
    return rule.full_matrix or rule.rank >= max(b, d) / 2


def dropout_keys(paths: Sequence[str], shapes: Sequence[tuple[int, ...]], key: Array) -> dict:
    """Return {path: uint32 [(N,) 2]}, a key for each adapter, different for each.

    Args:
        paths: of the keys, see `KEY`.
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


# ---- parts of the above ------------------------------------------------------------------------


def _shape(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape of one kernel, leading axes of stacked ones)."""
    shape = layer.kernel.shape
    own = 2 if isinstance(layer, Linear) else 4
    return shape[len(shape) - own :], shape[: len(shape) - own]


def _first(rule: Rule, shape: tuple[int, ...], lead: int, rngs: Any) -> Array:
    """A new A."""
    if rule.init == "gaussian":
        return jax.random.normal(rngs.params(), shape) / rule.rank
    return _uniform(rngs, shape, math.prod(shape[lead:-1]))


def _uniform(rngs: Any, shape: tuple[int, ...], fan_in: int) -> Array:
    """torch's kaiming_uniform with a = sqrt(5)."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)


def _add_key(module: Any, rule: Rule, lead: tuple[int, ...]) -> None:
    if rule.dropout:
        module.key = nnx.Variable(jnp.zeros((*lead, 2), jnp.uint32))


def _norm(kernel: Array) -> Array:
    """The norm of each output, [out]."""
    return jnp.sqrt(jnp.square(kernel).sum(range(kernel.ndim - 1)))


def _changed(module: Any, layer: Layer, change: Array) -> Array:
    """The layer's kernel with a change, unless the whole adapter is dropped."""
    change = module.rule.scale * _Dropped(module).module(change)
    return layer.kernel[...].astype(change.dtype) + change


class _Dropped:
    """The dropout of an adapter, with its key; without rates nothing is done."""

    def __init__(self, module: Any):
        self._rates = module.rule.dropout
        self._key = jax.random.wrap_key_data(module.key[...]) if self._rates else None

    def inputs(self, x: Array) -> Array:
        return self._apply(x, self._rates.inputs, 0, x.shape)

    def hidden(self, x: Array) -> Array:
        x = self._apply(x, self._rates.hidden, 1, x.shape)
        same = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])  # [B, 1, ..., r]
        return self._apply(x, self._rates.rank, 2, same)

    def module(self, x: Array) -> Array:
        if not self._rates.module:
            return x
        kept = jax.random.bernoulli(self._own(3), 1 - self._rates.module)
        return jnp.where(kept, x, 0)  # not scaled up: kohya leaves the adapter out

    def _apply(self, x: Array, rate: float, stream: int, shape: tuple[int, ...]) -> Array:
        if not rate:
            return x
        kept = jax.random.bernoulli(self._own(stream), 1 - rate, shape)
        return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)

    def _own(self, stream: int) -> Array:
        assert self._key is not None
        return jax.random.fold_in(self._key, stream)
