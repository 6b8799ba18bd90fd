"""Flat parameters, conversion and safetensors files."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import SafetensorError

from sdjax.models import weights
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import VAE, VAEConfig
from sdjax.models.weights import WeightsError, from_diffusers, load_file, save_file, to_diffusers
from sdjax.system import paths

SMALL_UNET = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=24,
    attention_head_dim=2,
)
SMALL_VAE = VAEConfig(
    block_out_channels=(16,),
    down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
    layers_per_block=1,
    norm_num_groups=4,
)


class Net(nnx.Module):
    """One of each kind of parameter."""

    def __init__(self, config=None, *, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(11)])
        self.conv = nnx.Conv(2, 4, (3, 5), rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.words = nnx.Embed(7, 2, rngs=rngs)
        self.temperature = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.temperature[...] * self.norm(self.layers[10](x))


@pytest.fixture
def params():
    return weights.init(Net, None, jax.random.key(0))


@pytest.fixture
def tensors(params):
    return to_diffusers(params)


@pytest.fixture(scope="module")
def abstract():
    return weights.abstract(Net, None)[1]


# Flat parameters


def test_split_and_merge_are_inverse_inside_jit_and_carry_gradients(params):
    model = Net(rngs=nnx.Rngs(0))
    graphdef, flat = weights.split(model)
    assert "layers.10.kernel" in flat and "temperature" in flat
    assert all(isinstance(value, jax.Array) for value in flat.values())
    x = jnp.ones((1, 2))
    np.testing.assert_array_equal(weights.merge(graphdef, flat)(x), model(x))
    again = weights.split(weights.merge(graphdef, flat))
    assert again[0] == graphdef and hash(again[0]) == hash(graphdef)
    assert all(again[1][path] is flat[path] for path in flat)

    loss = jax.jit(lambda p: jnp.square(weights.merge(graphdef, p)(x) - 3).sum())
    gradients = jax.grad(loss)(flat)
    assert set(gradients) == set(flat)
    assert np.abs(gradients["layers.10.kernel"]).max() > 0
    # Order is no part of the meaning: jax sorts the keys of dicts.
    backwards = dict(reversed(flat.items()))
    np.testing.assert_array_equal(weights.merge(graphdef, backwards)(x), model(x))


def test_abstract_and_init_agree_and_init_runs_inside_jit():
    graphdef, abstract = weights.abstract(UNet, SMALL_UNET, dtype=jnp.bfloat16, remat="block")
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in abstract.values())
    init = lambda key: weights.init(UNet, SMALL_UNET, key)  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0))
    assert {k: (v.shape, v.dtype) for k, v in shapes.items()} == {
        k: (v.shape, v.dtype) for k, v in abstract.items()
    }
    model = weights.merge(graphdef, abstract)
    assert model.dtype == jnp.bfloat16 and model.remat == "block"


def test_abstract_is_kept_and_its_parameters_are_the_callers_own():
    graph, params = weights.abstract(VAE, SMALL_VAE)
    kept = dict(params)
    params.clear()
    again, others = weights.abstract(VAE, SMALL_VAE)
    assert again is graph and others == kept and kept


def test_init_depends_on_the_key_alone(params):
    again = weights.init(Net, None, jax.random.key(0))
    other = weights.init(Net, None, jax.random.key(1))
    jitted = jax.jit(lambda key: weights.init(Net, None, key))(jax.random.key(0))
    for path in params:
        np.testing.assert_array_equal(params[path], again[path])
        np.testing.assert_allclose(params[path], jitted[path], rtol=1e-6)
    assert not np.array_equal(params["conv.kernel"], other["conv.kernel"])
    assert not np.array_equal(params["layers.0.kernel"], params["layers.1.kernel"])


# Conversion


def test_names_and_layouts(params, tensors):
    assert set(tensors) == {
        *(f"layers.{i}.{leaf}" for i in range(11) for leaf in ("weight", "bias")),
        "conv.weight", "conv.bias", "norm.weight", "norm.bias", "words.weight", "temperature",
    }  # fmt: skip
    kernel = np.asarray(params["conv.kernel"])  # HWIO
    assert tensors["conv.weight"].shape == (4, 2, 3, 5)  # OIHW
    assert tensors["conv.weight"][3, 1, 2, 4] == kernel[2, 4, 1, 3]
    np.testing.assert_array_equal(tensors["layers.0.weight"], params["layers.0.kernel"].T)
    np.testing.assert_array_equal(tensors["words.weight"], params["words.embedding"])
    assert all(type(t) is np.ndarray and t.flags.c_contiguous for t in tensors.values())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_there_and_back_is_bit_equal(dtype, params, tmp_path):
    params = {path: value.astype(dtype) for path, value in params.items()}
    abstract = jax.eval_shape(lambda: params)
    save_file(to_diffusers(params), tmp_path / "w.safetensors")
    again = from_diffusers(load_file(tmp_path / "w.safetensors"), abstract)
    assert list(again) == list(abstract)
    for path, value in params.items():
        assert again[path].dtype == dtype
        assert again[path].tobytes() == np.asarray(value).tobytes(), path


@pytest.mark.parametrize(
    "name, cls, config",
    [("UNet2DConditionModel", UNet, SMALL_UNET), ("AutoencoderKL", VAE, SMALL_VAE)],
)
def test_torch_state_dicts_round_trip_through_files(name, cls, config, reference, tmp_path):
    """diffusers reads what we write, bit for bit, and we what it writes."""
    diffusers = pytest.importorskip("diffusers")
    torch_cls = getattr(diffusers, name)
    torch_model = reference.randomised(torch_cls.from_config(config.to_json())).float()
    torch_model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    index = "diffusion_pytorch_model.safetensors.index.json"
    theirs = load_file(tmp_path / "theirs" / index)
    assert set(theirs) == set(torch_model.state_dict())
    params = from_diffusers(theirs, weights.abstract(cls, config)[1])

    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    save_file(to_diffusers(params), folder / "diffusion_pytorch_model.safetensors")
    again = torch_cls.from_pretrained(folder)
    for (key, want), (_, got) in zip(
        torch_model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert want.equal(got), key


def test_half_precision_checkpoints_become_the_parameters_dtype(tensors, abstract):
    halves = {name: t.astype(np.float16) for name, t in tensors.items()}
    params = from_diffusers(halves, abstract)
    assert {p.dtype for p in params.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["norm.scale"], halves["norm.weight"].astype(np.float32))


def test_text_model_prefix_is_read_and_written_and_buffers_are_skipped(params, tensors, abstract):
    prefixed = to_diffusers(params, prefix="text_model.")
    assert set(prefixed) == {f"text_model.{name}" for name in tensors}
    buffers = {"text_model.embeddings.position_ids": np.arange(7)[None], "position_ids": np.ones(1)}
    for source in (prefixed, tensors):
        again = from_diffusers(source | buffers, abstract)
        np.testing.assert_array_equal(again["conv.kernel"], params["conv.kernel"])


def test_old_names_of_vae_attention_are_read():
    params = weights.init(VAE, SMALL_VAE, jax.random.key(0))
    tensors = to_diffusers(params)
    old = {}
    for name, tensor in tensors.items():
        for new, legacy in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                            ("to_out.0", "proj_attn")):  # fmt: skip
            name = name.replace(f".{new}.", f".{legacy}.")
        old[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in old
    again = from_diffusers(old, jax.eval_shape(lambda: params))
    assert all(np.array_equal(again[path], params[path]) for path in params)


# Errors


def test_all_misfits_are_reported_at_once(tensors, abstract):
    del tensors["conv.bias"], tensors["layers.3.weight"]
    tensors["norm.weight"] = np.ones(5, np.float32)
    tensors["layers.0.weight"] = tensors["layers.0.weight"].T
    tensors |= {"extra.weight": np.ones((2, 2)), "layers.11.bias": np.ones(3)}
    with pytest.raises(WeightsError) as error:
        from_diffusers(tensors, abstract)
    assert str(error.value).splitlines()[1:] == [
        "  mis-shaped: layers.0.weight is (2, 3), the model has (3, 2)",
        "  mis-shaped: norm.weight is (5,), the model has (3,)",
        "  missing: conv.bias",
        "  missing: layers.3.weight",
        "  unused: extra.weight (2, 2)",
        "  unused: layers.11.bias (3,)",
    ]


def test_the_same_weight_under_two_names_is_refused(tensors, abstract):
    tensors["text_model.conv.bias"] = tensors["conv.bias"]
    with pytest.raises(WeightsError, match="twice: text_model.conv.bias"):
        from_diffusers(tensors, abstract)


def test_absent_files_are_named(tmp_path):
    with pytest.raises(WeightsError, match="no such weights file: .*absent.safetensors"):
        load_file(tmp_path / "absent.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    save_file({"a": np.ones(2)}, tmp_path / "one.safetensors")
    with pytest.raises(WeightsError, match="no such weights file: .*two.safetensors"):
        load_file(index)


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_truncated_files_are_named(keep, tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="model.safetensors: cannot be read as a whole .*again"):
        load_file(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_indices_are_named(text, tmp_path):
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(WeightsError, match="m.safetensors.index.json: (not JSON|weight_map is)"):
        load_file(path)


@pytest.mark.parametrize(
    "name",
    [
        "../one.safetensors", "/etc/one.safetensors", "sub/one.safetensors", "a\\one.safetensors",
        "..", "", "one.bin", 3, None, ["one.safetensors"], {"a": 1}, "a\0.safetensors",
    ],
)  # fmt: skip
def test_an_index_that_names_more_than_files_beside_it_is_refused(name, tmp_path):
    save_file({"a": np.ones(2)}, tmp_path / "one.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match=r"weight_map\['a'\] is .*; expected the name of a"):
        load_file(index)


def test_a_header_beyond_any_models_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "m.safetensors"
    length = 90_000_000
    with file.open("wb") as opened:
        opened.write(length.to_bytes(8, "little") + b"{")
        opened.truncate(length + 8)
    for read in (load_file, weights.read_header):
        with pytest.raises(WeightsError, match="its header has 90,000,000 bytes; expected at most"):
            read(file)


def test_a_thousand_problems_are_counted(tmp_path):
    with pytest.raises(WeightsError, match="and 901 more$"):
        weights.from_diffusers({f"a{i}": np.ones(1) for i in range(1001)}, {})


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tensors, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(2)}, path)

    def full(arrays, target, metadata):
        target.write_bytes(b"half of i")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(weights, "_save_safetensors", full)
    with pytest.raises(OSError, match="model.safetensors cannot be written: No space left"):
        save_file(tensors, path)
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(load_file(path)["a"], np.ones(2))


def test_saving_into_an_absent_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="cannot be written"):
        save_file({"a": np.ones(2)}, tmp_path / "absent" / "model.safetensors")


def test_a_file_that_was_not_written_is_none(tmp_path):
    with (
        pytest.raises(OSError, match="one.bin cannot be written"),
        paths.writing(tmp_path / "one.bin"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_weights_may_be_read_by_whom_other_files_may(tmp_path, mask):
    """safetensors itself makes files that their owner alone can read."""
    before = os.umask(mask)
    try:
        save_file({"a": np.ones(2)}, tmp_path / "one.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "one.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    assert [file.name for file in tmp_path.iterdir()] == ["one.safetensors"]
