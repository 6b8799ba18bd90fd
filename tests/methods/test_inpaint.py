"""Inpainting: a UNet is given five channels, learns them, resumes, and diffusers draws with it."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import main
from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.widening import widened
from sdjax.config import default, resolve
from sdjax.config_model import blank_method, method_of_run
from sdjax.convert import convert
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.formats.diffusers_folder import write_diffusers
from sdjax.formats.single_file_writer import write_single_file
from sdjax.methods import inpaint
from sdjax.train import loop
from tests.methods.runs import begun_from, broken_off, to_torch
from tests.train.test_loop import assert_same_run


@pytest.fixture
def config(tiny_config, tiny_model):
    return begun_from(tiny_config, tiny_model, "inpaint")


@pytest.mark.parametrize("folder", ["pipeline_folder", "xl_folder"])
def test_a_widened_unet_begins_as_it_was_whatever_its_new_channels_hold(folder, request):
    """FT-55; diffusers' UNet of four channels is the reference."""
    model = read_any(request.getfixturevalue(folder))
    wide, note = widened(model, "inpaint", name="init_from=DIR")
    assert wide.networks["unet"].in_channels == 9
    assert note == "init_from=DIR: unet.conv_in is given 5 channels of zeros beside 4"
    rng = np.random.default_rng(0)
    xt, beside = rng.normal(size=(2, 8, 8, 4)), rng.normal(size=(2, 8, 8, 5))
    kernel = wide.params["unet.conv_in.kernel"]
    assert kernel.shape == (3, 3, 9, 16) and not kernel[:, :, 4:].any()
    for path, value in model.params.items():
        if path != "unet.conv_in.kernel":
            assert value is wide.params[path], path
    unet = request.getfixturevalue(f"torch{'_xl' if 'xl' in folder else ''}_pipeline").unet
    with torch.no_grad():
        theirs = unet.conv_in(to_torch(xt)).numpy()
    bound = bind(wide, ("unet",)).module("unet", wide.params)
    ours = bound.conv_in(jnp.concatenate([xt, beside], axis=-1).astype(jnp.float32))
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), theirs, atol=2e-5)
    again, nothing = widened(wide, "inpaint", name="x")
    assert again is wide and nothing == ""
    with pytest.raises(UserError, match="in_channels 9, for another task; expected 4"):
        widened(wide, "edit", name="x")


def test_the_channels_are_those_that_the_pipeline_makes(torch_pipeline, pipeline_folder):
    """FT-55: the order mask, masked latents; the nearest pixel; zeros under a whole mask."""
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    masks = (rng.uniform(size=(3, 16, 16, 1)) < 0.5).astype(np.float32)
    masks[2] = 1.0
    model = read_any(pipeline_folder)
    ours = np.asarray(inpaint.beside(bind(model, ("vae",)), model.params, images, masks))
    vae = torch_pipeline.vae
    with torch.no_grad():
        small = torch.nn.functional.interpolate(to_torch(masks), size=(8, 8))  # of the pipeline
        hidden = to_torch(images) * (to_torch(masks) < 0.5)
        mode = vae.encode(hidden).latent_dist.mode() * vae.config.scaling_factor
        grey = vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mode() * vae.config.scaling_factor
    theirs = torch.cat([small, mode], dim=1).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    np.testing.assert_allclose(ours[2, ..., 1:], grey[0].permute(1, 2, 0), atol=2e-5)
    np.testing.assert_array_equal(ours[..., :1], masks[:, ::2, ::2])


def test_masks_of_the_data_are_taken_and_a_quarter_covers_the_whole_picture():
    task = inpaint.Inpainting(inpaint.InpaintConfig())
    keys = jax.random.split(jax.random.key(3), 400)
    own = jnp.zeros((400, 4, 4, 1)).at[:, 0].set(0.5)
    made = np.asarray(task.masks({"image": jnp.zeros((400, 4, 4, 3)), "mask": own}, keys))
    whole = made.all(axis=(1, 2, 3))
    assert abs(whole.mean() - 0.25) < 0.06
    np.testing.assert_array_equal(made[~whole], np.asarray(own[~whole] >= 0.5))


