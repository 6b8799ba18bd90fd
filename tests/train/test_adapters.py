"""Whole runs of adapters: killed and resumed to the bit, drawn from, written for others."""

import json
import signal

import jax
import numpy as np
import pytest
import torch

from sdjax import convert
from sdjax.checkpoints.adapters import with_loras
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.workdir import read_adapter_run
from sdjax.config import resolve
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.conditioning import make_conditioner
from sdjax.formats.adapters.merging import merged
from sdjax.formats.adapters.reading import read_adapter
from sdjax.models.adapters.networks import MARK
from sdjax.models.weights import load_file
from sdjax.train import loop
from tests.conftest import make_tiny_config
from tests.train.test_loop import assert_same_run, final_state, rows, start, wait_for_step


def train(config, folder):
    return loop.run(resolve(config), str(folder))


@pytest.fixture(scope="module")
def base(tiny_vae, shapes_dir, tmp_path_factory):
    """A workdir of a whole model, to start adapters from."""
    config = make_tiny_config(tiny_vae, shapes_dir)
    config.train.update(steps=2, checkpoint_every=2, export=True)
    folder = tmp_path_factory.mktemp("base") / "run"
    assert train(config, folder) == loop.DONE
    return folder


@pytest.fixture
def config(tiny_vae, shapes_dir, base):
    return adapters_config(tiny_vae, shapes_dir, base)


def adapters_config(tiny_vae, shapes_dir, base, **method):
    c = make_tiny_config(tiny_vae, shapes_dir)
    c.vae_from, c.init_from = "", str(base / "diffusers")
    c.method = {
        "name": "adapters", "rank": 4, "alpha": 2.0, "targets": ("all",),
        "text_targets": ("transformer",), "dropout": 0.1, "module_dropout": 0.1, **method,
    }  # fmt: skip
    c.optim.learning_rate = 1e-2
    c.train.update(steps=6, checkpoint_every=3, export=True)
    return c


@pytest.fixture(scope="module")
def reference(tiny_vae, shapes_dir, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "shapes"
    assert train(adapters_config(tiny_vae, shapes_dir, base), folder) == loop.DONE
    return folder


def test_resume_after_sigkill_is_bit_exact(reference, config, tmp_path):
    folder = tmp_path / "shapes"
    process = start(config, folder)
    wait_for_step(process, folder, 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert train(config, folder) == loop.DONE
    assert_same_run(reference, folder)


def test_a_workdir_holds_factors_and_no_copy_of_the_base(reference):
    _, state, _ = final_state(reference)
    names = [name for name in state if "params" in name]
    assert names and all(MARK in name for name in names)
    assert not (reference / "frozen.safetensors").exists()
    assert not (reference / "diffusers").exists()
    files = sorted(file.name for file in (reference / "adapter").iterdir())
    assert files == ["pytorch_lora_weights.safetensors", "shapes.safetensors"]
    whole = json.loads((reference / "frozen.json").read_text())
    assert set(whole) == {"unet", "vae", "text_encoder"}


def test_first_loss_is_that_of_the_base(reference, config, tmp_path):
    """Adapters begin as nothing, whatever is dropped."""
    config.method = {"name": "denoise"}
    config.train.update(steps=1, export=False)
    assert train(config, tmp_path) == loop.DONE
    assert rows(tmp_path)[1]["train/loss"] == rows(reference)[1]["train/loss"]


def test_every_adapter_has_moved(reference):
    _, adapter = read_adapter_run(reference, "raw", None)
    assert {path.split(".")[0] for path in adapter} == {"unet", "text_encoder"}
    # The last layer of a text encoder and what follows it is read, so nothing stays at zero.
    for path, layer in adapter.items():
        assert np.any(layer.factors["lora_up"]), path
        assert layer.scale == 0.5


def test_a_workdir_reads_as_the_base_with_its_adapter_added(reference, base):
    """Drawing by the workdir, by the base with the run's adapter, and by its files is the same."""
    read = read_any(reference)
    plain = read_any(base / "diffusers")
    assert not read.changes and set(read.params) == set(plain.params)
    _, adapter = read_adapter_run(reference, "ema", None)
    for how in (
        adapter,
        read_adapter(reference / "adapter", plain),
        read_adapter(reference / "adapter" / "shapes.safetensors", plain),
    ):
        other = merged(plain, [(how, 1.0)])
        for path, value in read.params.items():
            np.testing.assert_allclose(other.params[path], value, atol=1e-6, err_msg=path)
    moved = [path for path, value in plain.params.items() if np.any(value != read.params[path])]
    assert len(moved) == len(adapter)
    assert all(path.endswith(".kernel") and not path.startswith("vae") for path in moved)


def test_diffusers_loads_both_files_and_predicts_the_same(reference, base):
    from diffusers import StableDiffusionPipeline

    read = read_any(reference)
    ours = _noise(read)
    for name in ("pytorch_lora_weights.safetensors", "shapes.safetensors"):
        pipeline = StableDiffusionPipeline.from_pretrained(base / "diffusers", safety_checker=None)
        before = _torch_noise(pipeline)
        pipeline.load_lora_weights(reference / "adapter", weight_name=name)
        theirs = _torch_noise(pipeline)
        assert np.abs(before - ours).max() > 10 * np.abs(theirs - ours).max()
        np.testing.assert_allclose(theirs, ours, atol=2e-5 * np.abs(ours).max())


TOKENS = np.arange(3, 27)[None]


def _noise(model):
    params = {path: jax.numpy.asarray(value) for path, value in model.params.items()}
    field = model.family.parts["text_encoder"].tokens
    context = make_conditioner(model, model.tokenizers)(params, {field: TOKENS}, target=(16, 16))
    unet = bind(model).module("unet", params)
    x = jax.numpy.asarray(np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 8, 8, 4))
    return np.asarray(unet(x, jax.numpy.asarray([300.0]), context))


@torch.no_grad()
def _torch_noise(pipeline):
    states = pipeline.text_encoder(torch.tensor(TOKENS))[0]
    x = np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 8, 8, 4).transpose(0, 3, 1, 2)
    out = pipeline.unet(torch.tensor(x), torch.tensor([300.0]), states).sample
    return out.numpy().transpose(0, 2, 3, 1)


