"""Attention that never writes its scores to memory: JAX's own splash kernel for TPUs.

Dense attention over the 64 x 64 positions of a 512 px latent has 16.8 million float32 scores for
each example and head. It writes and reads them several times a block. That is about half of all the
memory traffic of a training step of Stable Diffusion 1.5, and most of its temporaries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

Array = jax.Array

MIN_QUERIES = 1024  # below this the products are small, and the kernels of `short_keys` are faster
LONG_BLOCK = 512  # longer sequences are padded to multiples of this
HIDDEN = -1e30  # the score of padding: its weight is 0 exactly
LANES = 128  # queries and keys come in blocks of this
BLOCKS = (2048, 1536, 1024, 512, 384, 256, 128)  # the largest that divides the length and fits
ROW_BYTES = 2**18  # bytes of one array of a block; the kernels hold some twenty in 16 MiB
RESIDUALS = "attention"  # the name of the arrays that `jax.checkpoint` may keep


def fits(q: Array, k: Array) -> bool:
    """Whether the kernel takes q [B, L, heads, D] and k [B, M, heads, D], padded if odd."""
    return q.shape[1] >= LANES and k.shape[1] >= LANES


def pays(q: Array, k: Array) -> bool:
    """Whether the kernel beats the dense one on every TPU, by benchmarks/tpu_layers.py."""
    return q.shape[1] >= MIN_QUERIES and k.shape[1] >= MIN_QUERIES


def flash_attention(q: Array, k: Array, v: Array, *, interpret: bool = False) -> Array:
    """Scaled dot-product attention of q [B, L, heads, D] with k, v [B, M, heads, D].

    Softmax and sums are in float32. The result equals the dense one, in value and gradient, up to
    the rounding of the inputs' dtype. `interpret` runs the kernel on any backend, slowly.

    Returns:
        [B, L, heads, D] in the dtype of `q`.
    """
    (_, length, heads, _), keys = q.shape, k.shape[1]
    # The kernel does not scale. Scaling in bfloat16 would round once more.
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    if _padded(keys) > keys:
        q, k = _with_hiding(q, k)
    width = -(-q.shape[-1] // LANES) * LANES
    q, k, v = (_pad_rows(x) for x in (q, k, v))
    kernel = _kernel(
        heads, ROW_BYTES // (width * q.dtype.itemsize), q.shape[1], k.shape[1], interpret
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, heads, L, D]
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :length]


def _padded(length: int) -> int:
    """The length rounded up to whole blocks, which are larger for long sequences.

    A multiple of 128 alone may have no divisor among the large `BLOCKS`.
    """
    step = LANES if length % LANES == 0 or length < LONG_BLOCK else LONG_BLOCK
    return -(-length // step) * step


def _pad_rows(x: Array) -> Array:
    """The array [B, L, heads, D] with rows of zeros up to a padded length."""
    return jnp.pad(x, ((0, 0), (0, _padded(x.shape[1]) - x.shape[1]), (0, 0), (0, 0)))


def _with_hiding(q: Array, k: Array) -> tuple[Array, Array]:
    """Queries and padded keys with one dimension more, whose product hides the padding.

    The product adds 0 to the scores of real keys, and `HIDDEN` to those of the padding. Up to 127
    dimensions that costs nothing: a head fills 128 lanes anyway. A mask would cost the vector
    units, which this kernel waits for, an operation a score.
    """
    keys = k.shape[1]
    rows = jnp.arange(_padded(keys))[None, :, None, None]
    hide = jnp.broadcast_to(jnp.where(rows < keys, 0.0, HIDDEN), (*_pad_rows(k).shape[:3], 1))
    one = jnp.ones((*q.shape[:3], 1), q.dtype)
    k = jnp.concatenate([_pad_rows(k), hide.astype(k.dtype)], axis=-1)
    return jnp.concatenate([q, one], axis=-1), k


def _block(length: int, largest: int) -> int:
    """The largest block size that divides `length`, and is at most `largest`."""
    return next(size for size in BLOCKS if length % size == 0 and size <= max(largest, LANES))


@functools.lru_cache
def _kernel(heads: int, largest: int, length: int, keys: int, interpret: bool):
    """The splash kernel for queries of `length` and `keys` keys."""
    columns, columns_back = (_block(keys, size) for size in (largest, 2 * largest))
    blocks = splash.BlockSizes(
        block_q=_block(length, largest),
        block_kv=columns,
        block_kv_compute=_block(columns, 512),
        # One kernel for all three gradients computes the scores once less. It leaves a part of dq
        # for each block of keys, and XLA adds them up, so long blocks are better.
        block_q_dkv=_block(length, largest // 2),
        block_kv_dkv=columns_back,
        block_kv_dkv_compute=_block(columns_back, 512),
        use_fused_bwd_kernel=True,
    )
    mask = masks.MultiHeadMask([masks.FullMask((length, keys))] * heads)
    with jax.ensure_compile_time_eval():  # its tables are constants, whatever is being traced
        return splash.make_splash_mha_single_device(
            mask, block_sizes=blocks, residual_checkpoint_name=RESIDUALS, interpret=interpret
        )


# Matrix products of L x M x D in each kernel: scores and output; scores, dV, dP, dK and dQ (Dao,
# arXiv:2307.08691, section 3.1).
PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
# The time of the vector units besides, in products of 128 lanes, by the instructions of the kernels
# compiled for v5p (docs/notes/tpu_layers.md): 6.6 and 11 cycles for tiles of 8 x 128 scores, of
# which each product takes 2.
VECTOR = {"splash_mha_fwd": 1.3, "splash_mha_dkv": 0.5}


def kernel_cost(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float] | None:
    """The (FLOPs, bytes) of one call of a kernel of this file, which the compiler cannot count.

    FLOPs are those the matrix unit could do in the time the kernel takes: head dimensions are
    padded to its 128 lanes, and it waits for the vector units. Bytes are of bfloat16 arrays.

    Args:
        name: the name of the kernel in the compiled program, as "splash_mha_fwd_residuals".
        shapes: the shapes of its floating-point operands; the first two are q [B, heads, L, D] and
            k [B, heads, M, D], which have no axis B for one example.

    Returns:
        None for a kernel of another file.
    """
    kind = next((start for start in PRODUCTS if start in name), None)
    if kind is None:
        return None
    (*batch, heads, length, width), (*_, keys, _) = shapes[:2]
    padded = -(-width // LANES) * LANES
    products = PRODUCTS[kind] * padded + VECTOR[kind] * LANES
    largest = ROW_BYTES // (2 * padded)
    if kind == "splash_mha_fwd":  # q and the output once, k and v for each block of queries
        moved = 2 * length + 2 * keys * (length // _block(length, largest))
    else:  # k, v, dk and dv once; q, its gradient and the output's for each block of keys
        moved = 4 * keys + 3 * length * (keys // _block(keys, 2 * largest))
    rows = math.prod(batch) * heads
    return 2.0 * rows * length * keys * products, 2.0 * rows * padded * moved