def test_a_run_resumes_to_the_bit_and_diffusers_draws_with_it(config, tmp_path, capsys):
    config.train.update(steps=2, checkpoint_every=1, sample_every=2, export=True)
    config.sample.update(count=2, prompts=("a red circle", "a blue square", "a star"))
    config.validation.update(examples=4, metrics=("outside_error",), num_samples=4)
    whole = tmp_path / "whole"
    assert main.train(resolve(config), str(whole)) == loop.DONE
    said = capsys.readouterr().out
    assert "unet.conv_in is given 5 channels of zeros beside 4" in said
    assert "--init_image=FILE --mask_image=FILE" in said
    broken = broken_off(whole, tmp_path / "broken", 1)
    assert main.train(resolve(config), str(broken)) == loop.DONE
    assert_same_run(whole, broken)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    judged = [
        line["evaluation/outside_error"] for line in lines if "evaluation/outside_error" in line
    ]
    assert judged and 0 < judged[-1] < 1
    shown = Image.open(whole / "samples" / "strip.png")
    assert shown.height >= 3 * 16 and (whole / "samples" / "00000002.png").exists()

    pipeline = diffusers.StableDiffusionInpaintPipeline.from_pretrained(whole / "diffusers")
    assert pipeline.unet.config.in_channels == 9
    kernel = pipeline.unet.conv_in.weight.detach().numpy()
    assert np.abs(kernel[:, 4:]).max() > 0  # it has begun to read them
    with torch.no_grad():
        made = pipeline(
            "a red circle", image=Image.new("RGB", (16, 16)), height=16, width=16,
            mask_image=Image.new("L", (16, 16), 255), num_inference_steps=2, output_type="np",
        ).images  # fmt: skip
    assert np.isfinite(made).all()


@pytest.mark.parametrize("kind", ["diffusers", "single_file"])
def test_a_model_of_nine_channels_is_trained_as_it_is(kind, config, pipeline_folder, tmp_path):
    wide, _ = widened(read_any(pipeline_folder), "inpaint", name="x")
    rng = np.random.default_rng(0)
    params = {**wide.params, "unet.conv_in.kernel": rng.normal(size=(3, 3, 9, 16))}
    wide = dataclasses.replace(wide, params={k: np.float32(v) for k, v in params.items()})
    place = tmp_path / ("model.safetensors" if kind == "single_file" else "model")
    write = write_single_file if kind == "single_file" else write_diffusers
    write(place, wide)
    if kind == "single_file":  # which has no tokenizer
        convert(place, tmp_path / "folder", tokenizer=str(pipeline_folder))
        place = tmp_path / "folder"
    config.init_from = str(place)
    assembled = assemble(resolve(config))
    assert assembled.config.model.unet.in_channels == 9
    np.testing.assert_array_equal(
        assembled.params["unet.conv_in.kernel"], params["unet.conv_in.kernel"].astype(np.float32)
    )
    assert not any("channels of zeros" in note for note in assembled.notes)
    method_of_run(assembled.config, assembled.tokenizers)
    config.method.name = "denoise"
    with pytest.raises(UserError, match="'denoise' takes 4; method.name=inpaint, or inpaint_adap"):
        other = assemble(resolve(default_like(config)))
        method_of_run(other.config, other.tokenizers)


def default_like(config):
    c = default()
    c.update(init_from=config.init_from, data=config.data)
    return c


def test_what_is_frozen_of_a_widened_unet_is_copied_and_other_networks_are_referred_to(config):
    assert sorted(assemble(resolve(config)).sources) == ["text_encoder", "vae"]


def test_what_does_not_fit_is_refused(config):
    assembled = assemble(resolve(config))
    own, tokenizers = assembled.config, assembled.tokenizers
    data = dataclasses.replace(own.data, name="encoded", path="x")
    with pytest.raises(UserError, match="draws masks anew at every step"):
        method_of_run(dataclasses.replace(own, data=data), tokenizers)
    shown = dataclasses.replace(own.sample, fidelity=4)
    with pytest.raises(UserError, match="sample.fidelity is 4, but method 'inpaint' draws from"):
        method_of_run(dataclasses.replace(own, sample=shown), tokenizers)
    c = default(family="sd3", method="inpaint")
    with pytest.raises(UserError, match="is for SD1 and SD2, SDXL, FLUX.1; model.family is"):
        blank_method(resolve(c))
