"""Stacked blocks against the same blocks in a list: values, gradients and files."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdjax.models import weights
from sdjax.models.layers import LayerNorm, linear
from sdjax.models.stacked_paths import block_paths, leading_axes
from sdjax.models.stacking import Blocks

WIDTH, COUNT = 6, 5


class Block(nnx.Module):
    def __init__(self, width, *, wide=False, rngs):
        self.norm = LayerNorm(WIDTH, eps=1e-5, rngs=rngs)
        self.fc1 = linear(WIDTH, 2 * width, rngs=rngs)
        self.fc2 = nnx.List([linear(2 * width, WIDTH, bias=not wide, rngs=rngs)])

    def __call__(self, x, shift):
        return x + self.fc2[0](jnp.tanh(self.fc1(self.norm(x)) + shift))


class Listed(nnx.Module):
    """COUNT equal blocks, and two of another width."""

    def __init__(self, config, *, rngs):
        self.layers = nnx.List(
            [Block(WIDTH, rngs=rngs) for _ in range(COUNT)]
            + [Block(2 * WIDTH, wide=True, rngs=rngs) for _ in range(2)]
        )

    def __call__(self, x, shifts):
        states = []
        for layer, shift in zip(self.layers, shifts, strict=True):
            x = layer(x, shift)
            states.append(x)
        return x, jnp.stack(states)


class Stacked(nnx.Module):
    def __init__(self, remat, *, rngs):
        self.layers = Blocks(
            (lambda rngs: Block(WIDTH, rngs=rngs), COUNT),
            (lambda rngs: Block(2 * WIDTH, wide=True, rngs=rngs), 2),
            rngs=rngs,
        )
        self.remat = remat

    def __call__(self, x, shifts):
        def step(block, x, shift):
            x = block(x, shift)
            return x, x

        x, first = self.layers.scan(step, x, shifts[:COUNT], remat=self.remat)
        x, last = self.layers.scan(step, x, shifts[COUNT:], run=1, remat=self.remat)
        return x, jnp.concatenate([first, last])


@pytest.fixture(scope="module")
def both():
    key = jax.random.key(3)
    listed = weights.split(Listed(None, rngs=weights.Keys(key)))
    stacked = weights.split(Stacked("none", rngs=weights.Keys(key)))
    return listed, stacked


def test_paths_say_which_blocks_an_array_holds(both):
    (_, listed), (_, stacked) = both
    assert stacked["layers.0-4.fc1.kernel"].shape == (COUNT, WIDTH, 2 * WIDTH)
    assert stacked["layers.5-6.fc2.0.kernel"].shape == (2, 4 * WIDTH, WIDTH)
    assert sorted(p for path in stacked for p in block_paths(path)) == sorted(listed)
    assert {leading_axes(path) for path in stacked} == {1}
    assert {leading_axes(path) for path in listed} == {0}
    assert block_paths("a.9-10.b") == ["a.9.b", "a.10.b"] and block_paths("a-b.3") == ["a-b.3"]


def test_new_parameters_and_files_are_those_of_separate_blocks(both):
    (_, listed), (_, stacked) = both
    expected, found = weights.to_diffusers(listed), weights.to_diffusers(stacked)
    assert set(expected) == set(found)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    again = weights.from_diffusers(found, jax.eval_shape(lambda: stacked))
    assert list(again) == list(stacked)
    for path, value in stacked.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_misfits_name_the_block(both, change):
    _, (_, stacked) = both
    tensors = weights.to_diffusers(stacked)
    name = "layers.3.fc1.weight"
    tensors[name] = tensors[name][:-1]
    if change == "missing":
        del tensors[name]
    with pytest.raises(weights.WeightsError, match=r"layers\.3\.fc1\.weight"):
        weights.from_diffusers(tensors, jax.eval_shape(lambda: stacked))


@pytest.mark.parametrize("remat", ["none", "block", "full", "dots_saveable"])
def test_values_and_gradients_are_those_of_separate_blocks(both, remat):
    (graph, listed), (_, stacked) = both
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, WIDTH)), jnp.float32)
    shifts = jnp.asarray(rng.normal(size=(COUNT + 2, 1, 1)), jnp.float32)
    own_graph, _ = weights.split(Stacked(remat, rngs=weights.Keys(jax.random.key(0))))

    def loss(params, graph):
        y, states = weights.merge(graph, params)(x, shifts)
        return jnp.sum(jnp.sin(y)) + jnp.sum(states**3), states

    (expected, states), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(
        listed, graph
    )
    (found, own_states), own = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(
        stacked, own_graph
    )
    # Seven tiny layers in float32: sums of 12 products, in another order at most.
    np.testing.assert_allclose(own_states, states, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=2e-5)  # a sum of cubes of both signs
    slopes, own = weights.to_diffusers(slopes), weights.to_diffusers(own)
    for name, value in slopes.items():
        np.testing.assert_allclose(
            own[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max(), err_msg=name
        )


def test_the_compiled_program_holds_one_body_for_a_run(both):
    _, (graph, stacked) = both
    shapes = jax.ShapeDtypeStruct((2, WIDTH), jnp.float32), jnp.zeros((COUNT + 2, 1, 1))
    call = jax.jit(lambda params, *args: weights.merge(graph, params)(*args)[0])
    text = call.lower(stacked, *shapes).as_text()
    assert text.count("stablehlo.tanh") == 2
