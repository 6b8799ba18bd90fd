"""A refiner that takes the last steps, as in diffusers; the mean of several models' predictions."""

import copy
import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import sample
from sdjax.formats.diffusers_folder import read_diffusers, write_diffusers
from tests.conftest import randomise

PROMPTS = ["a red circle", "a green star"]
TABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
LEVELS = 0.5 + 0.26  # of 255: rounding to 8 bits, and 1e-3 of the range
NOISE = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
TORCH_NOISE = torch.from_numpy(NOISE.transpose(0, 3, 1, 2))
NEGATIVE = "a blue square"


def drawn(models, output, *options):
    """What `sample` draws, [2, H, W, 3], or its exit code."""
    np.save(output.parent / "noise.npy", NOISE)
    code = sample.main([
        *(f"--model={model}" for model in models), f"--output={output}", "--steps=5",
        "--guidance=4", f"--latents={output.parent / 'noise.npy'}", "--height=16", "--width=16",
        f"--negative_prompt={NEGATIVE}", "--prompts", *PROMPTS, *options,
    ])  # fmt: skip
    if code:
        return code
    return np.stack([np.asarray(Image.open(output / f"0000{i}.png"), float) for i in range(2)])


@pytest.fixture(scope="module")
def base_and_refiner(torch_xl_pipeline, tmp_path_factory):
    """Pipelines that sample by Euler's method, and their folders."""
    folder = tmp_path_factory.mktemp("experts")
    settings = dict(timestep_spacing="leading", steps_offset=1, **TABLE)
    parts = {k: v for k, v in torch_xl_pipeline.components.items() if v is not None}
    parts |= {"scheduler": diffusers.EulerDiscreteScheduler(**settings)}
    base = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    widths = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 20 + 5 * 8}
    unet = diffusers.UNet2DConditionModel(**{**parts["unet"].config, **widths})
    randomise(unet, 7)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
        **{**parts, "unet": unet.eval(), "text_encoder": None, "tokenizer": None},
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    for pipeline, name in ((base, "base"), (refiner, "refiner")):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder / name)
    return base, refiner, folder


def test_base_and_refiner_share_the_steps_as_in_diffusers(base_and_refiner, tmp_path):
    base, refiner, folder = base_and_refiner
    common = dict(num_inference_steps=5, guidance_scale=4.0, negative_prompt=[NEGATIVE] * 2)
    with torch.no_grad():
        latents = base(
            PROMPTS, height=16, width=16, latents=TORCH_NOISE, denoising_end=0.6,
            output_type="latent", **common,
        ).images  # fmt: skip
        theirs = refiner(
            PROMPTS, image=latents, denoising_start=0.6, output_type="np", **common
        ).images
    options = [f"--refiner={folder / 'refiner'}", "--refiner_start=0.6"]
    ours = drawn([folder / "base"], tmp_path / "out", *options)
    inside = (theirs > 0) & (theirs < 1)
    assert inside.mean() > 0.4 and theirs.std() > 0.05, "too plain to prove much"
    np.testing.assert_allclose(ours, theirs * 255, atol=LEVELS)
    text = Image.open(tmp_path / "out" / "00000.png").text
    assert text["refiner_start"] == "0.6" and text["refiner"].endswith("refiner")


@pytest.fixture(scope="module")
def two_models(torch_pipeline, pipeline_folder, tmp_path_factory):
    """Two UNets and text encoders of one shape, and the folder of the second."""
    parts = {k: copy.deepcopy(v) for k, v in torch_pipeline.components.items()}
    randomise(parts["unet"], 50)
    randomise(parts["text_encoder"], 51)
    other = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    folder = tmp_path_factory.mktemp("other") / "model"
    other.save_pretrained(folder)
    return torch_pipeline, other, folder


def test_the_mean_of_two_models_is_that_of_their_predictions(two_models, pipeline_folder, tmp_path):
    first, second, folder = two_models
    scheduler = diffusers.DDIMScheduler.from_config(first.scheduler.config)
    scheduler.set_timesteps(5)
    x = TORCH_NOISE
    with torch.no_grad():
        texts = [p.encode_prompt(PROMPTS, "cpu", 1, True, [NEGATIVE] * 2) for p in (first, second)]
        for t in scheduler.timesteps:
            outputs = []
            for pipeline, (text, negative) in zip((first, second), texts, strict=True):
                away, along = (pipeline.unet(x, t, c).sample for c in (negative, text))
                outputs.append(away + 4.0 * (along - away))
            x = scheduler.step((outputs[0] + outputs[1]) / 2, t, x).prev_sample
        decoded = first.vae.decode(x / first.vae.config.scaling_factor).sample
    theirs = (decoded / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)
    assert theirs.std() > 0.05, "too plain to prove much"
    ours = drawn([pipeline_folder, folder], tmp_path / "out")
    np.testing.assert_allclose(ours, theirs * 255, atol=LEVELS)
    assert str(folder) in Image.open(tmp_path / "out" / "00000.png").text["averaged_with"]


def test_models_that_do_not_go_together_are_refused(
    base_and_refiner, pipeline_folder, xl_folder, tmp_path, capsys
):
    _, _, folder = base_and_refiner
    model = read_diffusers(pipeline_folder)
    vae = dataclasses.replace(model.vae, scaling_factor=0.5)
    other = dataclasses.replace(model, networks={**model.networks, "vae": vae})
    write_diffusers(tmp_path / "scaled", other)
    write_diffusers(
        tmp_path / "v", dataclasses.replace(model, prediction_type="v_prediction", scheduler=None)
    )
    refiner = f"--refiner={folder / 'refiner'}"
    cases = [
        ([pipeline_folder, xl_folder], [], "its family is sdxl, not sd"),
        ([pipeline_folder, tmp_path / "scaled"], [], "scaling_factor 0.5"),
        ([pipeline_folder, tmp_path / "v"], [], "its prediction_type is v_prediction, not epsilon"),
        ([pipeline_folder, pipeline_folder], ["--explain"], "--explain shows the attention of one"),
        ([pipeline_folder], [refiner], "--refiner is for SDXL, and --model is of the family 'sd'"),
        ([folder / "base"], [refiner, "--refiner_start=0.001"], "give more --steps"),
        ([folder / "base"], [refiner, "--refiner_start=1.5"], "--refiner_start=1.5; expected"),
        ([folder / "base"], [refiner, "--sampler=heun"], "'heun' cannot stop before its last step"),
        ([folder / "base"], ["--refiner_start=0.5"], "--refiner_start is for --refiner"),
        ([folder / "base"], [refiner, "--interpolate=1"], "does not go with --refiner"),
    ]
    for models, options, words in cases:
        assert np.all(drawn(models, tmp_path / "out", *options) == 2), words
        assert words in capsys.readouterr().err, words
