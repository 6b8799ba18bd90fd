"""InstructPix2Pix: dropout of words and pictures, the latents that are read, runs and drawing."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import sample
from sdjax.checkpoints.reading import read_any
from sdjax.config import resolve
from sdjax.config_model import method_of_run
from sdjax.diffusion.losses import dropped_captions
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.methods import edit
from sdjax.train import loop
from tests.conftest import randomise
from tests.data.test_named_images import Copies
from tests.methods.runs import begun_from, broken_off, to_torch
from tests.sampling.test_pictures import LEVELS, PROMPTS, drawings, remade
from tests.train.test_loop import assert_same_run

BEFORE = {"name": "before", "key": "copy"}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    Copies(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def config(tiny_config, tiny_model, copies):
    c = begun_from(tiny_config, tiny_model, "edit")
    c.data.update(name="copies", data_dir=copies, images=(BEFORE,), eval_split="train", flip=True)
    return c


def test_one_number_drops_words_alone_both_and_the_picture_alone():
    """FT-56: 5 % each at conditioning_dropout_prob 0.05; words go as for every other method."""
    keys = jax.random.split(jax.random.key(0), 40_000)
    words = np.asarray(dropped_captions(keys, 0.1))
    picture = np.asarray(edit.dropped(0.1, jnp.ones((len(keys), 1, 1, 1)), keys)).ravel() == 0
    shares = [(words & ~picture).mean(), (words & picture).mean(), (~words & picture).mean()]
    np.testing.assert_allclose(shares, [0.05] * 3, atol=0.005)


@pytest.mark.parametrize("folder", ["pipeline_folder", "xl_folder"])
def test_the_picture_is_read_as_the_pipeline_reads_it(folder, request):
    """Of mode and without the factor of scale (FT-56)."""
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    model = read_any(request.getfixturevalue(folder))
    batch = {"before": jnp.asarray(images)}
    ours = edit.original(bind(model, ("vae",)), model.params, batch, jnp.zeros(0))
    xl = "xl" in folder
    name = "torch_xl_pipeline" if xl else "torch_pipeline"
    kind = getattr(
        diffusers, f"StableDiffusion{'XL' if 'xl' in folder else ''}InstructPix2PixPipeline"
    )
    stub = type("Stub", (), {
        "vae": request.getfixturevalue(name).vae, "dtype": torch.float32,
        "is_cosxl_edit": False,
    })()  # fmt: skip
    with torch.no_grad():
        arguments = (to_torch(images), 2, 1, torch.float32, "cpu", False)
        theirs = kind.prepare_image_latents(stub, *arguments).numpy()
    np.testing.assert_allclose(np.asarray(ours).transpose(0, 3, 1, 2), theirs, atol=2e-5)


def test_the_picture_before_moves_with_the_crop_and_the_flip(config):
    """dif#2478: their copy is the picture itself here, so the channels are those of the target."""
    from sdjax.data.pipeline import make_iterator

    config.data.crop = "random"
    data = make_iterator(resolve(config).data, {}, seed=1, split="train")
    for _ in range(3):
        batch = next(data)
        np.testing.assert_array_equal(batch["image"], batch["before"])
    data.close()


def test_a_run_resumes_to_the_bit_and_diffusers_edits_with_it(config, tmp_path, capsys):
    config.train.update(export=True)
    whole = tmp_path / "whole"
    assert loop.run(resolve(config), str(whole)) == loop.DONE
    said = capsys.readouterr().out
    assert "unet.conv_in is given 4 channels of zeros beside 4" in said
    assert "--init_image=FILE" in said
    broken = broken_off(whole, tmp_path / "broken", 1)
    assert loop.run(resolve(config), str(broken)) == loop.DONE
    assert_same_run(whole, broken)
    kind = diffusers.StableDiffusionInstructPix2PixPipeline
    pipeline = kind.from_pretrained(whole / "diffusers")
    with torch.no_grad():
        made = pipeline(
            "a red circle", image=Image.new("RGB", (16, 16)), num_inference_steps=2,
            output_type="np",
        ).images  # fmt: skip
    assert np.isfinite(made).all() and pipeline.unet.config.in_channels == 8
    assert diffusers.DiffusionPipeline.from_pretrained(whole / "diffusers").__class__ is kind


