"""Attention that never writes its scores to memory: JAX's own splash kernel for TPUs.

Dense attention over the 64 x 64 positions of a 512 px latent writes and reads 16.8 million float32
scores for each example and head, several times a block: about half of all the memory traffic of a
training step of Stable Diffusion 1.5, and most of its temporaries.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

Array = jax.Array

# Below this many scores a row-block fits on the chip anyway, and fusing loses to plain products.
MIN_QUERIES = 1024
LANES = 128  # queries and keys come in blocks of this
BLOCKS = (1024, 512, 256, 128)  # the largest that divides the length and fits is used
ROW_BYTES = 2**18  # of a block, one array; the kernels hold some twenty such in 16 MiB


def fits(q: Array, k: Array, *, causal: bool) -> bool:
    """Whether the kernel takes q [B, L, heads, D] and k [B, M, heads, D], and is worth it."""
    # Mosaic refuses a product of bfloat16 in "highest" precision, instead of ignoring the wish.
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return (
        not causal
        and (q.dtype == jnp.float32 or precision in (None, "default", "fastest", "bfloat16"))
        and q.shape[1] >= MIN_QUERIES
        and q.shape[1] % LANES == 0
        and k.shape[1] % LANES == 0
    )


def flash_attention(q: Array, k: Array, v: Array, *, interpret: bool = False) -> Array:
    """Scaled dot-product attention of q [B, L, heads, D] with k, v [B, M, heads, D].

    Softmax and sums in float32. Equal to the dense one, in value and gradient, up to the rounding
    of the inputs' dtype. `interpret` runs the kernel on any backend, slowly.

    Returns:
        [B, L, heads, D] in the dtype of `q`.
    """
    (_, length, heads, width), keys = q.shape, k.shape[1]
    largest = ROW_BYTES // (max(width, LANES) * q.dtype.itemsize)
    # The kernel does not scale. In float32, or bfloat16 would round once more.
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    kernel = _kernel(heads, _block(length, largest), _block(keys, largest), length, keys, interpret)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, heads, L, D]
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)


def _block(length: int, largest: int = BLOCKS[0]) -> int:
    return next(size for size in BLOCKS if length % size == 0 and size <= max(largest, LANES))


@functools.lru_cache
def _kernel(heads: int, rows: int, columns: int, length: int, keys: int, interpret: bool):
    blocks = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=min(columns, 512),
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=min(columns, 512),
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    mask = masks.MultiHeadMask([masks.FullMask((length, keys))] * heads)
    with jax.ensure_compile_time_eval():  # its tables are constants, whatever is being traced
        return splash.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)


# Matrix products of L x M x D in each kernel: scores and output; scores, dP and dQ; scores, dV, dP
# and dK (Dao, arXiv:2307.08691, section 3.1).
PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def kernel_cost(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float] | None:
    """(FLOPs, bytes) of one call of a kernel of this file, which the compiler does not see into.

    FLOPs are those the matrix unit takes time for: head dimensions are padded to its 128 lanes.
    Bytes are of bfloat16 inputs that each row of blocks reads anew, and the outputs.

    Args:
        name: of the kernel, as in the compiled program: "splash_mha_fwd_residuals".
        shapes: of its operands; the first two of four dimensions are q [B, heads, L, D] and
            k [B, heads, M, D].

    Returns:
        None for a kernel of another file.
    """
    products = next((n for start, n in PRODUCTS.items() if name.startswith(start)), None)
    if products is None:
        return None
    (batch, heads, length, width), (_, _, keys, _) = [s for s in shapes if len(s) == 4][:2]
    padded = -(-width // LANES) * LANES
    flops = 2.0 * products * batch * heads * length * keys * padded
    rows = length // _block(length, ROW_BYTES // (2 * padded))
    read = length + 2 * rows * keys  # q once, k and v for each row of blocks
    written = length * (products - 1)
    return flops, 2.0 * batch * heads * padded * (read + written)
