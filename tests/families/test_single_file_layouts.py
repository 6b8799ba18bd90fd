"""Weights under the names and in the layouts of single files, and back."""

import numpy as np
import pytest

from sdjax.families.single_file import FileNetwork, Place, from_file, halves_swapped, to_file

SHAPES = {"q.weight": (2, 3), "mlp.weight": (5, 3), "norm.weight": (4, 3), "head.weight": (3, 3)}


def identity(shape):
    return np.eye(*shape, dtype=np.float32)


def places(name):
    if name in ("q.weight", "mlp.weight"):
        return Place("linear1.weight", part=("q.weight", "mlp.weight").index(name))
    if name == "norm.weight":
        return Place("final.weight", to_file=halves_swapped, from_file=halves_swapped)
    return Place(name, default=identity)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def test_there_and_back_gives_the_same_bits(tensors):
    laid = to_file(dict(reversed(tensors.items())), places)
    assert laid.keys() == {"linear1.weight", "final.weight", "head.weight"}
    np.testing.assert_array_equal(laid["linear1.weight"][2:], tensors["mlp.weight"])
    np.testing.assert_array_equal(laid["final.weight"][:2], tensors["norm.weight"][2:])
    back = from_file(laid, SHAPES, places)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)


def test_halves_are_swapped_as_in_diffusers(tensors):
    converters = pytest.importorskip("diffusers.loaders.single_file_utils")
    import torch

    value = tensors["norm.weight"]
    theirs = converters.swap_scale_shift(torch.from_numpy(value), dim=0)
    np.testing.assert_array_equal(theirs.numpy(), halves_swapped(value))


def test_weight_with_a_default_is_left_out_and_found_again(tensors):
    tensors["head.weight"] = identity((3, 3))
    laid = to_file(tensors, places)
    assert "head.weight" not in laid
    np.testing.assert_array_equal(from_file(laid, SHAPES, places)["head.weight"], np.eye(3))


@pytest.mark.parametrize("rows", [6, 8, 1, 0])
def test_rows_too_many_or_too_few_are_seen_in_the_shapes(tensors, rows):
    laid = to_file(tensors, places) | {"linear1.weight": np.ones((rows, 3), np.float32)}
    found = from_file(laid, SHAPES, places)
    assert any(found[name].shape != SHAPES[name] for name in ("q.weight", "mlp.weight"))
    number = from_file(laid | {"linear1.weight": np.float32(1)}, SHAPES, places)
    assert number["q.weight"].shape == ()


def test_tensor_that_nobody_asked_for_keeps_its_name(tensors):
    odd = np.ones(1)
    found = from_file(to_file(tensors, places) | {"odd": odd}, SHAPES, places)
    assert found["odd"] is odd


def test_prefixes_are_looked_for_in_their_order():
    network = FileNetwork(("model.", ""), lambda shapes, _: None, bare=("blocks.",))
    assert network.prefix_in({"model.blocks.0": (), "blocks.0": ()}) == "model."
    assert network.prefix_in({"blocks.0": (), "other": ()}) == ""
    assert network.prefix_in({"other": ()}) is None
    assert not FileNetwork(("",), lambda shapes, _: None).holds("anything", "")
