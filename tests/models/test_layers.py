"""Layers, blocks and attention one by one, against torch and diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdjax.models import layers, weights
from sdjax.models.attention import Transformer2D, attention
from sdjax.models.blocks import Downsample, ResnetBlock, Upsample
from sdjax.models.layers import GroupNorm, LayerNorm


def loaded(module, torch_module, reference):
    """`module` with the weights of `torch_module`."""
    graphdef, params = weights.split(module)
    return weights.merge(graphdef, weights.from_diffusers(reference.tensors(torch_module), params))


def qkv(reference, queries=6, keys=9, heads=3, width=8, scale=1.0):
    shapes = [(2, n, heads, width) for n in (queries, keys, keys)]
    return [scale * reference.normal(i, *shape) for i, shape in enumerate(shapes)]


# Attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_attention_and_gradients_equal_torch(causal, upcast, reference):
    torch = pytest.importorskip("torch")
    arrays = qkv(reference, keys=6 if causal else 9)
    tensors = [torch.tensor(x).double().requires_grad_() for x in arrays]
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in tensors), is_causal=causal
    ).transpose(1, 2)
    cotangent = reference.normal(7, *want.shape)
    want.backward(torch.tensor(cotangent).double())
    out, pullback = jax.vjp(lambda *x: attention(*x, causal=causal, upcast=upcast), *arrays)
    assert reference.error(out, want.detach().numpy()) < 2e-6
    for gradient, tensor in zip(pullback(cotangent), tensors, strict=True):
        assert reference.error(gradient, tensor.grad.numpy()) < 4e-6


def test_large_bfloat16_logits_stay_finite_and_upcast_is_closer(reference):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(reference, scale=20.0))
    logits = jnp.einsum("blhd,bmhd->bhlm", q, k) * 8**-0.5
    assert jnp.abs(logits).max() > 300
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    out, upcast = attention(q, k, v), attention(q, k, v, upcast=True)
    assert out.dtype == upcast.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert reference.error(upcast, exact) < 0.004
    gradient = jax.grad(lambda q: attention(q, k, v).astype(jnp.float32).sum())(q)
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


# Norms


def test_group_norm_of_large_mean_and_small_deviation(reference):
    """A one-pass variance E[x^2] - E[x]^2 would be rounding noise here."""
    torch = pytest.importorskip("torch")
    x = 100 + 0.1 * reference.normal(0, 2, 6, 6, 16)
    torch_norm = reference.randomised(torch.nn.GroupNorm(4, 16, eps=1e-5))
    want = reference.from_torch(torch_norm(reference.to_torch(x)))
    ours = loaded(GroupNorm(16, 4, eps=1e-5), torch_norm, reference)
    # The last bit of a float32 mean of 100 is 8e-6, 8e-5 of the deviation.
    assert reference.error(ours(x), want) < 1e-4
    naive = nnx.GroupNorm(16, 4, epsilon=1e-5, use_fast_variance=True, rngs=nnx.Rngs(0))
    naive.scale[...], naive.bias[...] = ours.scale[...], ours.bias[...]
    assert reference.error(naive(x), want) > 1e-3


def test_layer_norm_of_large_mean_and_small_deviation(reference):
    torch = pytest.importorskip("torch")
    x = 100 + 0.1 * reference.normal(0, 2, 5, 64)
    torch_norm = reference.randomised(torch.nn.LayerNorm(64))
    want = torch_norm(reference.to_torch(x)).detach().numpy()
    assert reference.error(loaded(LayerNorm(64), torch_norm, reference)(x), want) < 5e-5


@pytest.mark.parametrize("norm", [GroupNorm(16, 4, eps=1e-5, dtype=jnp.bfloat16),
                                  LayerNorm(16, dtype=jnp.bfloat16)])  # fmt: skip
def test_norm_statistics_are_float32_in_bfloat16(norm, reference):
    x = jnp.asarray(3 + 0.5 * reference.normal(0, 2, 16, 16, 16), jnp.bfloat16)
    y = np.asarray(norm(x), np.float32)
    assert norm(x).dtype == jnp.bfloat16
    assert abs(y.mean()) < 2e-4 and abs(y.std() - 1) < 1e-3


def test_groups_must_divide_channels():
    with pytest.raises(ValueError, match="norm_num_groups = 5: expected a divisor of 16"):
        GroupNorm(16, 5, eps=1e-5)


# Blocks on inputs whose variance is of the size of eps: a wrong eps shows


def test_resnet_block_on_small_variance(reference):
    resnet = pytest.importorskip("diffusers.models.resnet")
    torch_block = reference.randomised(
        resnet.ResnetBlock2D(in_channels=16, out_channels=24, temb_channels=12, groups=8, eps=1e-5)
    )
    block = loaded(
        ResnetBlock(16, 24, time_channels=12, groups=8, eps=1e-5, rngs=nnx.Rngs(0)),
        torch_block,
        reference,
    )
    x, temb = 3e-3 * reference.normal(0, 2, 5, 6, 16), reference.normal(1, 2, 12)
    want = torch_block(reference.to_torch(x), reference.to_torch(temb))
    assert reference.error(block(x, temb), reference.from_torch(want)) < 2e-5
    block.norm1.eps = 1e-6
    assert reference.error(block(x, temb), reference.from_torch(want)) > 1e-2


@pytest.mark.parametrize("use_linear_projection", [False, True])
def test_transformer_on_small_variance(use_linear_projection, reference):
    transformers = pytest.importorskip("diffusers.models.transformers.transformer_2d")
    torch_block = reference.randomised(
        transformers.Transformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=32,
            num_layers=2,
            cross_attention_dim=12,
            norm_num_groups=8,
            use_linear_projection=use_linear_projection,
        )
    )
    block = loaded(
        Transformer2D(
            32, 4, 12, depth=2, groups=8, use_linear_projection=use_linear_projection,
            upcast=False, remat="none", rngs=nnx.Rngs(0),
        ),
        torch_block,
        reference,
    )  # fmt: skip
    x, context = 1e-3 * reference.normal(0, 2, 5, 6, 32), reference.normal(1, 2, 7, 12)
    want = torch_block(reference.to_torch(x), encoder_hidden_states=reference.to_torch(context))
    want = reference.from_torch(want.sample)
    assert reference.error(block(x, context), want) < 2e-5
    block.norm.eps = 1e-5
    assert reference.error(block(x, context), want) > 1e-2


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 2)])
def test_downsampling_pads_as_diffusers_does(size, reference):
    downsampling = pytest.importorskip("diffusers.models.downsampling")
    x = reference.normal(0, 2, *size, 8)
    for symmetric in (True, False):
        if not symmetric and 1 in size:
            continue
        torch_block = reference.randomised(
            downsampling.Downsample2D(8, use_conv=True, padding=int(symmetric), name="op")
        )
        block = loaded(Downsample(8, symmetric=symmetric, rngs=nnx.Rngs(0)), torch_block, reference)
        want = reference.from_torch(torch_block(reference.to_torch(x)))
        assert reference.error(block(x), want) < 2e-6


@pytest.mark.parametrize("size", [None, (6, 10), (5, 10), (6, 9), (5, 9)])
def test_upsampling_to_odd_sizes(size, reference):
    upsampling = pytest.importorskip("diffusers.models.upsampling")
    x = reference.normal(0, 2, 3, 5, 8)
    torch_block = reference.randomised(upsampling.Upsample2D(8, use_conv=True))
    block = loaded(Upsample(8, rngs=nnx.Rngs(0)), torch_block, reference)
    want = reference.from_torch(torch_block(reference.to_torch(x), size))
    assert reference.error(block(x, size), want) < 2e-6


def test_upsampling_to_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 5\) to \(4, 10\)"):
        layers.upsample_nearest(jnp.zeros((1, 3, 5, 2)), 4, 10)


# Activations and embeddings


def test_gelu_is_exact_and_quick_gelu_is_clips():
    torch = pytest.importorskip("torch")
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    want = torch.nn.functional.gelu(torch.tensor(x).double()).numpy()
    assert np.abs(np.asarray(layers.gelu(x)) - want).max() < 1e-6
    assert np.abs(np.asarray(jax.nn.gelu(x, approximate=True)) - want).max() > 4e-4
    slope = jax.vmap(jax.grad(layers.gelu))(jnp.asarray(x))
    tensor = torch.tensor(x).double().requires_grad_()
    torch.nn.functional.gelu(tensor).sum().backward()
    assert np.abs(np.asarray(slope) - tensor.grad.numpy()).max() < 1e-6
    quick = torch.tensor(x).double() * torch.sigmoid(1.702 * torch.tensor(x).double())
    assert np.abs(np.asarray(layers.quick_gelu(x)) - quick.numpy()).max() < 1e-6
    assert layers.gelu(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("flip_sin_to_cos, freq_shift", [(True, 0), (False, 1), (True, 1)])
def test_timestep_embedding_equals_diffusers(flip_sin_to_cos, freq_shift):
    torch = pytest.importorskip("torch")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    timesteps = np.concatenate([np.arange(1000), [0.25, 998.75]]).astype(np.float32)
    want = embeddings.get_timestep_embedding(
        torch.tensor(timesteps), 320, flip_sin_to_cos, downscale_freq_shift=freq_shift
    )
    kw = dict(flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift)
    out = layers.timestep_embedding(timesteps, 320, **kw)
    assert out.dtype == jnp.float32
    # One unit in the last place of a phase near 1000 is 6e-5.
    assert np.abs(np.asarray(out) - want.numpy()).max() < 1.5e-4


def test_timestep_embedding_tells_all_steps_apart_and_puts_cosines_first():
    out = np.asarray(layers.timestep_embedding(jnp.arange(1000), 320))
    assert len(np.unique(out, axis=0)) == 1000
    np.testing.assert_allclose(out[0], [1.0] * 160 + [0.0] * 160)


# Dropout, rematerialisation, initialisation


def test_dropout_keeps_the_mean_and_dtype():
    x = jnp.ones((200, 200), jnp.bfloat16)
    y = layers.dropout(x, 0.25, jax.random.key(0))
    assert y.dtype == x.dtype
    values, counts = np.unique(np.asarray(y, np.float32), return_counts=True)
    np.testing.assert_allclose(values, [0, 4 / 3], rtol=0.005)
    assert abs(counts[0] / x.size - 0.25) < 0.01
    assert layers.dropout(x, 0.25, None) is x
    assert layers.dropout(x, 0.0, jax.random.key(0)) is x


def test_fold_key_passes_none_on():
    assert layers.fold_key(None, 3) is None
    keys = [layers.fold_key(jax.random.key(0), i) for i in range(3)]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 3


@pytest.mark.parametrize(
    "remat, level, recomputed",
    [
        ("none", "block", False),
        ("block", "block", True),
        ("block", "stage", False),
        ("full", "block", False),
        ("full", "stage", True),
        ("nothing_saveable", "block", True),
        ("nothing_saveable", "stage", False),
        ("everything_saveable", "block", True),
    ],
)
def test_rematerialisation_wraps_the_level_it_names(remat, level, recomputed):
    layers.check_remat(remat)
    run = layers.rematerialised(jnp.sin, remat, level=level)
    jaxpr = str(jax.make_jaxpr(run)(1.0))
    assert ("checkpoint" in jaxpr or "remat" in jaxpr) == recomputed
    assert jax.grad(run)(1.0) == pytest.approx(np.cos(1.0), rel=1e-6)


def test_initialisers_have_the_variance_of_torch():
    key = jax.random.key(0)
    kernel = layers.fan_in_uniform(key, (3, 3, 64, 128))
    assert kernel.shape == (3, 3, 64, 128)
    assert np.std(kernel) == pytest.approx((3 * 576) ** -0.5, rel=0.01)
    assert np.abs(kernel).max() <= 576**-0.5
    assert np.std(layers.normal_init(0.02)(key, (200, 300))) == pytest.approx(0.02, rel=0.02)
    # Flat draws have the values of shaped ones, to a rounding of numbers in [-1, 1).
    shaped = jax.random.uniform(key, (3, 3, 64, 128), jnp.float32, -1, 1) / 24
    np.testing.assert_allclose(kernel, shaped, rtol=0, atol=2.0**-23 / 24)
