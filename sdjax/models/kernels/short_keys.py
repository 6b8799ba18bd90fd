"""Attention to few keys, as one TPU kernel each way: text, and self-attention of small maps.

All keys of an example lie in the chip's vector memory at once, so no softmax is put together from
parts. The backward pass needs q, k and v alone: it computes the weights again and gives all three
gradients from the same scores. Heads stay side by side along the lanes, as the projections write
and read them: [B, L, heads * D] is never transposed, and never padded to 128 lanes a head in HBM. A
head's product runs over the tiles of 128 lanes that the head touches. The other heads' lanes of the
keys are zero there, which takes the matrix unit no longer than the head alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array

LANES = 128
MAX_KEYS = 256
MIN_QUERIES = 256  # below this the scores of dense attention are small
KEY_BYTES = 2**23  # bytes for arrays as long as the keys, of the 16 MiB that a kernel may hold
ROW_BYTES = 3 * 2**18  # bytes of a block of queries; the backward kernel holds six of them
ROWS = (512, 256, 128, 64)
HIDDEN = -1e30  # the score of padding: its weight is 0 exactly


def fits(q: Array, k: Array) -> bool:
    """Whether the kernel takes q [B, L, heads, D] and k [B, M, heads, D]."""
    (_, length, heads, width), keys = q.shape, _up(k.shape[1])
    # k, v and the sums of their gradients, each twice: one is computed while another is moved.
    held = 2 * keys * _up(heads * width) * 2 * (q.dtype.itemsize + 4)
    return keys <= MAX_KEYS and length % ROWS[-1] == 0 and held <= KEY_BYTES


def pays(q: Array, k: Array) -> bool:
    """Whether the kernel beats the dense one on every TPU, by benchmarks/tpu_layers.py."""
    return q.shape[1] >= MIN_QUERIES


def short_attention(q: Array, k: Array, v: Array, *, interpret: bool = False) -> Array:
    """Scaled dot-product attention of q [B, L, heads, D] with few keys k, v [B, M, heads, D].

    Softmax and sums are in float32. The result equals the dense one, in value and gradient, up to
    the rounding of the inputs' dtype. `interpret` runs the kernel on any backend, slowly.

    Returns:
        [B, L, heads, D] in the dtype of `q`.
    """
    (batch, length, heads, width), keys = q.shape, k.shape[1]
    q, k, v = (x.reshape(batch, x.shape[1], heads * width) for x in (q, k, v))
    k, v = (jnp.pad(x, ((0, 0), (0, _up(keys) - keys), (0, 0))) for x in (k, v))
    out = _attend(q, k, v, heads, width, keys, interpret)
    return out.reshape(batch, length, heads, width)


def _up(size: int) -> int:
    """The size rounded up to a multiple of 128."""
    return -(-size // LANES) * LANES


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _attend(q: Array, k: Array, v: Array, heads: int, width: int, keys: int, interpret: bool):
    """Map q [B, L, C], k, v [B, M, C] with M a multiple of 128 to [B, L, C]."""
    (batch, length, channels), padded = q.shape, k.shape[1]
    size = _block(length, channels, q.dtype)
    rows, whole = _specs(size, channels, padded)
    kernel = functools.partial(_forward_kernel, heads=heads, width=width, keys=keys)
    return pl.pallas_call(
        kernel,
        grid=(batch, length // size),
        in_specs=[rows, whole, whole],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(q, k, heads, width, products=2),
        interpret=interpret,
        name="short_attention_forward",
    )(q, k, v)


def _forward(q: Array, k: Array, v: Array, *static) -> tuple[Array, tuple[Array, ...]]:
    """The output, and q, k, v for the backward pass."""
    return _attend(q, k, v, *static), (q, k, v)


def _backward(heads: int, width: int, keys: int, interpret: bool, saved, dout: Array):
    """The gradients of q, k and v."""
    q, k, v = saved
    (batch, length, channels), padded = q.shape, k.shape[1]
    size = _block(length, channels, q.dtype)
    rows, whole = _specs(size, channels, padded)
    kernel = functools.partial(_backward_kernel, heads=heads, width=width, keys=keys)
    sums = jax.ShapeDtypeStruct(k.shape, jnp.float32)
    dq, dk, dv = pl.pallas_call(
        kernel,
        grid=(batch, length // size),
        in_specs=[rows, whole, whole, rows],
        out_specs=[rows, whole, whole],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), sums, sums],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(q, k, heads, width, products=5),
        interpret=interpret,
        name="short_attention_backward",
    )(q, k, v, dout.astype(q.dtype))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


_attend.defvjp(_forward, _backward)


def _block(length: int, channels: int, dtype) -> int:
    """The number of queries that a kernel takes at once."""
    largest = ROW_BYTES // (channels * jnp.dtype(dtype).itemsize)
    return next(n for n in ROWS if length % n == 0 and (n <= largest or n == ROWS[-1]))


def _specs(rows: int, channels: int, padded: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """The block specifications of an example's block of queries and of all its keys."""
    return (
        pl.BlockSpec((1, rows, channels), lambda b, i: (b, i, 0)),
        pl.BlockSpec((1, padded, channels), lambda b, i: (b, 0, 0)),
    )


