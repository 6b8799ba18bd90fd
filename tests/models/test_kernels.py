"""Which kernel computes an attention, and that cuDNN's is what a GPU's program holds."""

import re

import jax
import jax.numpy as jnp
import pytest

from sdjax.models import placement
from sdjax.models.attention import attention
from sdjax.models.config import ConfigError
from sdjax.models.kernels import choice
from sdjax.parallel.activations import Activations
from sdjax.parallel.mesh import MeshConfig, make_mesh

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def shaped(queries, keys, heads, width, dtype):
    return (jax.ShapeDtypeStruct((2, n, heads, width), dtype) for n in (queries, keys))


@pytest.mark.parametrize(
    "platform,queries,keys,heads,width,dtype,chosen",
    [
        ("tpu", 4096, 4096, 8, 40, BF16, "splash"),
        ("tpu", 1024, 1024, 10, 64, BF16, "splash"),
        ("tpu", 4096, 4096, 1, 512, BF16, "splash"),  # the VAE
        ("tpu", 9216, 9216, 5, 64, F32, "splash"),  # upcast
        ("tpu", 1000, 1000, 8, 40, BF16, "dense"),
        ("tpu", 4429, 4429, 24, 64, BF16, "splash"),  # image and text of SD3, padded
        ("tpu", 4096, 4429, 24, 64, BF16, "splash"),  # its last block, where text is only read
        ("tpu", 1357, 1357, 38, 64, BF16, "splash"),
        ("tpu", 4608, 4608, 24, 128, BF16, "splash"),  # FLUX
        ("tpu", 589, 589, 24, 64, BF16, "dense"),
        ("tpu", 4096, 77, 8, 40, BF16, "short"),
        ("tpu", 1024, 77, 8, 80, F32, "short"),
        ("tpu", 256, 77, 20, 64, BF16, "short"),
        ("tpu", 256, 256, 8, 160, BF16, "short"),
        ("tpu", 256, 256, 20, 64, F32, "dense"),  # too large for a kernel's memory
        ("tpu", 64, 77, 8, 160, BF16, "dense"),
        ("tpu", 4096, 154, 8, 40, BF16, "short"),
        ("cuda", 4096, 4096, 8, 40, BF16, "cudnn"),
        ("cuda", 64, 64, 20, 64, F16, "cudnn"),
        ("cuda", 4096, 77, 10, 128, BF16, "cudnn"),
        ("cuda", 256, 256, 8, 160, BF16, "dense"),  # before Hopper 128 is the most
        ("cuda", 256, 256, 8, 36, BF16, "dense"),
        ("cuda", 81, 81, 8, 40, BF16, "cudnn"),  # padded by one
        ("cuda", 4429, 4429, 24, 64, BF16, "cudnn"),  # image and text of SD3
        ("cuda", 4608, 4608, 24, 128, BF16, "cudnn"),  # FLUX
        ("cuda", 4096, 4096, 8, 40, F32, "dense"),
        ("", 4096, 4096, 8, 40, BF16, "dense"),
    ],
)
def test_chosen_by_platform_shape_and_dtype(platform, queries, keys, heads, width, dtype, chosen):
    q, k = shaped(queries, keys, heads, width, dtype)
    with jax.default_matmul_precision("default"):
        assert choice.choose("auto", platform, q, k, causal=False) == chosen
        assert choice.choose("dense", platform, q, k, causal=False) == "dense"
        assert choice.choose("auto", platform, q, k, causal=True) == "dense"


def test_a_kernel_that_is_asked_for_is_taken_wherever_it_fits_and_refused_elsewhere():
    q, k = shaped(64, 77, 8, 40, BF16)
    with jax.default_matmul_precision("default"):
        assert choice.choose("auto", "tpu", q, k, causal=False) == "dense"
        assert choice.choose("flash", "tpu", q, k, causal=False) == "short"
        assert choice.choose("cudnn", "cuda", q, k, causal=False) == "cudnn"
    for wanted, platform in (("flash", "cuda"), ("flash", ""), ("cudnn", "tpu"), ("cudnn", "")):
        with pytest.raises(ConfigError, match=f"model.attention is '{wanted}'.*set it to 'auto'"):
            choice.choose(wanted, platform, q, k, causal=False)


def test_not_chosen_for_what_the_kernel_compiler_refuses():
    q, k = shaped(1024, 1024, 1, 8, BF16)
    wide, _ = shaped(1024, 1024, 1, 8, F32)
    with jax.default_matmul_precision("highest"):
        assert choice.choose("auto", "tpu", q, k, causal=False) == "dense"
        assert choice.choose("auto", "tpu", wide, k, causal=False) == "splash"


@pytest.mark.parametrize("queries,keys", [(64, 64), (64, 77), (77, 77)])
def test_a_program_for_cuda_calls_cudnn_both_ways(queries, keys, monkeypatch):
    """Lowered without a GPU; whether cuDNN runs it only a GPU can tell."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    q, k = shaped(queries, keys, 2, 40, BF16)

    def both(wanted, q, k, cotangent):
        with placement.placed(Activations(mesh, "cuda", wanted)):
            out, pullback = jax.vjp(lambda q, k: attention(q, k, k), q, k)
        return out, *pullback(cotangent)

    def calls(wanted):
        traced = jax.jit(both, static_argnums=0).trace(wanted, q, k, q)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return re.findall(r"custom_call @(__cudnn\S+?)\(", text)

    assert calls("auto") == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert calls("dense") == []