def test_kohyas_metadata_says_how_it_was_trained(reference):
    from safetensors import safe_open

    with safe_open(reference / "adapter" / "shapes.safetensors", framework="numpy") as file:
        found = file.metadata()
    assert found["ss_output_name"] == "shapes" and found["ss_network_module"] == "networks.lora"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "2.0")
    assert found["ss_learning_rate"] == "0.01" and found["ss_max_train_steps"] == "6"
    assert found["modelspec.architecture"].endswith("/lora")


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_other_kinds_train_and_read_back(kind, config, base, tmp_path):
    dropped = {} if kind == "dora" else {"dropout": 0.0}
    config.method.update(kind=kind, factor=4, targets=("attention",), text_targets=(), **dropped)
    config.train.update(steps=2)
    assert train(config, tmp_path / "run") == loop.DONE
    read, plain = read_any(tmp_path / "run"), read_any(base / "diffusers")
    file = tmp_path / "run" / "adapter" / "run.safetensors"
    other = merged(plain, [(read_adapter(file, plain), 1.0)])
    for path, value in read.params.items():
        np.testing.assert_allclose(other.params[path], value, atol=2e-6, err_msg=path)
    exists = (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").exists()
    assert exists == (kind == "dora")
    assert load_file(file)


def test_a_run_may_begin_with_the_result_of_another(reference, config, tmp_path):
    """Its networks are nowhere as they are read: they are copied."""
    config.init_from = str(reference)
    config.train.update(steps=1, export=False)
    assert train(config, tmp_path) == loop.DONE
    assert (tmp_path / "frozen.safetensors").exists()
    first, second = read_any(reference), read_any(tmp_path, weights="raw")
    assert np.any(first.params["unet.conv_in.kernel"] != second.params["unet.conv_in.kernel"])
    np.testing.assert_array_equal(
        first.params["unet.time_embedding.linear_1.bias"],
        second.params["unet.time_embedding.linear_1.bias"],
    )


def test_without_a_model_to_start_from_the_error_says_so(config, tmp_path):
    config.init_from = ""
    with pytest.raises(UserError, match="the .* has no weights and .* set config.init_from"):
        train(config, tmp_path)


def test_verbs_take_the_workdir_for_its_adapter(reference, base, tmp_path):
    file = tmp_path / "raw.safetensors"
    options = [f"--input={reference}", f"--output={file}", "--format=kohya", "--weights=raw"]
    assert convert.main(options) == 0
    plain = read_any(base / "diffusers")
    _, raw = read_adapter_run(reference, "raw", None)
    for how, adapter in ((f"{file}:0.5", raw), (f"{reference}:0.5", None)):
        adapter = adapter or read_adapter_run(reference, "ema", None)[1]
        found, expected = with_loras(plain, [how]), merged(plain, [(adapter, 0.5)])
        for path, value in expected.params.items():
            np.testing.assert_allclose(found.params[path], value, atol=1e-7, err_msg=path)
    with pytest.raises(UserError, match="trains no adapter"):
        with_loras(plain, [str(base)])
