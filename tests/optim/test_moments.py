"""Moments in 8 bits and bfloat16: the published map, optax, checkpoints, and where they lie."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from sdjax.checkpoints.checkpoint import Checkpoints
from sdjax.errors import UserError
from sdjax.models import weights
from sdjax.models.unet import UNet, UNetConfig
from sdjax.optim import moments
from sdjax.optim.optimizers import OptimConfig, make_optimizer
from sdjax.parallel import sharding
from sdjax.parallel.mesh import AXES

SHAPES = {
    "unet.a.kernel": (3, 3, 64, 96),
    "unet.b.kernel": (192, 64),
    "unet.b.bias": (192,),
    "text_encoder.token_embedding.embedding": (100, 64),
}
EIGHT = OptimConfig(moments="8bit", clip_norm=0.0, learning_rate=1e-3)


def published_map(signed):
    """`create_dynamic_map` of bitsandbytes 0.4x, from its definition: 7 bits of exponent, 8 in all.

    Decade i is cut into 2^i even parts (twice that without signs) whose means are the values.
    """
    values = [0.0, 1.0]
    for i in range(7):
        grid = np.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        means = 10.0 ** (i - 6) * (grid[:-1] + grid[1:]) / 2
        values += [*means, *(-means if signed else ())]
    return np.sort(np.float32(values))


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_published_one(signed):
    want = published_map(signed)
    codes = np.arange(256, dtype=np.uint8)
    assert len(want) == 256
    values = moments.decode(jnp.asarray(codes), signed=signed)
    np.testing.assert_allclose(values, want, rtol=2e-6)
    np.testing.assert_array_equal(moments.encode(values, signed=signed), codes)
    rng = np.random.default_rng(0)
    x = np.float32(10 ** rng.uniform(-8, 0, 4000))
    x *= rng.choice([-1, 1], x.shape) if signed else 1
    got = np.asarray(moments.encode(jnp.asarray(x), signed=signed))
    nearest = np.abs(want - x[:, None]).min(1)
    np.testing.assert_allclose(np.abs(want[got] - x), nearest, rtol=1e-3, atol=1e-9)


def test_a_block_keeps_its_largest_and_rounds_the_rest():
    x = np.random.default_rng(1).normal(size=(3, 3, 64, 96)).astype(np.float32)
    x[:, :, :32] *= 1e-3  # another block: 64 channels in are one block beside 96 out
    blocks = moments.layout("unet.a.kernel", x.shape)
    assert blocks == moments.Layout(along=2, block=64, kept=3)
    q = moments.quantise(jnp.asarray(x), blocks, signed=False)  # signs are lost, sizes are not
    assert q.codes.shape == x.shape and q.codes.dtype == np.uint8
    assert q.scales.shape == (9, 96)
    np.testing.assert_array_equal(q.scales.reshape(3, 3, 96), np.abs(x).max(2))
    back = np.asarray(moments.dequantise(q, blocks, signed=False))
    top = np.abs(x).max(2, keepdims=True)
    error = np.abs(back - np.abs(x)) / top
    assert error.max() <= 0.45 / 128 * 1.01  # half a part of the first decade
    np.testing.assert_array_equal(back.max(2, keepdims=True), top)


def gradients(step):
    rng = np.random.default_rng(step)
    return {p: jnp.asarray(rng.normal(0.3, 1, s) * 1e-3, jnp.float32) for p, s in SHAPES.items()}


def zeros():
    return {p: jnp.zeros(s, jnp.float32) for p, s in SHAPES.items()}


def updates(config, steps=20):
    """The sum of all updates, and the state after them."""
    optimizer = make_optimizer(config, 100, zeros())
    update = jax.jit(optimizer.update)
    state, total = optimizer.init(zeros()), zeros()
    for step in range(steps):
        moved, state = update(gradients(step), state, total)
        total = optax.apply_updates(total, moved)
    return total, state


def test_adam_in_8_bits_moves_as_adam_does():
    whole, exact = updates(dataclasses.replace(EIGHT, moments="float32"))
    rounded, state = updates(EIGHT)
    for path, want in whole.items():
        if moments.layout(path, want.shape) is None:  # small, or an embedding
            np.testing.assert_allclose(rounded[path], want, rtol=1e-4, atol=1e-8)
        else:
            error = np.linalg.norm(rounded[path] - want) / np.linalg.norm(want)
            assert 0 < error < 0.02, (path, error)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    large = [p for p, s in SHAPES.items() if moments.layout(p, s)]
    assert large == ["unet.a.kernel", "unet.b.kernel"]
    kept = 2 * sum(4 * whole[p].size for p in SHAPES if p not in large)
    # A byte an element and four a block, of 64 here.
    assert size(state) - kept == pytest.approx((size(exact) - kept) / 4 * (1 + 4 / 64), rel=1e-3)


def test_second_moments_far_below_the_largest_do_not_vanish():
    """Beside a first moment that is still there, a second one of 0 would be a step of any size."""
    spread = np.float32(10 ** np.random.default_rng(0).uniform(-5, 0, (64, 64)))
    adam = moments.in_blocks(optax.scale_by_adam(0.9, 0.999, 1e-12))
    params = {"unet.x.kernel": jnp.zeros((64, 64))}
    state = adam.init(params)
    for _ in range(5):
        direction, state = jax.jit(adam.update)({"unet.x.kernel": jnp.asarray(spread)}, state)
    # Steady gradients: 1 everywhere in float32.
    assert np.abs(direction["unet.x.kernel"] - 1).max() < 0.6


def test_bfloat16_is_optax_with_mu_dtype():
    config = dataclasses.replace(EIGHT, moments="bfloat16")
    ours, state = updates(config)
    tx = optax.adam(config.learning_rate, config.b1, config.b2, config.eps, mu_dtype=jnp.bfloat16)
    update, theirs, total = jax.jit(tx.update), tx.init(zeros()), zeros()
    for step in range(20):
        moved, theirs = update(gradients(step), theirs)
        total = optax.apply_updates(total, moved)
    for path, want in total.items():
        np.testing.assert_allclose(ours[path], want, rtol=1e-5, atol=1e-9)
    dtypes = [x.dtype for x in jax.tree.leaves(state) if x.ndim]
    assert dtypes.count(jnp.bfloat16) == dtypes.count(jnp.float32) == len(SHAPES)


@pytest.mark.parametrize("name", ["lion", "muon"])
def test_bfloat16_of_other_optimizers(name):
    _, state = updates(OptimConfig(name=name, moments="bfloat16"), steps=1)
    assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "name,kept", [("lion", "8bit"), ("sgd", "bfloat16"), ("adafactor", "bfloat16")]
)
def test_an_optimizer_that_cannot_says_which_can(name, kept):
    with pytest.raises(UserError, match=f"optim.moments='{kept}'.*optim.name='{name}'.*adamw"):
        OptimConfig(name=name, moments=kept)
    with pytest.raises(UserError, match="float32, bfloat16, 8bit"):
        OptimConfig(moments="4bit")


def test_a_checkpoint_holds_the_codes_to_the_bit(tmp_path):
    _, state = updates(EIGHT, steps=2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"opt_state": state}, {}, {})
        checkpoints.wait()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        _, restored, _, _ = checkpoints.restore({"opt_state": abstract})
    assert jax.tree.structure(restored["opt_state"]) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def real_unet():
    """The parameters of SD1's UNet and the state of Adam in 8 bits, abstract."""
    _, shapes = weights.abstract(UNet, UNetConfig())
    params = {f"unet.{p}": v for p, v in shapes.items()}
    return params, jax.eval_shape(make_optimizer(EIGHT, 100, params).init, params)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 4, 2), (64, 1, 1)])
def test_moments_of_a_real_unet_are_split_as_its_parameters(sizes, real_unet):
    mesh = AbstractMesh(sizes, AXES)
    params, state = real_unet
    placed = sharding.state_shardings(state, params, mesh, spec=sharding.update_spec)
    held = sum(
        np.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    )
    count = sum(v.size for v in params.values())
    assert all(isinstance(where, NamedSharding) for where in jax.tree.leaves(placed))
    # Two bytes a parameter and the scales; biases, norms and the ends stay whole, in float32.
    ways = sizes[0] * sizes[1]  # `tensor` splits but some of the kernels
    assert held < 2 * count / ways * 1.08 + 8 * 0.7e6
