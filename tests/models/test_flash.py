"""The flash kernel in interpret mode against dense attention, and its cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models.attention import attention
from sdjax.models.kernels import flash
from sdjax.models.layers import rematerialised


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


@pytest.mark.parametrize(
    "length,keys,width",
    [(190, 190, 64), (128, 190, 128), (190, 128, 64), (560, 560, 128)],  # heads of SD3 and FLUX
)
def test_odd_lengths_are_padded_without_a_trace(length, keys, width, reference):
    """Also where every real score is far below the zero that a padded key would have."""
    q, k, v, cotangent = (
        jnp.asarray(reference.normal(i, 2, n, 1, width))
        for i, n in enumerate((length, keys, keys, length))
    )
    q, k = jnp.abs(q), k - 3
    assert flash.fits(q, k)
    dense, dense_pullback = jax.vjp(attention, q, k, v)
    ours, pullback = jax.vjp(lambda *x: flash.flash_attention(*x, interpret=True), q, k, v)
    assert reference.error(ours, dense) < 1e-5  # logits of about -20, each off by 2e-6
    for gradient, want in zip(pullback(cotangent), dense_pullback(cotangent), strict=True):
        assert reference.error(gradient, want) < 2e-5


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


def test_costs_are_those_of_dense_attention():
    """XLA counts the products of the dense one; head dimension 128 needs no padding."""
    q = jax.ShapeDtypeStruct((2, 1024, 4, 128), jnp.bfloat16)
    forward = jax.jit(attention).lower(q, q, q).compile().cost_analysis()["flops"]
    shapes = [(2, 4, 1024, 128), (2, 4, 1024, 128), (2, 4, 1024, 128)]
    ours, bytes_ = flash.kernel_cost("splash_mha_fwd_residuals", shapes)
    products = ours / (2 + flash.VECTOR["splash_mha_fwd"]) * 2
    assert products < forward < 1.1 * products  # with the softmax
    assert bytes_ == 2 * 2 * 4 * 128 * (1024 + 2 * 1024 + 1024)
    backward, bytes_ = flash.kernel_cost("splash_mha_dkv_no_residuals", shapes)
    # The scores again, and the four products of the gradient.
    assert backward == pytest.approx(products * 5.5 / 2)
    assert bytes_ == 2 * 2 * 4 * 128 * (4 * 1024 + 3 * 1024)
    long = [(1, 1, 4096, 128), (1, 1, 4096, 128)]  # two blocks of keys
    assert flash.kernel_cost("splash_mha_dkv", long)[1] == 2 * 128 * (4 * 4096 + 2 * 3 * 4096)
    one = [shape[1:] for shape in shapes]  # XLA drops the axis of one example
    assert 2 * flash.kernel_cost("splash_mha_fwd_residuals", one)[0] == ours
    assert flash.kernel_cost("somebody_elses", shapes) is None


@pytest.mark.parametrize(
    "chip",
    [
        "v5p:2x2x1",
        pytest.param("v5e:2x2", marks=pytest.mark.slow),
        pytest.param("v6e:2x2", marks=pytest.mark.slow),
    ],
)
def test_every_shape_of_a_model_fits_the_chip(chip):
    """Compiled by the chip's own compiler, which refuses what does not fit its vector memory."""
    pytest.importorskip("libtpu")
    from sdjax.planning import topologies

    device = topologies.devices(topologies.parse(chip))[0]
    place = jax.sharding.SingleDeviceSharding(device)
    gradients = jax.jit(
        jax.grad(lambda *x: flash.flash_attention(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    )
    for length, heads, width, dtype in (
        (4096, 8, 40, jnp.bfloat16),  # SD1, 512 px
        (4096, 1, 512, jnp.bfloat16),  # the VAE
        (9216, 5, 64, jnp.float32),  # SD2 at 768 px, upcast
        (4096 + 333, 24, 64, jnp.bfloat16),  # SD3, 1024 px and text
        (4096 + 154, 24, 128, jnp.bfloat16),  # FLUX
    ):
        x = jax.ShapeDtypeStruct((8, length, heads, width), dtype, sharding=place)
        with jax.default_matmul_precision("default"):
            text = gradients.lower(x, x, x).compile().as_text()
        assert "splash_mha_dkv" in text


def calls(jaxpr):
    """Kernels that a program runs; what gives no result is never compiled."""
    count = 0
    for equation in jaxpr.eqns:
        inner = [getattr(p, "jaxpr", p) for p in equation.params.values()]
        if equation.primitive.name == "pallas_call":
            count += 1
        elif equation.outvars:
            count += sum(calls(p) for p in inner if hasattr(p, "eqns"))
    return count


@pytest.mark.parametrize("remat,kernels", [("none", 2), ("block", 3), ("attention", 2)])
def test_rematerialisation_may_keep_what_the_kernel_gives(remat, kernels, reference):
    """One kernel forward and one backward; recomputed, the first runs twice."""
    q, k, v, _ = inputs(reference, 8, length=128, heads=1)

    def block(q, k, v):  # what it adds has to be computed again for the cosine
        return jnp.sin(flash.flash_attention(2 * q, k, v, interpret=True))

    run = rematerialised(block, remat, level="block")
    program = jax.make_jaxpr(jax.grad(lambda *x: run(*x).sum(), (0, 1, 2)))(q, k, v)
    assert calls(program.jaxpr) == kernels
