"""Weights spread over several files, and weights with two names, against the libraries' own."""

import json

import jax
import numpy as np
import pytest

from sdjax.formats.weight_files import MAX_SHARD_SIZES, find_weights, untied, write_weights
from sdjax.models import weights
from sdjax.models.weights import WeightsError, from_diffusers, load_file

ALIAS, NAME = "encoder.embed_tokens.weight", "shared.weight"
TIED = {ALIAS: NAME}


@pytest.fixture(scope="module")
def t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5EncoderModel(config).eval()


@pytest.fixture(scope="module")
def flux():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


def tensors_of(model):
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def params_of(tensors):
    """Parameters of ours with these weights: {path: array}."""
    params = {}
    for name, value in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if name == NAME or "relative_attention_bias" in name:
            params[f"{stem}.embedding"] = value
        elif leaf == "weight":
            params[f"{stem}.{'kernel' if value.ndim == 2 else 'scale'}"] = value.T
        else:
            params[name] = value
    return params


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("size", ["", "3KB"])
@pytest.mark.parametrize("name", ["t5", "flux"])
def test_the_library_loads_what_is_written_in_one_file_or_several(name, size, request, tmp_path):
    model = request.getfixturevalue(name)
    tensors = tensors_of(model)
    model.save_pretrained(tmp_path / "theirs")  # for config.json
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs" / "config.json").rename(tmp_path / "ours" / "config.json")
    text = name == "t5"
    write_weights(
        tmp_path / "ours", params_of(tensors), name=name, text=text, prefix="", max_shard_size=size
    )
    files = sorted(file.name for file in (tmp_path / "ours").glob("*safetensors*"))
    stem = "model" if text else "diffusion_pytorch_model"
    if size:
        count = len(files) - 1
        assert count > 2 and files[0] == f"{stem}-00001-of-{count:05d}.safetensors"
        index = json.loads((tmp_path / "ours" / f"{stem}.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())
        sizes = {
            file: sum(tensors[key].nbytes for key, at in index["weight_map"].items() if at == file)
            for file in files[:-1]
        }
        alone = {file for file in sizes if list(index["weight_map"].values()).count(file) == 1}
        assert all(size <= 3000 or file in alone for file, size in sizes.items())
    else:
        assert files == [f"{stem}.safetensors"]
    assert_same(tensors_of(type(model).from_pretrained(tmp_path / "ours")), tensors)


@pytest.mark.parametrize("size", ["10GB", "3KB"])
@pytest.mark.parametrize("name", ["t5", "flux"])
def test_what_the_library_writes_is_read(name, size, request, tmp_path):
    model = request.getfixturevalue(name)
    model.save_pretrained(tmp_path, max_shard_size=size)
    params = params_of(tensors_of(model))
    shapes = {path: jax.ShapeDtypeStruct(v.shape, np.float32) for path, v in params.items()}
    found = find_weights(tmp_path)
    read = from_diffusers(untied(load_file(found), TIED, found), shapes)
    assert_same(read, params)


@pytest.mark.parametrize("names", [(NAME,), (ALIAS,), (NAME, ALIAS), (ALIAS, NAME)])
def test_tied_weight_is_read_under_either_name_or_both(names, t5):
    import torch

    tensors = tensors_of(t5)
    value = tensors.pop(NAME)
    found = untied(tensors | dict.fromkeys(names, value), TIED, "file")
    assert_same(found, tensors | {NAME: value})
    state = {name: torch.tensor(v) for name, v in (tensors | dict.fromkeys(names, value)).items()}
    assert not t5.load_state_dict(state, strict=False).unexpected_keys


def test_tied_weights_that_differ_are_named():
    tensors = {NAME: np.zeros(2), ALIAS: np.ones(2)}
    with pytest.raises(WeightsError, match=f"model.safetensors: {ALIAS} and {NAME} are one weight"):
        untied(tensors, TIED, "model.safetensors")


def test_sizes_are_those_of_the_libraries():
    import inspect

    diffusers = pytest.importorskip("diffusers")
    default = inspect.signature(diffusers.ModelMixin.save_pretrained).parameters["max_shard_size"]
    assert MAX_SHARD_SIZES == {"diffusion_pytorch_model": default.default, "model": "5GB"}


def test_shapes_are_those_of_the_weights_that_are_made(flux):
    params = params_of(tensors_of(flux))
    made = {name: value.shape for name, value in weights.to_diffusers(params).items()}
    assert weights.tensor_shapes(params) == made
