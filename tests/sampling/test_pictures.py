"""Pictures to begin with and masks: what the pipelines of diffusers draw of the same noise."""

import importlib
import inspect

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
    kind = getattr(diffusers, name)
    given = {**pipeline.components, "requires_safety_checker": False, **changes}
    made = kind(**{k: v for k, v in given.items() if k in inspect.signature(kind).parameters})
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


def sd3_16(torch_pipeline, torch_xl_pipeline, folder):
    """An SD3 of sixteen latent channels: its Inpaint pipeline takes no other number."""
    base = torch_transformers.sd3(torch_pipeline.tokenizer, folder)
    widths = {"in_channels": 16, "out_channels": 16}
    transformer = diffusers.SD3Transformer2DModel(**{**base.transformer.config, **widths})
    vae = diffusers.AutoencoderKL(**{**base.vae.config, "latent_channels": 16})
    for seed, network in enumerate((transformer, vae)):
        randomise(network.eval(), 70 + seed)
    changes = dict(transformer=transformer, vae=vae)
    return remade(base, "StableDiffusion3Pipeline", **changes), "StableDiffusion3{}Pipeline"


def flux(torch_pipeline, torch_xl_pipeline, folder):
    return torch_transformers.flux(torch_pipeline.tokenizer, folder), "Flux{}Pipeline"


def inpainter(torch_pipeline, torch_xl_pipeline, folder):
    """A UNet of nine channels."""
    unet = diffusers.UNet2DConditionModel(**{**torch_pipeline.unet.config, "in_channels": 9})
    randomise(unet, 5)
    name = "StableDiffusionInpaintPipeline"
    return remade(torch_pipeline, name, unet=unet.eval()), "StableDiffusion{}Pipeline"


def fill(torch_pipeline, torch_xl_pipeline, folder):
    """FLUX.1-Fill reads 8 x 8 pixels of a mask, for a VAE that halves three times."""
    base = torch_transformers.flux(torch_pipeline.tokenizer, folder)
    widths = {"in_channels": 4 * (4 + 4 + 64), "out_channels": 16}
    transformer = diffusers.FluxTransformer2DModel(**{**base.transformer.config, **widths})
    vae = diffusers.AutoencoderKL(**{
        **base.vae.config, "block_out_channels": (8,) * 4, "sample_size": 64,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    })  # fmt: skip
    for seed, network in enumerate((transformer, vae)):
        randomise(network.eval(), 60 + seed)
    changes = dict(transformer=transformer, vae=vae)
    return remade(base, "FluxFillPipeline", **changes), "Flux{}Pipeline"


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
    name = names.format("Fill" if make is fill else kind)
    pipeline = base if type(base).__name__ == name else remade(base, name)
    rng = np.random.default_rng(0)
    side = 64 if make is fill else 16
    shape = (2, 8, 8, 16 if make is sd3_16 else 4)
    noise, of_vae = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    torch_noise, torch_vae = (torch.from_numpy(x.transpose(0, 3, 1, 2)) for x in (noise, of_vae))
    module = importlib.import_module(type(pipeline).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kw: torch_noise)

    def draw(self, generator=None):
        return self.mean + self.std * torch_vae

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", draw)
    monkeypatch.setattr(pictures, "vae_noise", lambda *args: of_vae)
    images, mask = drawings(size)
    masks = dict(mask_image=mask) if kind == "Inpaint" else {}
    scale = 1.0 if make in (flux, fill) else 4.0
    length = read_any(folder / "model").settings.get("max_sequence_length")
    with torch.no_grad():
        expected = pipeline(
            PROMPTS, image=images, **masks, strength=strength, num_inference_steps=steps,
            **(dict(height=side, width=side) if kind == "Inpaint" or make in (sd3, flux) else {}),
            **({"max_sequence_length": length} if length else {}),
            guidance_scale=3.5 if make in (flux, fill) else scale,
            output_type="latent" if make is sd3_16 else "np",
        ).images  # fmt: skip
        if make is sd3_16:  # whose pipeline decodes without the shift, huggingface/diffusers#13611
            shifted = expected / base.vae.config.scaling_factor + base.vae.config.shift_factor
            decoded = base.vae.decode(shifted).sample
            expected = pipeline.image_processor.postprocess(decoded, output_type="np")
    np.save(folder / "noise.npy", noise)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    mask.save(folder / "mask.png")
    options = [f"--mask_image={folder / 'mask.png'}"] if masks else []
    assert 0 == sample.main([
        f"--model={folder / 'model'}", "--prompts", *PROMPTS, f"--output={folder / 'out'}",
        f"--steps={steps}", f"--guidance={scale}", f"--latents={folder / 'noise.npy'}",
        *(f"--init_image={folder / f'{i}.png'}" for i in range(2)), f"--strength={strength}",
        f"--height={side}", f"--width={side}", *options,
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
     (sdxl, 1.0, (16, 16)), (sd3_16, 0.8, (16, 16)), (flux, 0.8, (16, 16)),
     (fill, 1.0, (64, 64))],
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


def test_why_a_picture_is_so_is_shown_from_the_first_step_on(pipeline_folder, tmp_path):
    Image.new("RGB", (30, 20), (200, 30, 90)).save(tmp_path / "a.png")
    assert 0 == sample.main([
        f"--model={pipeline_folder}", f"--output={tmp_path / 'out'}", "--prompts", *PROMPTS,
        f"--init_image={tmp_path / 'a.png'}", "--strength=0.5", "--steps=6", "--explain",
        "--trajectory=3",
    ])  # fmt: skip
    frames = Image.open(tmp_path / "out" / "00001-steps.webp")
    assert frames.n_frames == 3 and (tmp_path / "out" / "00001-words.npz").exists()
    text = Image.open(tmp_path / "out" / "00001.png").text
    assert text["init_image"].endswith("a.png") and text["strength"] == "0.5"


def test_heat_maps_of_a_family_without_a_unet_are_refused(torch_pipeline, tmp_path, capsys):
    torch_transformers.sd3(torch_pipeline.tokenizer, tmp_path / "t5").save_pretrained(
        tmp_path / "sd3"
    )
    options = [f"--model={tmp_path / 'sd3'}", f"--output={tmp_path / 'out'}", "--steps=2"]
    assert sample.main([*options, "--prompts", *PROMPTS, "--explain"]) == 2
    assert "the family 'sd3' has none" in capsys.readouterr().err


def test_a_model_for_inpainting_is_not_drawn_without_a_mask(pipelines, tmp_path, capsys):
    inpainter(*pipelines, tmp_path)[0].save_pretrained(tmp_path / "model")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    options = [f"--model={tmp_path / 'model'}", f"--output={tmp_path / 'out'}", "--prompts=a star"]
    for more in ([], [f"--init_image={tmp_path / 'a.png'}"]):
        assert sample.main([*options, *more]) == 2
        assert "reads a picture and a mask; give --init_image=FILE" in capsys.readouterr().err
