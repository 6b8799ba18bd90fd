"""Attention as plain matrix products, with a backward pass that computes its weights again.

Automatic differentiation would store the softmax's weights, L x M float32 numbers a head, for the
backward pass. Computing them again from q, k and one number a row costs a third product and stores
nothing of that size (Dao et al., arXiv:2205.14135, section 3.1).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def dense_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    bias: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Scaled dot-product attention; softmax and sums in float32, products of the inputs' dtype.

    Args:
        q: [B, L, heads, D].
        k, v: [B, M, heads, D].
        causal: position i attends to positions <= i.
        bias: float32, added to the logits [B, heads, L, M], to which it broadcasts.
        scale: of the products of queries and keys, by default D^-1/2.

    Returns:
        [B, L, heads, D] float32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, heads, L, D]
    return _attend(q, k, v, bias, causal, scale).swapaxes(1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, bias: Array | None, causal: bool, scale: float) -> Array:
    """The output, [B, heads, L, D] float32, from q, k, v [B, heads, ..., D]."""
    return _forward(q, k, v, bias, causal, scale)[0]


def _forward(
    q: Array, k: Array, v: Array, bias: Array | None, causal: bool, scale: float
) -> tuple[Array, tuple[Any, ...]]:
    """The output, and the inputs of the backward pass.

    They are q, k, v, the bias, the output, and the log sum exp of rows.
    """
    scores = _scores(q, k, bias, causal, scale)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp((scores - top) * scale)
    total = weights.sum(-1, keepdims=True)
    # Dividing after the product touches D numbers a row instead of M.
    out = _product(weights.astype(v.dtype), v, 3, 2) / total
    return out, (q, k, v, bias, out, top * scale + jnp.log(total))


def _backward(
    causal: bool, scale: float, saved: tuple[Any, ...], dout: Array
) -> tuple[Array, Array, Array, Array | None]:
    """The gradients of q, k, v and the bias."""
    q, k, v, bias, out, lse = saved
    weights = jnp.exp(_scores(q, k, bias, causal, scale) * scale - lse)
    dout = dout.astype(v.dtype)
    delta = (dout * out).sum(-1, keepdims=True)
    dv = _over_queries(weights.astype(v.dtype), dout)
    dlogits = weights * (_product(dout, v, 3, 3) - delta)
    dbias = None if bias is None else _unbroadcast(dlogits, bias)
    dlogits = dlogits.astype(q.dtype)
    dq = _product(dlogits, k, 3, 2) * scale
    dk = _over_queries(dlogits, q) * scale
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias


_attend.defvjp(_forward, _backward)


def _scores(q: Array, k: Array, bias: Array | None, causal: bool, scale: float) -> Array:
    """The logits divided by `scale`, [B, heads, L, M] float32."""
    scores = _product(q, k, 3, 3)
    if bias is not None:
        scores = scores + bias / scale
    if not causal:
        return scores
    visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.where(visible, scores, jnp.finfo(jnp.float32).min)


def _unbroadcast(gradient: Array, like: Array) -> Array:
    """The sum of a gradient over the axes along which `like` was broadcast."""
    over = [axis for axis, size in enumerate(like.shape) if size == 1]
    return gradient.sum(over, keepdims=True).astype(like.dtype)


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The sum over one axis of each array, for every example and head; float32."""
    dimensions = (((axis_a,), (axis_b,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _over_queries(weights: Array, x: Array) -> Array:
    """The sum over queries of weights [B, heads, L, M] and x [B, heads, L, D].

    Returns [B, heads, M, D] float32.
    """

    def columns(weights: Array, x: Array) -> Array:
        # Without the barrier XLA makes a product of this that takes CPUs six times as long.
        return lax.optimization_barrier(_product(x, weights, 2, 2)).swapaxes(2, 3)

    def rows(weights: Array, x: Array) -> Array:
        return _product(weights, x, 2, 2)

    return lax.platform_dependent(weights, x, cpu=columns, default=rows)
