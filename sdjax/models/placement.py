"""Where activations lie, decided by the caller.

The networks know of no mesh. They say of an array that its leading dimension is the batch
(`activation`), and of a kernel that it works on each example and head alone (`per_device`); outside
`placed` both mean nothing. Without the first, the compiler now and then prefers to split an
activation like the parameter it meets next and moves whole batches between devices; a Pallas kernel
without the second would be run on the whole batch by every device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


class Placement(Protocol):
    """What a caller may decide; see `sdjax.parallel.activations`."""

    @property
    def kernels(self) -> str:
        """The platform whose kernels may be used: "tpu", "cuda", or another, without any."""

    @property
    def attention(self) -> str:
        """The kernel that is wanted, a value of `model.attention`."""

    def activation(self, x: Array) -> Array:
        """x [B, ...] -> the same array, split along its batch alone."""

    def summed(self, product: Callable[[Array, Array], Array], x: Array, dy: Array) -> Array:
        """`product(x, dy)`, a sum over examples, in float32; x and dy are [B, ...]."""

    def per_device(self, kernel: Callable[..., Array], *arrays: Array) -> Array:
        """`kernel(*arrays)` of arrays [B, L, heads, D], on each device's examples and heads."""


_placement: ContextVar[Placement | None] = ContextVar("placement", default=None)


@contextlib.contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Networks that are traced in here follow `placement`."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def activation(x: Array) -> Array:
    """x [B, ...] -> the same array; outside `placed` untouched."""
    placement = _placement.get()
    return x if placement is None else placement.activation(x)


def kernels() -> str:
    """The platform whose kernels may be used; "" for none, as outside `placed`."""
    placement = _placement.get()
    return "" if placement is None else placement.kernels


def attention() -> str:
    """The kernel that is wanted; "auto" outside `placed`."""
    placement = _placement.get()
    return "auto" if placement is None else placement.attention


def per_device(kernel: Callable[..., Array], *arrays: Array) -> Array:
    """`kernel(*arrays)` of arrays [B, L, heads, D]; outside `placed` simply that."""
    placement = _placement.get()
    return kernel(*arrays) if placement is None else placement.per_device(kernel, *arrays)


def summed(product: Callable[[Array, Array], Array], x: Array, dy: Array) -> Array:
    """`product(x, dy)`, a sum over the examples of x and dy [B, ...], in float32.

    What devices have of it is added up in float32, also where the product is in 16 bits.
    """
    placement = _placement.get()
    if placement is None:
        return product(x, dy).astype(jnp.float32)
    return placement.summed(product, x, dy)
