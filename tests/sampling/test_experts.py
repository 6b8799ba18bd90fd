"""Experts by noise level: each step is the expert's whose interval it is in, and no other's."""

import copy
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import sample
from sdjax.checkpoints.experts import read_expert_option, trained_levels
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.workdir import save_workdir
from sdjax.errors import UserError
from sdjax.families.registry import FAMILIES
from sdjax.formats.diffusers_folder import read_diffusers, write_diffusers
from sdjax.sampling.denoising import by_level
from sdjax.sampling.ensemble import Expert, ordered, params_of_experts
from tests.conftest import randomise

PROMPTS = ["a red circle", "a green star"]
NEGATIVE = "a blue square"
NOISE = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
LEVELS = 0.5 + 0.26  # of 255: rounding to 8 bits, and 1e-3 of the range


def drawn(model, output, *options):
    """What `sample` draws, uint8 [2, H, W, 3], or its exit code."""
    np.save(output.parent / "noise.npy", NOISE)
    code = sample.main([
        f"--model={model}", f"--output={output}", "--guidance=4", "--height=16", "--width=16",
        f"--latents={output.parent / 'noise.npy'}", f"--negative_prompt={NEGATIVE}", "--steps=5",
        "--prompts", *PROMPTS, *options,
    ])  # fmt: skip
    if code:
        return code
    return np.stack([np.asarray(Image.open(output / f"0000{i}.png")) for i in range(2)])


@pytest.fixture(scope="module")
def other(torch_pipeline, tmp_path_factory):
    """A pipeline with another UNet and text encoder, and the same VAE; and its folder."""
    parts = {k: copy.deepcopy(v) for k, v in torch_pipeline.components.items()}
    randomise(parts["unet"], 50)
    randomise(parts["text_encoder"], 51)
    pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    folder = tmp_path_factory.mktemp("other") / "model"
    pipeline.save_pretrained(folder)
    return pipeline, folder


def test_each_step_is_that_of_its_expert(torch_pipeline, pipeline_folder, other, tmp_path):
    """A loop written by hand, with diffusers' networks and scheduler."""
    second, folder = other
    scheduler = diffusers.DDIMScheduler.from_config(torch_pipeline.scheduler.config)
    scheduler.set_timesteps(5)
    x, taken = torch.from_numpy(NOISE.transpose(0, 3, 1, 2)), []
    with torch.no_grad():
        for t in scheduler.timesteps:  # 801 601 401 201 1
            noisy = t >= 400
            taken.append(bool(noisy))
            pipeline = second if noisy else torch_pipeline
            text, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True, [NEGATIVE] * 2)
            away, along = (pipeline.unet(x, t, c).sample for c in (negative, text))
            x = scheduler.step(away + 4.0 * (along - away), t, x).prev_sample
        vae = torch_pipeline.vae
        decoded = vae.decode(x / vae.config.scaling_factor).sample
    assert taken == [True, True, True, False, False]
    theirs = (decoded / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)
    assert theirs.std() > 0.05, "too plain to prove much"
    options = [f"--expert={folder}:0.4:1", f"--expert={pipeline_folder}:0:0.4"]
    ours = drawn(pipeline_folder, tmp_path / "out", *options)
    np.testing.assert_allclose(ours.astype(float), theirs * 255, atol=LEVELS)
    assert f"{folder}:0.4:1" in Image.open(tmp_path / "out" / "00000.png").text["experts"]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", pytest.param("ddim", marks=pytest.mark.slow)])
def test_experts_equal_to_the_base_draw_its_pictures_to_the_bit(pipeline_folder, tmp_path, sampler):
    """A solver of several steps goes on over the border between two experts."""
    shutil.copytree(pipeline_folder, tmp_path / "copy")
    options = [f"--sampler={sampler}"]
    base = drawn(pipeline_folder, tmp_path / "base", *options)
    options += [f"--expert={pipeline_folder}:0:0.3", f"--expert={tmp_path / 'copy'}:0.3:0.75"]
    options += [f"--expert={pipeline_folder}:0.75:1"]
    np.testing.assert_array_equal(drawn(pipeline_folder, tmp_path / "out", *options), base)


@pytest.mark.slow
def test_one_expert_draws_its_own_pictures(pipeline_folder, other, tmp_path):
    alone = drawn(other[1], tmp_path / "alone")
    ours = drawn(pipeline_folder, tmp_path / "out", f"--expert={other[1]}:0:1")
    np.testing.assert_array_equal(ours, alone)


