"""Pictures to begin with and masks: what the pipelines of diffusers draw of the same noise."""

import importlib

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from sdjax import sample
from sdjax.checkpoints.reading import read_any
from sdjax.sampling import pictures
from sdjax.sampling.start import first_step
from tests.conftest import randomise
from tests.families import torch_transformers

PROMPTS = ["a red circle", "a green star"]
TABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
# What rounding to 8 bits adds to the difference of two pictures, and 1e-3 of the whole range.
LEVELS = 0.5 + 0.26


def remade(pipeline, name, **changes):
    """The networks of a pipeline in another one."""
    parts = {k: v for k, v in pipeline.components.items() if k != "image_encoder"}
    others = ("StableDiffusion3", "Flux", "StableDiffusionXL")
    lone = {} if name.startswith(others) else {"requires_safety_checker": False}
    made = getattr(diffusers, name)(**{**parts, **lone, **changes})
    made.set_progress_bar_config(disable=True)
    return made


def sd(torch_pipeline, torch_xl_pipeline, folder):
    return torch_pipeline, "StableDiffusion{}Pipeline"


def sd_v(torch_pipeline, torch_xl_pipeline, folder):
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction", **TABLE)
    changed = remade(torch_pipeline, "StableDiffusionPipeline", scheduler=scheduler)
    return changed, "StableDiffusion{}Pipeline"


def sdxl(torch_pipeline, torch_xl_pipeline, folder):
    settings = dict(timestep_spacing="leading", steps_offset=1, **TABLE)
    scheduler = diffusers.EulerDiscreteScheduler(**settings)
    changed = remade(torch_xl_pipeline, "StableDiffusionXLPipeline", scheduler=scheduler)
    return changed, "StableDiffusionXL{}Pipeline"


def sd3(torch_pipeline, torch_xl_pipeline, folder):
    return torch_transformers.sd3(torch_pipeline.tokenizer, folder), "StableDiffusion3{}Pipeline"


def flux(torch_pipeline, torch_xl_pipeline, folder):
    return torch_transformers.flux(torch_pipeline.tokenizer, folder), "Flux{}Pipeline"


def inpainter(torch_pipeline, torch_xl_pipeline, folder):
    """A UNet of nine channels."""
    unet = diffusers.UNet2DConditionModel(**{**torch_pipeline.unet.config, "in_channels": 9})
    randomise(unet, 5)
    name = "StableDiffusionInpaintPipeline"
    return remade(torch_pipeline, name, unet=unet.eval()), "StableDiffusion{}Pipeline"


