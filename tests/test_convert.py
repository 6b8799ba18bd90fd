"""Conversion there and back: the same bits, the right weights, and errors that say the remedy."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from sdjax.checkpoints.checkpoint import CheckpointError, Checkpoints, restore_params
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.workdir import read_workdir
from sdjax.config import Config, resolve, to_dict
from sdjax.convert import convert, main
from sdjax.formats.diffusers_folder import read_diffusers
from sdjax.formats.folders import ModelError
from sdjax.models import weights
from tests.odd_names import ODD

NETWORKS = ("unet", "vae", "text_encoder")
FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose name is taken for no pattern, URL or word of a shell."""
    (tmp_path / ODD).mkdir()
    return tmp_path / ODD


@pytest.fixture(scope="module")
def workdir(pipeline_folder, tmp_path_factory):
    """The pipeline as a workdir. Do not write into it."""
    folder = tmp_path_factory.mktemp("convert") / ODD
    convert(pipeline_folder, folder)
    return folder


@pytest.fixture(scope="module")
def run(pipeline_folder, tmp_path_factory):
    """The workdir of a run that trained the UNet, kept two averages and saved twice."""
    read = read_diffusers(pipeline_folder)
    folder = tmp_path_factory.mktemp("run") / ODD
    default = Config()
    config = dataclasses.replace(
        default,
        model=dataclasses.replace(default.model, **read.networks),
        ema=dataclasses.replace(default.ema, profiles=("0.9", "0.99")),
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    read.tokenizers["tokens"].save(folder / "tokenizer")
    trained = {k: v for k, v in read.params.items() if k.startswith("unet.")}
    frozen = {k: v for k, v in read.params.items() if k not in trained}
    weights.save_file(frozen, folder / "frozen.safetensors")
    with Checkpoints(folder, keep_last=2) as checkpoints:
        for step in (1, 2):
            state = {
                "params": {k: v + step for k, v in trained.items()},
                "ema": {
                    "0.9": {k: v + 10 * step for k, v in trained.items()},
                    "0.99": {k: v + 100 * step for k, v in trained.items()},
                },
                "opt_state": {"mu": np.zeros(3, np.float32)},
                "step": np.int32(step),
            }
            checkpoints.save(step, state, {}, to_dict(config))
    return folder


def assert_same_weights(a, b):
    for name in NETWORKS:
        ours, theirs = (weights.load_file(folder / name / FILES[name]) for folder in (a, b))
        theirs = {_with_prefix(name, key): value for key, value in theirs.items()}
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype and np.array_equal(ours[key], value), key


def _with_prefix(name, key):
    """transformers 5 writes the text encoder without it, 4 with it."""
    return f"text_model.{key.removeprefix('text_model.')}" if name == "text_encoder" else key


def test_there_and_back_gives_the_same_bits(pipeline_folder, workdir, tmp_path):
    convert(workdir, tmp_path / "back")
    assert_same_weights(tmp_path / "back", pipeline_folder)
    before, after = read_diffusers(pipeline_folder), read_diffusers(tmp_path / "back")
    assert sorted(before.networks) == sorted(name for name in NETWORKS if name in after.networks)
    for field in ("networks", "schedule", "prediction_type", "sampler", "settings"):
        assert getattr(before, field) == getattr(after, field), field
    captions = ["a red circle", "A  Blue Square!", "日本"]
    np.testing.assert_array_equal(
        before.tokenizers["tokens"].encode(captions), after.tokenizers["tokens"].encode(captions)
    )
    convert(tmp_path / "back", tmp_path / "workdir")
    convert(tmp_path / "workdir", tmp_path / "again")
    files = [p.relative_to(tmp_path / "back") for p in (tmp_path / "back").rglob("*.*")]
    assert len(files) >= 9
    for file in files:
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_converted_workdir_is_a_workdir(pipeline_folder, workdir):
    config = resolve(json.loads((workdir / "config.json").read_text()))
    read = read_diffusers(pipeline_folder)
    assert config.method.name == "denoise" and config.model.unet == read.denoiser
    assert config.schedule == read.schedule and config.ema.profiles == ()
    again = read_any(workdir)
    assert again.params.keys() == read.params.keys()
    for path, value in read.params.items():
        np.testing.assert_array_equal(again.params[path], value)
    assert read_any(workdir / "checkpoints" / "0").denoiser == read.denoiser
    vae = read_any(workdir, components=("vae",))
    assert list(vae.networks) == ["vae"] and not vae.tokenizers and vae.schedule is None
    assert all(path.startswith("vae.") for path in vae.params)


@pytest.mark.parametrize("asked, shift", [("ema", 20), ("raw", 2), ("0.9", 20), ("0.99", 200)])
def test_weights_of_a_run_are_chosen(run, pipeline_folder, tmp_path, asked, shift):
    convert(run, tmp_path / "out", weights=asked)
    before, after = read_diffusers(pipeline_folder), read_diffusers(tmp_path / "out")
    for path, value in before.params.items():
        expected = value + np.float32(shift) if path.startswith("unet.") else value
        np.testing.assert_array_equal(after.params[path], expected, err_msg=path)


def test_an_earlier_step_can_be_read(run, pipeline_folder):
    exact = read_diffusers(pipeline_folder).params["unet.conv_in.bias"]
    raw, average = read_workdir(run, weights="raw", step=1), read_any(run / "checkpoints" / "1")
    np.testing.assert_array_equal(raw.params["unet.conv_in.bias"], exact + np.float32(1))
    np.testing.assert_array_equal(average.params["unet.conv_in.bias"], exact + np.float32(10))
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        read_workdir(run, step=7)


def test_unknown_weights_are_named(run):
    with pytest.raises(ModelError, match="'0.5'; the run in .* has: ema, raw, 0.9, 0.99"):
        read_workdir(run, weights="0.5")


def test_average_within_the_optimizer_is_not_mistaken_for_the_parameters(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["optim"]["name"], config["ema"]["profiles"] = "schedule_free", []
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("checkpoints", "tokenizer", "frozen.safetensors"):
        (tmp_path / name).symlink_to(run / name)
    with pytest.raises(ModelError, match="schedule_free.*weights 'raw'"):
        read_workdir(tmp_path)
    assert read_workdir(tmp_path, weights="raw").params


def test_vae_alone(pipeline_folder, tmp_path):
    convert(pipeline_folder / "vae", tmp_path / "workdir")
    config = resolve(json.loads((tmp_path / "workdir" / "config.json").read_text()))
    assert config.method.name == "autoencoder"
    convert(tmp_path / "workdir", tmp_path / "back")
    ours = weights.load_file(tmp_path / "back" / FILES["vae"])
    theirs = weights.load_file(pipeline_folder / "vae" / FILES["vae"])
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    with pytest.raises(ModelError, match="a VAE or a whole pipeline; vae, .* missing"):
        convert(pipeline_folder / "unet", tmp_path / "unet")


def test_half_precision(workdir, tmp_path):
    convert(workdir, tmp_path / "out", dtype="bfloat16")
    tensors = weights.load_file(tmp_path / "out" / "unet" / FILES["unet"])
    assert {str(value.dtype) for value in tensors.values()} == {"bfloat16"}


def test_output_is_not_overwritten_without_force(workdir, pipeline_folder, tmp_path):
    (tmp_path / "out").mkdir()
    convert(workdir, tmp_path / "out")
    with pytest.raises(ModelError, match="not empty.*--force"):
        convert(workdir, tmp_path / "out")
    convert(workdir, tmp_path / "out", force=True)
    assert_same_weights(tmp_path / "out", pipeline_folder)


def test_impossible_requests_are_explained(workdir, pipeline_folder, tmp_path):
    for target in (workdir, workdir.parent):
        with pytest.raises(ModelError, match="is --input, or holds it"):
            convert(workdir, target, force=True)
    with pytest.raises(ModelError, match="--dtype=float16.*holds float32"):
        convert(pipeline_folder, tmp_path / "out", dtype="float16")
    with pytest.raises(ModelError, match="no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_workdir_with_other_parameters_is_explained(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["model"]["unet"]["block_out_channels"] = [16, 64]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    (tmp_path / "tokenizer").symlink_to(run / "tokenizer")
    with pytest.raises(ModelError) as caught:
        read_workdir(tmp_path)
    message = str(caught.value)
    assert "mis-shaped: unet.conv_norm_out" not in message
    for kind in ("mis-shaped: unet.mid_block", "missing: vae.", "missing: text_encoder."):
        assert kind in message
    (tmp_path / "config.json").write_text(json.dumps({**config, "oops": 1}))
    with pytest.raises(ModelError, match=r"config.json: (?s:.)*config.oops"):
        read_workdir(tmp_path)


def test_workdir_with_weights_that_are_not_finite_is_refused(run, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    frozen = weights.load_file(folder / "frozen.safetensors")
    name = "vae.encoder.conv_in.kernel"
    bad = frozen | {name: np.full_like(frozen[name], np.nan)}
    weights.save_file(bad, folder / "frozen.safetensors")
    out = tmp_path / "out"
    assert main([f"--input={folder}", f"--output={out}"]) == 2
    error = capsys.readouterr().err
    assert f"error: {folder / 'frozen.safetensors'}: 1 of " in error
    assert f"{name}: {bad[name].size:,} NaN among" in error and not out.exists()
    assert "unet" in read_workdir(folder, components=("unet",)).networks

    def restored(*args):
        params = restore_params(*args)
        return params | {"unet.conv_in.bias": np.full_like(params["unet.conv_in.bias"], np.inf)}

    weights.save_file(frozen, folder / "frozen.safetensors")
    monkeypatch.setattr("sdjax.checkpoints.workdir.restore_params", restored)
    with pytest.raises(ModelError) as caught:
        read_workdir(folder)
    assert f"{folder / 'checkpoints' / '2'}: 1 of " in str(caught.value)
    assert "unet.conv_in.bias: 16 Inf among 16 values" in str(caught.value)
    with pytest.raises(ModelError, match=r"checkpoints/1: 1 of (?s:.)*other --weights may do"):
        convert(None, out, average=[str(folder / "checkpoints" / str(s)) for s in (1, 2)])


def command(*arguments):
    # libtpu, which the tests of plans need, has a word to say on machines without a TPU.
    return subprocess.run(
        [sys.executable, "-m", "sdjax.convert", *arguments], capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_the_command(pipeline_folder, tmp_path):
    done = command(f"--input={pipeline_folder}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "vae: force_upcast" in done.stdout and not done.stderr.strip()
    assert f"--config.init_from={tmp_path / 'out'}" in shlex.split(done.stdout.splitlines()[-1])
    done = command(f"--input={tmp_path}", f"--output={tmp_path / 'new'}")
    assert done.returncode == 2 and "neither a diffusers folder" in done.stderr
    assert "Traceback" not in done.stderr
