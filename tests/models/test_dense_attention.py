"""Attention as plain products: torch's values and gradients, and nothing of L x M kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models.kernels.dense import dense_attention

torch = pytest.importorskip("torch")

# Of queries and keys [B, length, heads, D], and whether later keys are hidden.
SHAPES = {
    "self": ((2, 48, 48), (3, 40), False),
    "text": ((2, 64, 13), (2, 64), False),
    "causal": ((3, 19, 19), (4, 8), True),
}


def inputs(name):
    (batch, queries, keys), (heads, width), causal = SHAPES[name]
    rng = np.random.default_rng(0)
    # Logits of some size, or all the weights are the same.
    q = 3 * rng.standard_normal((batch, queries, heads, width), np.float32)
    k, v = (rng.standard_normal((batch, keys, heads, width), np.float32) for _ in range(2))
    dout = rng.standard_normal(q.shape, np.float32)
    return (q, k, v), dout, causal


def by_torch(arrays, dout, causal):
    """The output and the three gradients, in float64."""
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    out = out.transpose(1, 2)
    out.backward(torch.tensor(dout, dtype=torch.float64))
    return [out.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]


def by_sdjax(arrays, dout, causal, dtype=jnp.float32):
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    out, vjp = jax.vjp(lambda *x: dense_attention(*x, causal=causal), *arrays)
    return [out, *vjp(jnp.asarray(dout))]


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_those_of_torch(name):
    arrays, dout, causal = inputs(name)
    for ours, theirs in zip(
        by_sdjax(arrays, dout, causal), by_torch(arrays, dout, causal), strict=True
    ):
        # Sums of up to 64 products in float32.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_rounds_inputs_weights_and_results_alone(name):
    arrays, dout, causal = inputs(name)
    # The gradient too comes from a cast of the output to bfloat16.
    *rounded, dout = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (*arrays, dout))
    ours = by_sdjax(rounded, dout, causal, jnp.bfloat16)
    assert [x.dtype for x in ours] == [jnp.float32] + [jnp.bfloat16] * 3
    for one, exact in zip(ours, by_torch(rounded, dout, causal), strict=True):
        error = np.asarray(one, np.float64) - exact
        # Each weight and each gradient of a score is off by 2^-9 of itself, one as the other.
        assert np.sqrt(np.mean(error**2)) < 1.5 * 2**-9 * np.sqrt(np.mean(exact**2))


@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "per_example"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_a_bias_of_the_logits_has_torchs_values_and_gradient(rows, scale):
    (q, k, v), dout, _ = inputs("text")
    rng = np.random.default_rng(1)
    bias = rng.standard_normal((rows, 2 if rows == 1 else 1, 64, 13), np.float32)
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v, bias)]
    tq, tk, tv = (x.transpose(1, 2) for x in leaves[:3])
    theirs = torch.nn.functional.scaled_dot_product_attention(
        tq, tk, tv, attn_mask=leaves[3].expand(2, 2, 64, 13), scale=scale
    ).transpose(1, 2)
    theirs.backward(torch.tensor(dout, dtype=torch.float64))
    ours, vjp = jax.vjp(
        lambda q, k, v, bias: dense_attention(q, k, v, causal=False, bias=bias, scale=scale),
        *map(jnp.asarray, (q, k, v, bias)),
    )
    wanted = [theirs.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]
    for one, other in zip([ours, *vjp(jnp.asarray(dout))], wanted, strict=True):
        # Without 1/sqrt(D), logits of 70 that float32 has to 4e-6.
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())


def test_nothing_as_large_as_the_weights_is_kept_for_the_backward_pass():
    (q, k, v), _, _ = inputs("self")
    _, vjp = jax.vjp(lambda *x: dense_attention(*x, causal=False), q, k, v)
    kept = [leaf.shape for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "shape")]
    assert (2, 3, 48, 1) in kept  # log sum exp of each row
    assert max(np.prod(shape) for shape in kept) == q.size


def test_logits_that_float32_cannot_exponentiate_stay_finite():
    (q, k, v), dout, _ = inputs("self")
    arrays = (100 * q, 10 * k, v)  # logits in the thousands
    for ours, theirs in zip(
        by_sdjax(arrays, dout, False), by_torch(arrays, dout, False), strict=True
    ):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-3 * np.abs(theirs).max())
