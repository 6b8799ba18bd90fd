"""Folders of SDXL and its refiner: read and written without loss; what torch draws from them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.workdir import save_workdir
from sdjax.diffusion.samplers import SamplerConfig
from sdjax.families.conditioning import encode_text
from sdjax.formats.diffusers_folder import read_diffusers, write_diffusers
from sdjax.formats.folders import ModelError
from sdjax.models import weights
from sdjax.models.unet import UNet
from sdjax.sampling.generate import Drawing, make_generator

PROMPTS = ["a red circle", "a green star"]
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def read(xl_folder):
    return read_diffusers(xl_folder)


@pytest.fixture(scope="module")
def written(read, tmp_path_factory):
    """By way of a workdir."""
    folder = tmp_path_factory.mktemp("xl")
    save_workdir(folder / "workdir", read)
    write_diffusers(folder / "out", read_any(folder / "workdir"), max_shard_size="60KB")
    return folder / "out"


@pytest.fixture(scope="module")
def refiner(read):
    """The second encoder alone, and five time ids."""
    unet = dataclasses.replace(
        read.denoiser, cross_attention_dim=32, projection_class_embeddings_input_dim=20 + 5 * 8
    )
    rng = np.random.default_rng(0)
    fresh = weights.abstract(UNet, unet)[1]
    params = {f"unet.{p}": rng.normal(size=v.shape, scale=0.1) for p, v in fresh.items()}
    params = {path: value.astype(np.float32) for path, value in params.items()}
    kept = {k: v for k, v in read.params.items() if k.startswith(("vae.", "text_encoder_2."))}
    networks = {name: config for name, config in read.networks.items() if name != "text_encoder"}
    return dataclasses.replace(
        read, networks={**networks, "unet": unet}, params=params | kept,
        tokenizers={"tokens_2": read.tokenizers["tokens_2"]},
        settings={"zero_empty_prompt": False},
    )  # fmt: skip


def torch_params(pipeline):
    return {
        f"{name}.{key.removeprefix('text_model.')}": value.detach().numpy()
        for name in NETWORKS
        if getattr(pipeline, name) is not None
        for key, value in getattr(pipeline, name).named_parameters()
    }


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and np.array_equal(ours[name], value), name


def test_there_and_back_by_way_of_a_workdir(read, written, torch_xl_pipeline):
    import diffusers

    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(written)
    assert_same_bits(torch_params(pipeline), torch_params(torch_xl_pipeline))
    assert len(list((written / "unet").glob("*.safetensors"))) > 1
    assert pipeline.config.force_zeros_for_empty_prompt is True
    assert type(pipeline.text_encoder_2).__name__ == "CLIPTextModelWithProjection"
    for name in ("tokenizer", "tokenizer_2"):
        ours, theirs = getattr(pipeline, name), getattr(torch_xl_pipeline, name)
        assert ours(PROMPTS, padding="max_length") == theirs(PROMPTS, padding="max_length")
    again = read_diffusers(written)
    assert again.networks == read.networks and again.settings["zero_empty_prompt"]
    assert_same_bits(again.params, read.params)


def test_second_tokenizer_pads_with_its_own_token(read, torch_xl_pipeline):
    tokens = read.tokenizers["tokens_2"].encode(PROMPTS)
    theirs = torch_xl_pipeline.tokenizer_2(PROMPTS, padding="max_length", return_tensors="np")
    np.testing.assert_array_equal(tokens, theirs["input_ids"])
    assert tokens[0, -1] == 0 != read.tokenizers["tokens"].encode(PROMPTS)[0, -1]


@pytest.mark.parametrize(
    "zeros, clips", [(True, True), pytest.param(False, False, marks=pytest.mark.slow)]
)
def test_the_folder_draws_the_same_picture_in_torch_and_here(written, zeros, clips, tmp_path):
    import diffusers
    import torch

    folder = shutil.copytree(written, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = zeros
    (folder / "model_index.json").write_text(json.dumps(index))
    if clips:  # which pipelines of SD correct, with the offset, and those of SDXL do not
        file = folder / "scheduler" / "scheduler_config.json"
        changes = {"clip_sample": True, "clip_sample_range": 1.5, "steps_offset": 0}
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    with torch.no_grad():
        theirs = pipeline(
            PROMPTS,
            height=16,
            width=16,
            latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
            guidance_scale=5.0,
            num_inference_steps=4,
            output_type="np",
        ).images

    read = read_diffusers(folder)
    assert read.settings == {"zero_empty_prompt": zeros}
    tokenizers = read.tokenizers
    generate = make_generator(
        read, Drawing(SamplerConfig(**{**vars(read.sampler), "steps": 4}), guidance=5.0)
    )
    with jax.default_matmul_precision("highest"):
        ours, _ = generate(
            read.params,
            encode_text(tokenizers, PROMPTS),
            encode_text(tokenizers, [""] * 2),
            noise,
            jax.random.split(jax.random.key(0), 2),
        )
    inside = (theirs > 0) & (theirs < 1)
    assert inside.mean() > 0.5 and theirs.std() > 0.05, "the pictures are too plain to prove much"
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-3


def test_refiner_there_and_back(refiner, tmp_path):
    import diffusers

    save_workdir(tmp_path / "workdir", refiner)
    assert_same_bits(read_any(tmp_path / "workdir").params, refiner.params)
    write_diffusers(tmp_path / "out", read_any(tmp_path / "workdir"))
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.text_encoder is None and pipeline.tokenizer is None
    assert pipeline.config.requires_aesthetics_score is True
    assert pipeline.config.force_zeros_for_empty_prompt is False
    again = read_diffusers(tmp_path / "out")
    assert "text_encoder" not in again.networks and again.denoiser == refiner.denoiser
    assert_same_bits(again.params, refiner.params)
    picture = np.full((1, 16, 16, 3), 0.5, np.float32)
    images = pipeline(
        ["a red circle"], image=picture, strength=0.5, num_inference_steps=4, output_type="np"
    ).images
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()


def test_base_loads_as_img2img(written):
    import diffusers

    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(written)
    assert pipeline.config.requires_aesthetics_score is False


def test_incomplete_xl_is_not_written(read, tmp_path):
    part = dataclasses.replace(read, tokenizers={"tokens": read.tokenizers["tokens"]})
    with pytest.raises(ModelError, match="needs tokenizer_2 as well"):
        write_diffusers(tmp_path / "out", part)
    with pytest.raises(ModelError, match="tokenizer_2 missing"):
        save_workdir(tmp_path / "workdir", part)


def test_second_encoder_alone(xl_folder, tmp_path):
    one = read_any(xl_folder / "text_encoder_2")
    assert (
        list(one.networks) == ["text_encoder_2"]
        and one.networks["text_encoder_2"].projection_dim == 20
    )
    write_diffusers(tmp_path / "out", one)
    assert_same_bits(read_any(tmp_path / "out").params, one.params)
