"""The flash kernel in interpret mode against dense attention, and when it is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import flash, placement
from sdjax.models.attention import attention


def inputs(reference, width, length=256, heads=2, dtype=jnp.float32):
    return [jnp.asarray(reference.normal(i, 2, length, heads, width), dtype) for i in range(4)]


@pytest.mark.parametrize("width", [40, 64, 80])  # heads of SD1 at its first levels, and of SD2
def test_equals_dense_attention_in_value_and_gradient(width, reference):
    q, k, v, cotangent = inputs(reference, width)
    dense, dense_pullback = jax.vjp(attention, q, k, v)
    ours, pullback = jax.vjp(lambda *x: flash.flash_attention(*x, interpret=True), q, k, v)
    # Both are float32 with sums in another order.
    assert reference.error(ours, dense) < 2e-6
    for gradient, want in zip(pullback(cotangent), dense_pullback(cotangent), strict=True):
        assert reference.error(gradient, want) < 4e-6


def test_bfloat16_is_as_close_to_exact_as_dense(reference):
    q, k, v, _ = inputs(reference, 40)
    exact = np.asarray(attention(q, k, v))
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    dense = np.asarray(attention(*narrow), np.float32)
    ours = flash.flash_attention(*narrow, interpret=True)
    assert ours.dtype == jnp.bfloat16
    error, bound = (
        reference.error(np.asarray(ours, np.float32), exact),
        reference.error(dense, exact),
    )
    assert error < 1.5 * bound < 0.05


class OnTPU:
    kernels = "tpu"

    def __init__(self):
        self.calls = []

    def activation(self, x):
        return x

    def per_device(self, kernel, *arrays):
        self.calls.append(arrays[0].shape)
        return arrays[0]


@pytest.mark.parametrize(
    "queries,keys,causal,taken",
    [
        (4096, 4096, False, True),
        (1024, 1024, False, True),
        (256, 256, False, False),  # the scores are small
        (4096, 77, False, False),  # text: not in blocks of 128
        (1000, 1000, False, False),
        (1024, 1024, True, False),
    ],
)
def test_chosen_on_tpus_for_long_sequences_alone(queries, keys, causal, taken):
    q, k = (jax.ShapeDtypeStruct((1, n, 1, 8), jnp.bfloat16) for n in (queries, keys))
    there, elsewhere = OnTPU(), OnTPU()
    elsewhere.kernels = "gpu"
    for placed in (there, elsewhere):
        with placement.placed(placed), jax.default_matmul_precision("default"):
            jax.eval_shape(lambda q, k: attention(q, k, k, causal=causal), q, k)
    assert bool(there.calls) == taken and not elsewhere.calls
    jax.eval_shape(lambda q, k: attention(q, k, k, causal=causal), q, k)  # no placement: dense
    assert bool(there.calls) == taken


def test_costs_are_those_of_dense_attention():
    """XLA counts the products of the dense one; head dimension 128 needs no padding."""
    q = jax.ShapeDtypeStruct((2, 1024, 4, 128), jnp.bfloat16)
    forward = jax.jit(attention).lower(q, q, q).compile().cost_analysis()["flops"]
    shapes = [(1, 1, 1), (2, 4, 1024, 128), (2, 4, 1024, 128), (2, 4, 1024, 128)]
    ours, bytes_ = flash.kernel_cost("splash_mha_fwd_residuals", shapes)
    assert ours < forward < 1.1 * ours  # with the softmax
    assert bytes_ == 2 * 2 * 4 * 128 * (1024 + 2 * 1024 + 1024)
    backward = sum(flash.kernel_cost(f"splash_mha_{n}", shapes)[0] for n in ("dq", "dkv_no"))
    assert backward == 3.5 * ours  # scores twice over, and the four products of the gradient
    assert flash.kernel_cost("somebody_elses", shapes) is None


@pytest.mark.parametrize(
    "chip",
    [
        "v5p:2x2x1",
        pytest.param("v5e:2x2", marks=pytest.mark.slow),
        pytest.param("v6e:2x2", marks=pytest.mark.slow),
    ],
)
def test_every_shape_of_stable_diffusion_fits_the_chip(chip):
    """Compiled by the chip's own compiler, which refuses what does not fit its vector memory."""
    pytest.importorskip("libtpu")
    from sdjax.parallel import topologies

    device = topologies.devices(topologies.parse(chip))[0]
    place = jax.sharding.SingleDeviceSharding(device)
    gradients = jax.jit(
        jax.grad(lambda *x: flash.flash_attention(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    )
    for length, heads, width, dtype in (
        (4096, 8, 40, jnp.bfloat16),  # SD1, 512 px
        (4096, 1, 512, jnp.bfloat16),  # the VAE
        (9216, 5, 64, jnp.float32),  # SD2 at 768 px, upcast
    ):
        x = jax.ShapeDtypeStruct((8, length, heads, width), dtype, sharding=place)
        with jax.default_matmul_precision("default"):
            text = gradients.lower(x, x, x).compile().as_text()
        assert "splash_mha_dkv" in text


def test_not_chosen_for_what_the_kernel_compiler_refuses():
    q = jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.bfloat16)
    with jax.default_matmul_precision("highest"):
        assert not flash.fits(q, q, causal=False)
        assert flash.fits(q.update(dtype=jnp.float32), q, causal=False)
