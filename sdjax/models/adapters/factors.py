"""Adapters: small trained factors beside the frozen kernel of a layer.

    lora   y = x W + s (x A) B + b                       (arXiv:2106.09685)
    dora   y = m / n (x W + s (x A) B) + b, n = ||W + s A B|| of each output (arXiv:2402.09353)
    loha   y = x (W + s (A1 B1) * (A2 B2)) + b           (arXiv:2108.06098)
    lokr   y = x (W + s kron(w1, w2)) + b                (LyCORIS, arXiv:2309.14859)

Kernels are [in, out], or [kH, kW, in, out]; then A is a convolution [kH, kW, in, r] and B [r, out].
In Tucker's form (LyCORIS, `use_tucker`) A is [1, 1, in, r] and a core C [kH, kW, r, r] stands
between the two: A C B in place of A B, in loha of both pairs, in lokr of w2.
The first two are computed from activations, so a frozen W costs no product for its gradient. Blocks
that are stacked have factors with the same leading axis.

The factors of a layer are `PATH.adapter.A` and so on, float32; products are in the layer's dtype.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sdjax.models.products import Conv, Linear, dense, whole_kernel

Array = jax.Array
Layer = Linear | Conv

KINDS = ("lora", "dora", "loha", "lokr")
INITS = ("kaiming", "gaussian")


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
    tucker: whether convolutions larger than 1 x 1 have Tucker's form.
    dropout: of the training loss alone.
    """

    kind: str = "lora"
    rank: int = 4
    scale: float = 1.0
    init: str = "kaiming"
    factor: int = -1
    full_matrix: bool = False
    tucker: bool = False
    dropout: Dropout = Dropout()


class LowRank(nnx.Module):
    """The factors of lora and dora."""

    def __init__(self, layer: Layer, rule: Rule, rngs: Any):
        shape, lead = kernel_shape(layer)
        r, window, into = rule.rank, _window(layer, rule), _into(layer, rule)
        self.A = nnx.Param(_first(rule, (*lead, *into, r), len(lead), rngs))
        self.C = _core(rngs, lead, window, r)
        self.B = nnx.Param(jnp.zeros((*lead, r, shape[-1])))
        # The norm of a kernel that is there; see `magnitudes`.
        own = nnx.Param(jnp.ones((*lead, shape[-1])))
        self.magnitude = own if rule.kind == "dora" else None
        _add_key(self, rule, lead)
        self.rule = rule

    def __call__(self, layer: Layer, x: Array) -> Array:
        """See `products.Adapter`."""
        drop = _Dropped(self)
        seen = drop.inputs(x)
        hidden = drop.hidden(self._hidden(layer, seen))
        change = dense(drop.module(self.rule.scale * hidden), self.B[...])
        y = layer.own_product(x)
        if self.magnitude is None:
            return layer.biased(y + change)
        # A constant in the gradient (section 4.3 of the paper), so no kernel is kept for it.
        ratio = self._ratio(lax.stop_gradient(output_norms(self._sum(layer)))).astype(x.dtype)
        if seen is x:
            return layer.biased(ratio * (y + change))
        again = layer.own_product(seen)  # as PEFT
        return layer.biased(y + (ratio - 1) * again + ratio * change)

    def kernel(self, layer: Layer) -> Array:
        """Return the kernel that gives the same as the layer with this."""
        total = self._sum(layer)
        return total if self.magnitude is None else self._ratio(output_norms(total)) * total

    def _hidden(self, layer: Layer, x: Array) -> Array:
        """The values before B, [..., r]."""
        if self.C is None:
            return layer.product(x, self.A[...])
        return layer.product(dense(x, self.A[0, 0]), self.C[...])

    def _ratio(self, norm: Array) -> Array:
        assert self.magnitude is not None
        return self.magnitude[...] / jnp.where(norm == 0, 1, norm)  # outputs that are still zero

    def _sum(self, layer: Layer) -> Array:
        change = self.rule.scale * _product(self.A, self.C, self.B)
        return whole_kernel(layer).astype(change.dtype) + change


class Hadamard(nnx.Module):
    """The factors of loha."""

    def __init__(self, layer: Layer, rule: Rule, rngs: Any):
        shape, lead = kernel_shape(layer)
        r, window, normal = rule.rank, _window(layer, rule), jax.random.normal
        first, last = (*lead, *_into(layer, rule), r), (*lead, r, shape[-1])
        core = (*lead, *window, r, r)
        # The laws of LyCORIS, modules/loha.py.
        self.A1 = nnx.Param(normal(rngs.params(), first))
        self.B1 = nnx.Param(0.1 * normal(rngs.params(), last))
        self.A2 = nnx.Param(normal(rngs.params(), first))
        self.B2 = nnx.Param(jnp.zeros(last))
        self.C1 = nnx.Param(0.1 * normal(rngs.params(), core)) if window else None
        self.C2 = nnx.Param(0.1 * normal(rngs.params(), core)) if window else None
        _add_key(self, rule, lead)
        self.rule = rule

    def __call__(self, layer: Layer, x: Array) -> Array:
        """See `products.Adapter`."""
        return layer.biased(layer.product(x, self.kernel(layer)))

    def kernel(self, layer: Layer) -> Array:
        """Return the kernel that gives the same as the layer with this."""
        one, other = _product(self.A1, self.C1, self.B1), _product(self.A2, self.C2, self.B2)
        return _changed(self, layer, one * other)


