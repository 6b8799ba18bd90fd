"""Folders of SD3 and FLUX.1: read and written without loss; what torch draws from them."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch

from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.workdir import save_workdir
from sdjax.diffusion.guidance import SkipLayers
from sdjax.errors import UserError
from sdjax.families.conditioning import encode_text, make_conditioner, with_text_length
from sdjax.families.flux import FLUX
from sdjax.families.registry import model_of
from sdjax.families.sd3 import SD3
from sdjax.formats.diffusers_folder import read_diffusers, write_diffusers
from sdjax.sampling.generate import Drawing, make_generator
from tests.families import torch_transformers

PROMPTS = ["a red circle", "a green star"]
# name: the pipeline, the arguments of a call, ours in their place.
CASES = {
    "sd3": (
        lambda *args: torch_transformers.sd3(*args),
        dict(guidance_scale=5.0, skip_guidance_layers=[1], skip_layer_guidance_scale=2.8,
             skip_layer_guidance_start=0.01, skip_layer_guidance_stop=0.5),
        dict(guidance=5.0, skip=SkipLayers((1,), 2.8, 0.01, 0.5)),
    ),
    "sd3 without T5": (
        lambda *args: torch_transformers.sd3(*args, with_t5=False),
        dict(guidance_scale=5.0), dict(guidance=5.0),
    ),
    "flux dev": (
        lambda *args: torch_transformers.flux(*args),
        dict(guidance_scale=2.5), dict(guidance=1.0, embedded_guidance=2.5),
    ),
    "flux schnell, with true guidance": (
        lambda *args: torch_transformers.flux(*args, dev=False),
        dict(true_cfg_scale=3.0, negative_prompt=[""] * 2), dict(guidance=3.0),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def made(request, torch_pipeline, tmp_path_factory):
    """(pipeline, its folder, arguments of a call, ours)."""
    make, theirs, ours = CASES[request.param]
    folder = tmp_path_factory.mktemp("transformers")
    pipeline = make(torch_pipeline.tokenizer, folder / "t5")
    pipeline.save_pretrained(folder / "pipeline")
    return pipeline, folder / "pipeline", theirs, ours


def params_of(pipeline):
    """{path: array} by transformers' and diffusers' names, aliases left out."""
    found = {}
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            for key, value in part.named_parameters():
                found[f"{name}.{key.removeprefix('text_model.')}"] = value.detach().numpy()
            if hasattr(getattr(part, "pos_embed", None), "pos_embed"):
                found[f"{name}.pos_embed.pos_embed"] = part.pos_embed.pos_embed.numpy()
    return found


def test_there_and_back_by_way_of_a_workdir_is_bit_equal(made, tmp_path):
    pipeline, folder, _, _ = made
    save_workdir(tmp_path / "workdir", read_diffusers(folder))
    write_diffusers(tmp_path / "out", read_any(tmp_path / "workdir"), max_shard_size="40KB")
    # diffusers wants to be told of what a folder of SD3 lacks, of its own folders too.
    absent = [n for n in ("text_encoder_3", "tokenizer_3") if getattr(pipeline, n, 0) is None]
    again = type(pipeline).from_pretrained(tmp_path / "out", **dict.fromkeys(absent))
    theirs, ours = params_of(pipeline), params_of(again)
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    kept = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    written = dict(again.scheduler.config)
    assert {k: written[k] for k in kept if written[k] or kept[k]} == {
        k: v for k, v in kept.items() if v or written[k]
    }
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if getattr(pipeline, name, None) is not None:
            ours, theirs = getattr(again, name), getattr(pipeline, name)
            rows = {"padding": "max_length", "max_length": torch_transformers.LENGTH}
            assert ours(PROMPTS, **rows) == theirs(PROMPTS, **rows)


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_the_folder_draws_the_same_picture_in_torch_and_here(made, size):
    pipeline, folder, theirs, ours = made
    height, width = size
    noise = np.random.default_rng(0).normal(size=(2, height // 2, width // 2, 4))
    noise = noise.astype(np.float32)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    if isinstance(pipeline, diffusers.FluxPipeline):
        latents = pipeline._pack_latents(latents, 2, 4, height // 2, width // 2)
    with torch.no_grad():
        expected = pipeline(
            PROMPTS, height=height, width=width, latents=latents, num_inference_steps=4,
            max_sequence_length=torch_transformers.LENGTH, output_type="np", **theirs,
        ).images  # fmt: skip
    model = with_text_length(read_diffusers(folder), torch_transformers.LENGTH, "it")
    sampler = dataclasses.replace(model.sampler, steps=4)
    generate = make_generator(model, Drawing(sampler, **ours))
    with jax.default_matmul_precision("highest"):
        found, _ = generate(
            model.params,
            encode_text(model.tokenizers, PROMPTS),
            encode_text(model.tokenizers, [""] * 2),
            noise,
            jax.random.split(jax.random.key(0), 2),
        )
    inside = (expected > 0) & (expected < 1)
    assert inside.mean() > 0.5 and expected.std() > 0.05, "too plain to prove much"
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-3)


def test_networks_that_do_not_belong_together_are_named(made):
    _, folder, _, _ = made
    model = read_diffusers(folder)
    transformer = dataclasses.replace(model.denoiser, pooled_projection_dim=99)
    wrong = dataclasses.replace(model, networks={**model.networks, "transformer": transformer})
    with pytest.raises(UserError, match=r"model\.transformer\.pooled_projection_dim is 99"):
        model.family.check(wrong)
    networks = {k: v for k, v in model.networks.items() if k != "text_encoder"}
    with pytest.raises(UserError, match=r"model\.text_encoder is missing"):
        model.family.check(dataclasses.replace(model, networks=networks))


def test_lengths_of_text_are_bounded_and_for_these_families(made, pipeline_folder):
    _, folder, _, _ = made
    with pytest.raises(UserError, match="--max_sequence_length is 1; expected 2 to 4096"):
        with_text_length(read_diffusers(folder), 1, "it")
    with pytest.raises(UserError, match="DIR is a model of SD1 and SD2"):
        with_text_length(read_diffusers(pipeline_folder), 77, "DIR")


def test_a_folder_says_no_length_and_gets_that_of_its_pipelines(made):
    pipeline, folder, _, _ = made
    model = read_diffusers(folder)
    expected = 512 if isinstance(pipeline, diffusers.FluxPipeline) else 16 + 256
    shapes = make_conditioner(model, model.tokenizers).embedding()
    assert shapes["context"].shape == (expected, 24)


@pytest.mark.parametrize(
    "family, preset, name",
    [
        (FLUX, "dev", "FluxPipeline"),
        (FLUX, "fill", "FluxFillPipeline"),
        (FLUX, "control", "FluxControlPipeline"),
        (SD3, "sd35_medium", "StableDiffusion3Pipeline"),
    ],
)
def test_what_is_written_names_the_pipeline_that_draws_with_it(family, preset, name):
    assert family.pipeline_class(model_of(family.presets[preset])) == name
    assert hasattr(diffusers, name) and name in family.pipelines