@pytest.mark.parametrize(("scale", "image_scale"), [(4.0, 1.5), (4.0, 1.0), (2.0, 3.0)])
def test_a_picture_is_edited_as_by_the_pipeline(
    scale, image_scale, torch_pipeline, tmp_path, monkeypatch
):
    unet = diffusers.UNet2DConditionModel(**{**torch_pipeline.unet.config, "in_channels": 8})
    randomise(unet, 7)
    name = "StableDiffusionInstructPix2PixPipeline"
    pipeline = remade(torch_pipeline, name, unet=unet.eval())
    pipeline.save_pretrained(tmp_path / "model")
    images, _ = drawings((16, 16))
    noise = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    with torch.no_grad():
        expected = pipeline(
            PROMPTS, image=images, num_inference_steps=4, guidance_scale=scale,
            image_guidance_scale=image_scale, latents=to_torch(noise), output_type="np",
            negative_prompt=["a star"] * 2,
        ).images  # fmt: skip
    np.save(tmp_path / "noise.npy", noise)
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    assert 0 == sample.main([
        f"--model={tmp_path / 'model'}", "--prompts", *PROMPTS, f"--output={tmp_path / 'out'}",
        "--steps=4", f"--guidance={scale}", f"--image_guidance={image_scale}",
        f"--latents={tmp_path / 'noise.npy'}", "--negative_prompt=a star",
        *(f"--init_image={tmp_path / f'{i}.png'}" for i in range(2)),
    ])  # fmt: skip
    files = [Image.open(tmp_path / "out" / f"{i:05d}.png") for i in range(2)]
    ours = np.stack([np.asarray(file) for file in files]).astype(np.float64)
    inside = (expected > 0) & (expected < 1)
    assert inside.mean() > 0.3 and expected.std() > 0.05, "too plain to prove much"
    np.testing.assert_allclose(ours, expected * 255, atol=LEVELS)
    assert files[0].text["image_guidance"] == str(image_scale)
    assert "strength" not in files[0].text


def test_options_that_do_not_fit_are_refused(torch_pipeline, pipeline_folder, tmp_path, capsys):
    unet = diffusers.UNet2DConditionModel(**{**torch_pipeline.unet.config, "in_channels": 8})
    name = "StableDiffusionInstructPix2PixPipeline"
    remade(torch_pipeline, name, unet=unet).save_pretrained(tmp_path / "model")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    common = [f"--output={tmp_path / 'out'}", "--prompts=a star", "--steps=2"]
    given = f"--init_image={tmp_path / 'a.png'}"
    for options in ([], [given, "--strength=0.5"], [given, f"--mask_image={tmp_path / 'a.png'}"]):
        assert sample.main([f"--model={tmp_path / 'model'}", *common, *options]) == 2
        assert "edits a picture; give --init_image=FILE" in capsys.readouterr().err
    assert sample.main([f"--model={pipeline_folder}", *common, "--image_guidance=2"]) == 2
    assert "--image_guidance is for models that edit" in capsys.readouterr().err


def test_recipes_that_do_not_fit_are_refused(config):
    from sdjax.checkpoints.assemble import assemble

    assembled = assemble(resolve(config))
    own = assembled.config
    cases = {
        "'before' is missing": {"data": {"images": ()}},
        "expected 0 to 2/3": {"objective": {"caption_dropout": 0.9}},
    }
    for words, changes in cases.items():
        replaced = {
            group: dataclasses.replace(getattr(own, group), **fields)
            for group, fields in changes.items()
        }
        with pytest.raises(UserError, match=words):
            method_of_run(dataclasses.replace(own, **replaced), assembled.tokenizers)