class Kronecker(nnx.Module):
    """The factors of lokr: w1 [c, a] and w2 [(kH, kW,) d, b] of a kernel [c d, a b]."""

    def __init__(self, layer: Layer, rule: Rule, rngs: Any):
        shape, lead = kernel_shape(layer)
        (a, b), (c, d) = (factorization(shape[axis], rule.factor) for axis in (-1, -2))
        self.w1 = nnx.Param(_uniform(rngs, (*lead, c, a), c))
        whole = is_whole(rule, b, d)
        self.w2 = nnx.Param(jnp.zeros((*lead, *shape[:-2], d, b))) if whole else None
        if not whole:
            r, window, into = rule.rank, _window(layer, rule), _into(layer, rule)
            self.A2 = nnx.Param(jnp.zeros((*lead, *into[:-1], d, r)))
            # Files have [b, r], and [r, b] in Tucker's form; torch's law counts the second axis.
            self.B2 = nnx.Param(_uniform(rngs, (*lead, r, b), b if window else r))
            self.C2 = _core(rngs, lead, window, r)
        _add_key(self, rule, lead)
        # With both factors whole there is no rank to divide by: readers take the scale for 1.
        self.rule = dataclasses.replace(rule, scale=1.0) if self.w2 is not None else rule

    def __call__(self, layer: Layer, x: Array) -> Array:
        """See `products.Adapter`."""
        return layer.biased(layer.product(x, self.kernel(layer)))

    def kernel(self, layer: Layer) -> Array:
        """Return the kernel that gives the same as the layer with this."""
        whole = self.w2
        small = whole[...] if whole is not None else _product(self.A2, self.C2, self.B2)
        change = jnp.einsum("ca,...db->...cdab", self.w1[...], small)
        return _changed(self, layer, change.reshape(layer.kernel.shape))


_MODULES: dict[str, type[LowRank | Hadamard | Kronecker]] = {
    "lora": LowRank,
    "dora": LowRank,
    "loha": Hadamard,
    "lokr": Kronecker,
}


def make_factors(layer: Layer, rule: Rule, rngs: Any) -> nnx.Module:
    """Return the factors of a layer, which begin by changing nothing.

    Args:
        rngs: gives a key for each draw by `rngs.params()`.
    """
    return _MODULES[rule.kind](layer, rule, rngs)


def kernel_shape(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (shape of one kernel, leading axes of stacked ones)."""
    shape = layer.kernel.shape
    own = 2 if isinstance(layer, Linear) else 4
    return shape[len(shape) - own :], shape[: len(shape) - own]


def is_pointwise(layer: Layer) -> bool:
    """Whether a layer is dense, or a convolution of 1 x 1."""
    return isinstance(layer, Linear) or layer.kernel.shape[:2] == (1, 1)


def output_norms(kernel: Array) -> Array:
    """Return the norm of each output of a kernel [..., in, out], [out]."""
    return jnp.sqrt(jnp.square(kernel).sum(range(kernel.ndim - 1)))


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


# ---- parts of the above ------------------------------------------------------------------------


def _window(layer: Layer, rule: Rule) -> tuple[int, ...]:
    """(kH, kW) of the core of Tucker's form; () where the layer does not have that form."""
    return kernel_shape(layer)[0][:2] if rule.tucker and not is_pointwise(layer) else ()


def _into(layer: Layer, rule: Rule) -> tuple[int, ...]:
    """The shape of A without its ranks."""
    shape, _ = kernel_shape(layer)
    return (1, 1, shape[-2]) if _window(layer, rule) else shape[:-1]


def _product(a: Any, core: Any, b: Any) -> Array:
    """A B, or A C B of Tucker's form, [..., in, out]."""
    return a[...] @ b[...] if core is None else a[...] @ core[...] @ b[...]


def _core(rngs: Any, lead: tuple[int, ...], window: tuple[int, ...], rank: int) -> Any:
    """A new core; None without a window."""
    if not window:
        return None
    return nnx.Param(_uniform(rngs, (*lead, *window, rank, rank), math.prod(window) * rank))


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


def _changed(module: Any, layer: Layer, change: Array) -> Array:
    """The layer's kernel with a change, unless the whole adapter is dropped."""
    change = module.rule.scale * _Dropped(module).module(change)
    return whole_kernel(layer).astype(change.dtype) + change


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