def _cost(q: Array, k: Array, heads: int, width: int, *, products: int) -> pl.CostEstimate:
    """The cost of a kernel, in FLOPs that the matrix unit could do in the time it takes.

    Each product runs over whole tiles of 128 lanes. The vector units' work on the scores between
    the products takes as long again. The numbers are those of the instructions of these kernels for
    v5p (docs/notes/tpu_layers.md). For tiles of 8 x 128 scores they take 7 to 11 cycles forward, of
    which 4 are products, and 17 to 22 backward, of which 10 are.
    """
    (batch, length, channels), padded = q.shape, k.shape[1]
    tiles = sum(_up((h + 1) * width) - h * width // LANES * LANES for h in range(heads)) // LANES
    vector = 3 * heads if products == 2 else 5 * heads  # in products of one tile
    scores = batch * length * padded
    large = 2 if products == 2 else 3  # q and out; q, dout and dq
    small = 2 * q.dtype.itemsize if products == 2 else 2 * q.dtype.itemsize + 8
    moved = batch * channels * (length * large * q.dtype.itemsize + padded * small)
    return pl.CostEstimate(
        flops=2 * scores * LANES * (products * tiles + vector),
        transcendentals=scores * heads,
        bytes_accessed=moved,
    )


# ---- inside the kernels ------------------------------------------------------------------------


def _head_tiles(heads: int, width: int, padded: int) -> Iterator[tuple[slice, Array]]:
    """For each head, the tiles of lanes that it touches, and a mask of its own lanes among them."""
    for head in range(heads):
        begin, end = head * width, (head + 1) * width
        low, high = begin // LANES * LANES, min(_up(end), heads * width)
        lane = low + lax.broadcasted_iota(jnp.int32, (padded, high - low), 1)
        yield slice(low, high), (lane >= begin) & (lane < end)


def _weights(q: Array, k: Array, scale: float, keys: int) -> Array:
    """The softmax over the first `keys` keys, [L, M] float32, from q [L, D] and k [M, D]."""
    scores = _product(q, k, 1, 1)
    if keys < k.shape[0]:
        column = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(column < keys, scores, HIDDEN)
    # The hardware exponentiates to base 2: one factor serves both scales.
    weights = jnp.exp2((scores - scores.max(-1, keepdims=True)) * (scale * math.log2(math.e)))
    return weights * (1.0 / weights.sum(-1, keepdims=True))


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The sum over one axis of each array; float32."""
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, heads: int, width: int, keys: int):
    """The forward kernel. q, out [1, rows, C]; k, v [1, M, C]."""
    out: dict[int, Array] = {}
    for tiles, mine in _head_tiles(heads, width, k_ref.shape[1]):
        k, v = (jnp.where(mine, ref[0, :, tiles], 0) for ref in (k_ref, v_ref))
        weights = _weights(q_ref[0, :, tiles], k, width**-0.5, keys).astype(v.dtype)
        _add(out, tiles, _product(weights, v, 1, 0))
    _write(out_ref, out)


def _backward_kernel(
    q_ref, k_ref, v_ref, dout_ref, dq_ref, dk_ref, dv_ref, *, heads: int, width: int, keys: int
):
    """The backward kernel, which adds dk and dv up over the blocks of queries.

    q, dout, dq [1, rows, C]; k, v, dk, dv [1, M, C].
    """

    @pl.when(pl.program_id(1) == 0)
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    dq_tiles: dict[int, Array] = {}
    for tiles, mine in _head_tiles(heads, width, k_ref.shape[1]):
        k, v = (jnp.where(mine, ref[0, :, tiles], 0) for ref in (k_ref, v_ref))
        q, dout = q_ref[0, :, tiles], dout_ref[0, :, tiles]
        weights = _weights(q, k, width**-0.5, keys)
        dweights = _product(dout, v, 1, 1)
        delta = (weights * dweights).sum(-1, keepdims=True)
        dscores = (weights * (dweights - delta)).astype(q.dtype)  # without the scale
        _add(dq_tiles, tiles, _product(dscores, k, 1, 0))
        # The tiles hold other heads' queries too.
        dk, dv = _product(dscores, q, 0, 0), _product(weights.astype(v.dtype), dout, 0, 0)
        dk_ref[0, :, tiles] += jnp.where(mine, dk * width**-0.5, 0.0)
        dv_ref[0, :, tiles] += jnp.where(mine, dv, 0.0)
    _write(dq_ref, {low: dq * width**-0.5 for low, dq in dq_tiles.items()})


def _add(sums: dict[int, Array], tiles: slice, x: Array) -> None:
    """Add x [rows, tiles] to the sums, which are kept by tile."""
    for low in range(tiles.start, tiles.stop, LANES):
        part = x[:, low - tiles.start : min(low + LANES, tiles.stop) - tiles.start]
        sums[low] = sums[low] + part if low in sums else part


def _write(ref, sums: dict[int, Array]) -> None:
    """Write the sums of all tiles into `ref`, in its dtype."""
    for low, part in sums.items():
        ref[0, :, low : low + part.shape[1]] = part.astype(ref.dtype)