@pytest.mark.parametrize("t, expected", [
    (0.0, 0), (249.9, 0), (250.0, 1), (499.0, 1), (500.0, 2), (999.0, 2), (1000.0, 2)
])  # fmt: skip
def test_a_timestep_at_a_border_is_of_the_noisier_interval(t, expected):
    functions = [lambda xt, t, i=i: xt * 0 + i for i in range(3)]
    predict = jax.jit(by_level(functions, [250.0, 500.0]))
    assert float(predict(jnp.ones((1, 1)), jnp.full(1, t))[0, 0]) == expected


@pytest.mark.parametrize("levels, message", [
    ([(0, 0.4), (0.6, 1)], r"no expert is for the noise levels 0.4 to 0.6.*=BASE:0.4:0.6"),
    ([(0.2, 1)], "no expert is for the noise levels 0 to 0.2"),
    ([(0, 0.9)], "no expert is for the noise levels 0.9 to 1"),
    ([(0, 0.6), (0.5, 1)], "two experts are for the noise levels 0.5 to 0.6"),
    ([(0, 1), (0.5, 0.7)], "two experts are for the noise levels 0.5 to"),
])  # fmt: skip
def test_intervals_with_gaps_or_overlaps_are_refused_in_words(levels, message):
    with pytest.raises(UserError, match=message):
        ordered([Expert(f"--expert={i}", None, one) for i, one in enumerate(levels)])


def test_what_experts_share_is_held_once():
    base = {"unet.a": np.zeros(2), "unet.b": np.ones(2), "vae.c": np.ones(3)}
    first, second = {**base, "unet.a": np.ones(2)}, {**base, "vae.c": np.zeros(3)}
    made = params_of_experts(base, [first, second])
    assert made.keys() == {"unet.a", "unet.b", "vae.c", "1:unet.a"}
    both = params_of_experts(base, [first, first])
    assert both.keys() == {"unet.b", "vae.c", "1:unet.a", "2:unet.a"}, "the base predicts nothing"
    wider = {**base, "unet.d": np.ones(1)}
    assert params_of_experts(base, [base, wider]).keys() == {
        "vae.c", *(f"1:{p}" for p in ("unet.a", "unet.b")), "2:unet.a", "2:unet.b", "2:unet.d",
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(pipeline_folder, tmp_path_factory):
    """A workdir whose run trained at the noisier half."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    save_workdir(folder, read_any(pipeline_folder))
    config = json.loads((folder / "config.json").read_text())
    config["objective"]["timestep_min"] = 500
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_interval_of_a_run_is_read_from_it(trained, pipeline_folder, tmp_path):
    assert trained_levels(trained) == (0.5, 1.0)
    assert trained_levels(trained / "checkpoints" / "0") == (0.5, 1.0)
    assert trained_levels(pipeline_folder) is None
    assert read_expert_option(str(trained)) == (str(trained), (0.5, 1.0))
    assert read_expert_option(f"{trained}:0:1") == (str(trained), (0.0, 1.0))
    options = [f"--expert={trained}", f"--expert={pipeline_folder}:0:0.5"]
    ours = drawn(pipeline_folder, tmp_path / "out", *options)
    np.testing.assert_array_equal(ours, drawn(pipeline_folder, tmp_path / "base"))


def test_what_does_not_go_together_is_refused(
    trained, pipeline_folder, xl_folder, tmp_path, capsys
):
    model = read_diffusers(pipeline_folder)
    params = {k: v + 0.5 if "vae.encoder" in k else v for k, v in model.params.items()}
    copy_with = {"params": params, "scheduler": None}
    write_diffusers(tmp_path / "encodes", type(model)(**{**vars(model), **copy_with}))
    v = {"prediction_type": "v_prediction", "scheduler": None}
    write_diffusers(tmp_path / "v", type(model)(**{**vars(model), **v}))
    base = f"--expert={pipeline_folder}:0:0.5"
    assert model.family is FAMILIES["sd"]
    cases = [
        ([f"--expert={pipeline_folder}"], "does not say for which noise levels it is"),
        ([f"--expert={pipeline_folder}:0.5:0.2"], "ends in no interval"),
        ([base, f"--expert={xl_folder}:0.5:1"], "its family is sdxl, not sd"),
        ([base, f"--expert={tmp_path / 'v'}:0.5:1"], "prediction_type is v_prediction"),
        ([base, f"--expert={tmp_path / 'encodes'}:0.5:1"], "its VAE encodes pictures otherwise"),
        ([base], "no expert is for the noise levels 0.5 to 1"),
        ([base, f"--expert={trained}", "--explain"], "--explain shows the attention of one"),
        ([base, f"--expert={trained}", f"--model={trained}"], "--expert does not go with a second"),
        ([base, f"--expert={trained}", "--interpolate=2"], "--interpolate does not go with"),
    ]
    for options, words in cases:
        assert np.all(drawn(pipeline_folder, tmp_path / "out", *options) == 2), words
        assert words in capsys.readouterr().err, words
