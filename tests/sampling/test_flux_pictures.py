"""FLUX.1-Kontext, -Canny and -Depth draw what their pipelines draw of the same noise."""

import importlib

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from sdjax import sample
from sdjax.sampling import pictures
from tests.conftest import randomise
from tests.families import torch_transformers
from tests.sampling.test_pictures import LEVELS, PROMPTS, drawings, remade


@pytest.fixture
def base(torch_pipeline, tmp_path):
    return torch_transformers.flux(torch_pipeline.tokenizer, tmp_path / "words")


def noises():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, 8, 8, 4)).astype(np.float32) for _ in range(2)]


def torch_of(noise):
    return torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())


def drawn(folder, noise, *options):
    """The pictures of `sample`, float64 [2, H, W, 3] of 0 to 255, and the file of the first."""
    np.save(folder / "noise.npy", noise)
    assert 0 == sample.main([
        f"--model={folder / 'model'}", "--prompts", *PROMPTS, f"--output={folder / 'out'}",
        "--steps=4", f"--latents={folder / 'noise.npy'}", "--height=16", "--width=16", *options,
    ])  # fmt: skip
    files = [Image.open(folder / "out" / f"{i:05d}.png") for i in range(2)]
    return np.stack([np.asarray(file) for file in files]).astype(np.float64), files[0]


def saved(images, folder):
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(len(images))]


def assert_same(ours, theirs):
    inside = (theirs > 0) & (theirs < 1)
    assert inside.mean() > 0.4 and theirs.std() > 0.05, "too plain to prove much"
    np.testing.assert_allclose(ours, theirs * 255, atol=LEVELS)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_kontext_edits_as_its_pipeline(scale, base, tmp_path, monkeypatch):
    """Also with a negative prompt, beside which the picture is read too."""
    pipeline = remade(base, "FluxKontextPipeline")
    pipeline.save_pretrained(tmp_path / "model")
    noise, _ = noises()
    module = importlib.import_module(type(pipeline).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kw: torch_of(noise))
    images, _ = drawings((16, 16))
    with torch.no_grad():
        theirs = pipeline(
            image=images, prompt=PROMPTS, negative_prompt=["a blue square"] * 2,
            true_cfg_scale=scale, height=16, width=16, max_area=256, _auto_resize=False,
            num_inference_steps=4, guidance_scale=2.5, output_type="np",
        ).images  # fmt: skip
    files = saved(images, tmp_path)
    ours, first = drawn(
        tmp_path, noise, *(f"--init_image={file}" for file in files), f"--guidance={scale}",
        "--negative_prompt=a blue square", "--embedded_guidance=2.5",
    )  # fmt: skip
    assert_same(ours, theirs)
    assert first.text["init_image"] == files[0] and "image_guidance" not in first.text
    other, _ = drawn(tmp_path, noise, f"--guidance={scale}", "--embedded_guidance=2.5")
    assert np.abs(other - ours).max() > 5  # without a picture it draws as dev


def control(base, folder):
    """A pipeline whose transformer reads as many channels more."""
    widths = {"in_channels": 32, "out_channels": 16}
    transformer = diffusers.FluxTransformer2DModel(**{**base.transformer.config, **widths})
    randomise(transformer.eval(), 61)
    pipeline = remade(base, "FluxControlPipeline", transformer=transformer)
    pipeline.save_pretrained(folder / "model")
    return pipeline


def test_a_condition_is_followed_as_by_its_pipeline(base, tmp_path, monkeypatch):
    pipeline = control(base, tmp_path)
    noise, of_vae = noises()
    module = importlib.import_module(type(pipeline).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kw: torch_of(noise))

    def draw(self, generator=None):
        return self.mean + self.std * torch_of(of_vae)

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", draw)
    monkeypatch.setattr(pictures, "vae_noise", lambda *args: of_vae)
    images, _ = drawings((16, 16))
    with torch.no_grad():
        theirs = pipeline(
            PROMPTS, control_image=images, height=16, width=16, num_inference_steps=4,
            guidance_scale=10.0, output_type="np",
        ).images  # fmt: skip
    files = saved(images, tmp_path)
    ours, first = drawn(
        tmp_path, noise, *(f"--control_image={file}" for file in files),
        "--embedded_guidance=10", "--guidance=1",
    )  # fmt: skip
    assert_same(ours, theirs)
    assert first.text["control_image"] == files[0]


def test_options_that_do_not_fit_are_refused(base, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    common = [f"--output={tmp_path / 'out'}", "--prompts=a star", "--steps=2"]
    control(base, tmp_path)
    picture, condition = (f"--{name}={tmp_path / 'a.png'}" for name in
                          ("init_image", "control_image"))  # fmt: skip
    for options, words in (
        ([], "follows a picture; give --control_image=FILE"),
        ([picture], "follows a picture, which --control_image=FILE names"),
        ([condition, "--controlnet=x"], "follows a picture by itself; leave --controlnet out"),
        ([condition, "--guess_mode"], "follows a picture by itself; leave --guess_mode out"),
        ([condition, "--interpolate=2"], "--interpolate does not go with --control_image"),
        ([condition, condition, condition], "--control_image is given 3 times for 1 prompts"),
    ):
        assert sample.main([f"--model={tmp_path / 'model'}", *common, *options]) == 2
        assert words in capsys.readouterr().err
    remade(base, "FluxKontextPipeline").save_pretrained(tmp_path / "kontext")
    for options in ([picture, "--strength=0.5"], [picture, f"--mask_image={tmp_path / 'a.png'}"]):
        assert sample.main([f"--model={tmp_path / 'kontext'}", *common, *options]) == 2
        assert "edits a picture; give --init_image=FILE" in capsys.readouterr().err
    options = [picture, "--image_guidance=2"]
    assert sample.main([f"--model={tmp_path / 'kontext'}", *common, *options]) == 2
    assert "has no guidance of that kind" in capsys.readouterr().err