def drawings(size):
    """Two pictures of soft colours, and a mask whose left part is white."""
    height, width = size
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 255, (2, 4, 4, 3), np.uint8)
    made = [Image.fromarray(b).resize((width, height), Image.Resampling.BICUBIC) for b in blocks]
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    mask[: height // 3] = 90
    return made, Image.fromarray(mask)


def theirs_and_ours(make, kind, pipelines, folder, monkeypatch, *, strength, steps, size=(16, 16)):
    """The pictures of a pipeline [2, H, W, 3], times 255, and those of `sample`."""
    base, names = make(*pipelines, folder / "words")
    base.save_pretrained(folder / "model")
    name = names.format(kind)
    pipeline = base if type(base).__name__ == name else remade(base, name)
    rng = np.random.default_rng(0)
    noise, of_vae = (rng.normal(size=(2, 8, 8, 4)).astype(np.float32) for _ in range(2))
    torch_noise, torch_vae = (torch.from_numpy(x.transpose(0, 3, 1, 2)) for x in (noise, of_vae))
    module = importlib.import_module(type(pipeline).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kw: torch_noise)

    def draw(self, generator=None):
        return self.mean + self.std * torch_vae

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", draw)
    monkeypatch.setattr(pictures, "vae_noise", lambda *args: of_vae)
    images, mask = drawings(size)
    masks = dict(mask_image=mask) if kind == "Inpaint" else {}
    scale = {"flux": 1.0}.get(make.__name__, 4.0)
    length = read_any(folder / "model").settings.get("max_sequence_length")
    with torch.no_grad():
        expected = pipeline(
            PROMPTS, image=images, **masks, strength=strength, num_inference_steps=steps,
            **(dict(height=16, width=16) if kind == "Inpaint" or make in (sd3, flux) else {}),
            **({"max_sequence_length": length} if length else {}),
            guidance_scale=3.5 if make is flux else scale, output_type="np",
        ).images  # fmt: skip
    np.save(folder / "noise.npy", noise)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    mask.save(folder / "mask.png")
    options = [f"--mask_image={folder / 'mask.png'}"] if masks else []
    assert 0 == sample.main([
        f"--model={folder / 'model'}", "--prompts", *PROMPTS, f"--output={folder / 'out'}",
        f"--steps={steps}", f"--guidance={scale}", f"--latents={folder / 'noise.npy'}",
        *(f"--init_image={folder / f'{i}.png'}" for i in range(2)), f"--strength={strength}",
        "--height=16", "--width=16", *options,
    ])  # fmt: skip
    ours = np.stack([np.asarray(Image.open(folder / "out" / f"{i:05d}.png")) for i in range(2)])
    inside = (expected > 0) & (expected < 1)
    assert inside.mean() > 0.4 and expected.std() > 0.05, "too plain to prove much"
    return expected * 255, ours.astype(np.float64)


@pytest.fixture
def pipelines(torch_pipeline, torch_xl_pipeline):
    return torch_pipeline, torch_xl_pipeline


@pytest.mark.parametrize(
    ("make", "strength", "steps"),
    [(sd, 0.5, 5), (sd_v, 0.7, 6), (sdxl, 1.0, 4), (sd3, 0.5, 5), (flux, 0.3, 5)],
)
def test_a_picture_becomes_the_one_of_the_img2img_pipeline(
    make, strength, steps, pipelines, tmp_path, monkeypatch
):
    given = dict(strength=strength, steps=steps)
    theirs, ours = theirs_and_ours(make, "Img2Img", pipelines, tmp_path, monkeypatch, **given)
    np.testing.assert_allclose(ours, theirs, atol=LEVELS)


@pytest.mark.parametrize(
    ("make", "strength", "size"),
    [(sd, 0.8, (40, 24)), (inpainter, 0.8, (16, 16)), (inpainter, 1.0, (16, 16)),
     (sdxl, 1.0, (16, 16)), (flux, 0.8, (16, 16))],
)  # fmt: skip
def test_a_masked_picture_is_redrawn_as_in_the_inpainting_pipeline(
    make, strength, size, pipelines, tmp_path, monkeypatch
):
    given = dict(strength=strength, steps=4, size=size)
    theirs, ours = theirs_and_ours(make, "Inpaint", pipelines, tmp_path, monkeypatch, **given)
    np.testing.assert_allclose(ours, theirs, atol=LEVELS)


@pytest.mark.parametrize(("steps", "strength"), [(50, 0.8), (7, 0.29), (30, 0.7), (3, 1.0)])
def test_the_first_step_is_that_of_the_pipelines(steps, strength, torch_pipeline):
    scheduler = torch_pipeline.scheduler
    for name, flow in (("StableDiffusionImg2Img", False), ("StableDiffusion3Img2Img", True)):
        kind = getattr(diffusers, f"{name}Pipeline")
        scheduler.set_timesteps(steps)
        stub = type("Stub", (), {"scheduler": scheduler})()
        left = kind.get_timesteps(stub, steps, strength, "cpu")[0]
        assert first_step(steps, strength, flow=flow) == steps - len(left)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mask_image=m.png"], "--mask_image is for --init_image"),
        (["--strength=0.5"], "--strength is for --init_image"),
        (["--init_image={}", "--strength=1.5"], "--strength=1.5; expected above 0, at most 1"),
        (["--init_image={}", "--strength=0.01"], "leaves none; give more --steps"),
        (["--init_image={}", "--init_image={}", "--init_image={}"], "3 times for 2 prompts"),
        (["--init_image={}.txt"], "cannot be used"),
        (["--init_image={}", "--sampler=pndm"], "take another --sampler"),
        (["--init_image={}", "--interpolate=2"], "--interpolate does not go with --init_image"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(pipeline_folder, tmp_path, capsys, options, words):
    file = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(file)
    (tmp_path / "a.png.txt").write_text("no picture")
    given = [option.format(file) for option in options]
    common = [f"--model={pipeline_folder}", f"--output={tmp_path / 'out'}", "--steps=4"]
    assert sample.main([*common, "--prompts", *PROMPTS, *given]) == 2
    assert words in capsys.readouterr().err
