"""The placement of activations on devices, which the caller decides.

The networks do not depend on a mesh. They mark an array whose leading dimension is the batch
(`activation`), and a kernel that works on each example and head alone (`per_device`). Outside
`placed` both marks do nothing. Without the first, the compiler sometimes splits an activation like
the parameter it meets next, and moves whole batches between devices. Without the second, every
device would run a Pallas kernel on the whole batch.
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
    """The decisions of a caller; see `sdjax.parallel.activations`."""

    @property
    def kernels(self) -> str:
        """The platform whose kernels may be used: "tpu", "cuda", or another, without any."""

    @property
    def attention(self) -> str:
        """The kernel that is wanted, a value of `model.attention`."""

    def activation(self, x: Array) -> Array:
        """Return x [B, ...], split along its batch alone."""

    def summed(self, product: Callable[[Array, Array], Array], x: Array, dy: Array) -> Array:
        """Return `product(x, dy)`, a sum over examples, in float32; x and dy are [B, ...]."""

    def per_device(self, kernel: Callable[..., Array], *arrays: Array) -> Array:
        """Return `kernel(*arrays)`, run on each device's examples and heads of [B, L, heads, D]."""


_placement: ContextVar[Placement | None] = ContextVar("placement", default=None)


@contextlib.contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """A context in which networks are traced with `placement`."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def activation(x: Array) -> Array:
    """Return x [B, ...], split along its batch alone; outside `placed` unchanged."""
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
    """Return `kernel(*arrays)` of arrays [B, L, heads, D], by `Placement.per_device`."""
    placement = _placement.get()
    return kernel(*arrays) if placement is None else placement.per_device(kernel, *arrays)


def summed(product: Callable[[Array, Array], Array], x: Array, dy: Array) -> Array:
    """Return `product(x, dy)`, a sum over the examples of x and dy [B, ...], in float32.

    The sum over devices is in float32 even where the product is in 16 bits.
    """
    placement = _placement.get()
    if placement is None:
        return product(x, dy).astype(jnp.float32)
    return placement.summed(product, x, dy)
