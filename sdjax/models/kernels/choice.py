"""The choice of the kernel for an attention, by platform, shape and dtype, in one table.

"auto" takes the kernel that is faster by the compilers' estimates (TPU, benchmarks/tpu_layers.py),
or the one that holds no scores in memory (cuDNN).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sdjax.models.config import ConfigError
from sdjax.models.kernels import flash, short_keys

Array = jax.Array

WANTED = ("auto", "dense", "flash", "cudnn")  # values of `model.attention`
_PLATFORMS = {"flash": "tpu", "cudnn": "cuda"}
CUDNN_CALL = "__cudnn$fmha"  # the beginning of the custom calls of cuDNN's attention
CUDNN_WIDTH = 128  # largest width of a head; Hopper takes up to 256, older GPUs do not


def choose(wanted: str, platform: str, q: Array, k: Array, *, causal: bool) -> str:
    """The name of the kernel for q [B, L, heads, D] and k [B, M, heads, D].

    Args:
        wanted: `model.attention`. "auto" takes the platform's kernel where that is the better one,
            "flash" and "cudnn" wherever it takes the shape.
        platform: whose kernels may be used: "tpu", "cuda", or another, which has none.
        causal: position i attends to positions <= i.

    Returns:
        "dense", "splash" or "short" (TPU), or "cudnn".

    Raises:
        ConfigError: `wanted` is a kernel of another platform.
    """
    needed = _PLATFORMS.get(wanted, platform)
    if needed != platform:
        devices = {"tpu": "a TPU", "cuda": "an NVIDIA GPU of compute capability 8.0 or more"}
        raise ConfigError(
            f"model.attention is {wanted!r}, which takes {devices[needed]}, and this is not one; "
            "set it to 'auto'"
        )
    if wanted == "dense" or causal:  # only the text encoder is causal, over 77 tokens
        return "dense"
    if platform == "cuda":
        return "cudnn" if _cudnn(q) else "dense"
    if platform == "tpu" and _mosaic_takes(q.dtype):
        if short_keys.fits(q, k) and (wanted == "flash" or short_keys.pays(q, k)):
            return "short"
        if flash.fits(q, k) and (wanted == "flash" or flash.pays(q, k)):
            return "splash"
    return "dense"


def _cudnn(q: Array) -> bool:
    """Whether jax's cuDNN attention takes `q`, gradients included; odd lengths are padded.

    Source: jax/_src/cudnn/fused_attention_stablehlo.py, check_layout and check_is_flash_attention.
    """
    width = q.shape[-1]
    return q.dtype in (jnp.bfloat16, jnp.float16) and width <= CUDNN_WIDTH and width % 8 == 0


def _mosaic_takes(dtype) -> bool:
    """Whether Mosaic takes products of `dtype`: it refuses bfloat16 in "highest" precision."""
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return dtype == jnp.float32 or precision in (None, "default", "fastest", "bfloat16")


def cudnn_cost(target: str, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float] | None:
    """The (FLOPs, bytes) of one call of cuDNN's attention, which the compiler cannot count.

    There are two products a score in the forward pass. There are five in the backward pass, which
    computes the scores again.

    Args:
        target: the target of the custom call, "__cudnn$fmhaSoftmax" or another.
        shapes: the shapes of its operands; the first two are q [B, L, heads, D] and
            k [B, M, heads, D], of 16 bits a number.

    Returns:
        None for another custom call.
    """
    if not target.startswith(CUDNN_CALL):
        return None
    (batch, length, heads, width), (_, keys, *_) = shapes[:2]
    back = target.endswith("Backward")
    flops = (10.0 if back else 4.0) * batch * heads * length * keys * width
    arrays = 4 if back else 2  # q, the output and their gradients; as many of k's and v's length
    return flops, 2.0 * arrays * batch * heads * width * (length + keys)


def cudnn_attention(q: Array, k: Array, v: Array) -> Array:
    """The attention of q [B, L, heads, D] to k, v [B, M, heads, D] by cuDNN, [B, L, heads, D].

    jax has no backward pass of odd lengths, such as the 77 of text and joint sequences with it.
    """
    (batch, length, *_), keys = q.shape, k.shape[1]
    lengths = jnp.full((batch,), keys, jnp.int32) if keys % 2 else None
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) if x.shape[1] % 2 else x for x in (q, k, v)
    )
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )[:, :length]
