"""Means of models against numpy on the written files, and loaded by diffusers."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdjax.checkpoints import averages
from sdjax.checkpoints.checkpoint import Checkpoints
from sdjax.config import Config, to_dict
from sdjax.convert import convert, main
from sdjax.data.text.tokenizer import Tokenizer
from sdjax.errors import UserError
from sdjax.formats.diffusers_folder import read_diffusers
from sdjax.formats.folders import ModelError
from sdjax.optim import ema

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(pipeline_folder, tmp_path_factory):
    """The workdir of a run that trained the UNet: three checkpoints, one average, snapshots."""
    read = read_diffusers(pipeline_folder)
    folder = tmp_path_factory.mktemp("averages") / "run"
    default = Config()
    config = dataclasses.replace(
        default,
        model=dataclasses.replace(default.model, **read.networks),
        ema=dataclasses.replace(default.ema, profiles=("power-0.05", "power-0.1")),
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    read.tokenizers["tokens"].save(folder / "tokenizer")
    from sdjax.models import weights

    trained = {k: v for k, v in read.params.items() if k.startswith("unet.")}
    weights.save_file(
        {k: v for k, v in read.params.items() if k not in trained}, folder / "frozen.safetensors"
    )
    rng = np.random.default_rng(0)

    def noisy():
        return {k: v + rng.normal(size=v.shape).astype(np.float32) for k, v in trained.items()}

    with Checkpoints(folder, keep_last=3) as checkpoints:
        for step in (10, 20, 30):
            averaged = {"power-0.05": noisy(), "power-0.1": noisy()}
            state = {"params": noisy(), "ema": averaged, "step": np.int32(step)}
            checkpoints.save(step, state, {}, to_dict(config))
            ema.save_snapshots(folder, step, averaged)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """{step: its checkpoint as a diffusers folder}"""
    folder = tmp_path_factory.mktemp("exported")
    for step in (10, 20, 30):
        convert(run, folder / str(step), step=step)
    return {step: folder / str(step) for step in (10, 20, 30)}


def assert_mean(folder, of, weights=None):
    files = [load_file(one / UNET) for one in of]
    ours = load_file(folder / UNET)
    assert ours.keys() == files[0].keys()
    for key, value in ours.items():
        stacked = np.stack([file[key] for file in files]).astype(np.float64)
        want = np.average(stacked, axis=0, weights=weights).astype(np.float32)
        # Both are float64 sums in some order, rounded once: at most the last bit differs.
        np.testing.assert_allclose(value, want, rtol=2e-7, atol=1e-12, err_msg=key)
    frozen, before = load_file(folder / VAE), load_file(of[0] / VAE)
    assert all(np.array_equal(frozen[key], before[key]) for key in before)


def test_checkpoints_of_a_run(run, exported, tmp_path):
    lines = convert(run, tmp_path / "last", average=["last:2"])
    assert "the mean of step 20 of" in lines[0]
    assert_mean(tmp_path / "last", [exported[20], exported[30]])
    convert(run, tmp_path / "all", average=["10", "20", "30"], average_weights=[1, 2, 5])
    assert_mean(tmp_path / "all", list(exported.values()), weights=[1, 2, 5])


def test_folders_and_raw_weights(run, exported, tmp_path):
    models = [str(run / "checkpoints" / "10"), str(exported[30])]
    code = main([f"--output={tmp_path / 'soup'}", "--average", *models, "--to=diffusers"])
    assert code == 0
    assert_mean(tmp_path / "soup", [exported[10], exported[30]])
    for step in (10, 20):
        convert(run, tmp_path / f"raw{step}", weights="raw", step=step)
    convert(run, tmp_path / "raw", average=["10", "20"], weights="raw")
    assert_mean(tmp_path / "raw", [tmp_path / "raw10", tmp_path / "raw20"])
    convert(None, tmp_path / "workdir", average=models, to="workdir")
    convert(tmp_path / "workdir", tmp_path / "back")
    assert (tmp_path / "back" / UNET).read_bytes() == (tmp_path / "soup" / UNET).read_bytes()


def test_equal_models_are_their_own_mean_to_the_bit(exported, tmp_path):
    copies = [tmp_path / "b", tmp_path / "c"]
    for copy in copies:
        shutil.copytree(exported[10], copy)
    convert(None, tmp_path / "mean", average=[str(exported[10]), *map(str, copies)], to="diffusers")
    ours, theirs = load_file(tmp_path / "mean" / UNET), load_file(exported[10] / UNET)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def test_the_mean_loads_in_diffusers(run, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    convert(run, tmp_path / "mean", average=["last:3"])
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "mean")
    ours = load_file(tmp_path / "mean" / UNET)
    for key, value in pipeline.unet.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), ours[key])


def test_another_length_of_average(run, exported, tmp_path):
    # The snapshot of step 20 outlives its checkpoint.
    target = tmp_path / "run-ema-0.07"
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    arguments = [f"--input={tmp_path / 'run'}", f"--output={target}", "--ema_length=0.07"]
    assert main([*arguments, "--step=20"]) == 0
    ours = load_file(target / UNET)
    used = [s for s in ema.list_snapshots(run) if s.step <= 20]
    shares = ema.posthoc_weights([s.step for s in used], [s.sigma_rel for s in used], 20, 0.07)
    files = {s: load_file(s.source) for s in used}
    path = "unet.conv_in.bias"
    want = sum(w * files[s][path].astype(np.float64) for w, s in zip(shares, used, strict=True))
    np.testing.assert_allclose(ours["conv_in.bias"], want, rtol=2e-7)
    assert (target / VAE).read_bytes() == (exported[10] / VAE).read_bytes()
    # A width that was tracked is its snapshot.
    convert(run, tmp_path / "tracked", ema_length=0.05, step=30)
    tracked, direct = load_file(tmp_path / "tracked" / UNET), load_file(exported[30] / UNET)
    np.testing.assert_allclose(tracked["conv_in.bias"], direct["conv_in.bias"], rtol=1e-5)


def test_snapshots_of_a_part_of_the_model_or_with_nan_are_refused(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    out = tmp_path / "out"
    files = sorted((folder / "ema_snapshots").iterdir())
    assert len(files) == 6
    for file in files:
        params = load_file(file)
        dropped = params.pop("unet.conv_in.bias")
        save_file(params, file)
    with pytest.raises(ModelError, match=r"lack 1 of the \d+ .*as unet.conv_in.bias"):
        convert(folder, out, ema_length=0.07)
    save_file({**params, "unet.conv_in.bias": dropped}, files[-1])
    with pytest.raises(UserError, match="different models: unet.conv_in.bias is not in the one"):
        convert(folder, out, ema_length=0.07)
    save_file({**params, "unet.conv_in.bias": dropped * np.nan}, files[-1])
    with pytest.raises(UserError, match=f"{files[-1]}: (?s:.)*unet.conv_in.bias: 16 NaN"):
        convert(folder, out, ema_length=0.07)
    assert not out.exists()


def test_impossible_means_are_explained(run, exported, tmp_path):
    out = tmp_path / "out"
    cases = [
        (run, ["last:4"], {}, r"has 3 checkpoints, of steps 10, 20, 30"),
        (run, ["10", "15"], {}, "no checkpoint of step 15; it has those of steps 10, 20, 30"),
        (run, ["10"], {}, "two models or more"),
        (run, ["10", "10"], {}, "twice"),
        (run, ["10", str(exported[10])], {}, "10 is a step and .* is none"),
        (None, ["10", "20"], {}, "takes the run as --input"),
        (run, [str(exported[10]), str(exported[20])], {}, "leave out --input"),
        (run, ["last:2"], {"average_weights": [1.0]}, "1 weights for 2 models"),
        (run, ["last:2"], {"average_weights": [1.0, -1.0]}, "sum above 0"),
        (run, ["last:2"], {"step": 10}, "--step=10 does not go with --average"),
        (run, None, {"average_weights": [1.0, 1.0]}, "is for --average"),
        (run, None, {"ema_length": 0.4}, "--ema_length=0.4.*between 0 and 0.2887"),
        (run, None, {"ema_length": 0.1, "weights": "raw"}, "--weights=raw does not go with"),
        (exported[10], None, {"ema_length": 0.1}, "is for a workdir"),
        (None, None, {}, "--input is missing"),
    ]
    for source, average, more, message in cases:
        with pytest.raises(ModelError, match=message):
            convert(source, out, average=average, **more)
    assert not out.exists()


def test_what_differs_is_named(exported, xl_folder, tmp_path):
    with pytest.raises(ModelError, match=r"unet\.block_out_channels: (?s:.)*and \d+ more"):
        convert(None, tmp_path / "out", average=[str(exported[10]), str(xl_folder)])
    a = read_diffusers(exported[10])
    short = dict(a.params)
    dropped = short.pop("unet.conv_in.bias")
    b = dataclasses.replace(a, params={**short, "unet.conv_out.bias": dropped}, prediction_type="v")
    assert averages.differences(a, a) == []
    assert averages.differences(a, b) == [
        "prediction_type: epsilon and v",
        "unet.conv_in.bias: only one of them has it",
        f"unet.conv_out.bias: shapes {a.params['unet.conv_out.bias'].shape} and {dropped.shape}",
    ]
    other = Tokenizer.train(["another vocabulary"] * 4, 540, context_length=16)
    b = dataclasses.replace(a, tokenizers={"tokens": other})
    assert "tokenizer: another" in averages.differences(a, b)[0]
