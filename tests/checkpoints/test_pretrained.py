"""Folders of diffusers: read and written without loss, and what is wrong with them said at once."""

import copy
import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints.reading import read_any
from sdjax.diffusion.guidance import guided
from sdjax.diffusion.samplers import SamplerConfig, sample
from sdjax.diffusion.schedules import make_schedule
from sdjax.formats.diffusers_folder import read_diffusers, write_diffusers
from sdjax.formats.folders import ModelError
from sdjax.models import weights
from sdjax.models.clip import CLIPText
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE, unscale_latents
from tests.odd_names import ODD

PROMPTS = ["a red circle", "a green star!", ""]


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose name is taken for no pattern, URL or word of a shell."""
    (tmp_path / ODD).mkdir()
    return tmp_path / ODD


@pytest.fixture(scope="module")
def read(pipeline_folder):
    return read_diffusers(pipeline_folder)


@pytest.fixture
def folder(pipeline_folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(pipeline_folder, tmp_path / "copy")


def torch_params(pipeline):
    """{path: array in torch's layout} of a torch pipeline, under our component names."""
    parts = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
    return {
        f"{name}.{key.removeprefix('text_model.')}": value.detach().numpy()
        for name, model in parts.items()
        for key, value in model.named_parameters()
    }


def as_torch(pretrained):
    """The parameters of ours, likewise."""
    return {
        f"{name}.{key}": value
        for name in pretrained.networks
        for key, value in weights.to_diffusers(pretrained.component(name)).items()
    }


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and np.array_equal(ours[name], value), name


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- reading and writing -----------------------------------------------------------------------


def test_pipeline_is_read_to_the_bit(read, torch_pipeline):
    assert_same_bits(as_torch(read), torch_params(torch_pipeline))
    assert all(value.dtype == np.float32 for value in read.params.values())
    assert read.denoiser.block_out_channels == (16, 32) and read.vae.sample_size == 16
    assert read.networks["text_encoder"].hidden_act == "quick_gelu"
    assert read.schedule.kind == "scaled_linear" and read.prediction_type == "epsilon"
    assert read.sampler.name == "ddim" and read.sampler.steps_offset == 1
    tokens = torch_pipeline.tokenizer(
        PROMPTS, padding="max_length", truncation=True, return_tensors="np"
    )["input_ids"]
    np.testing.assert_array_equal(read.tokenizers["tokens"].encode(PROMPTS), tokens)
    assert any("force_upcast" in name for name in read.ignored)


def test_written_pipeline_loads_in_torch_to_the_bit(read, torch_pipeline, tmp_path):
    import diffusers

    write_diffusers(tmp_path / "out", read)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert_same_bits(torch_params(pipeline), torch_params(torch_pipeline))
    assert type(pipeline.tokenizer).__name__ == "CLIPTokenizer"
    np.testing.assert_array_equal(
        read.tokenizers["tokens"].encode(PROMPTS),
        pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="np")["input_ids"],
    )
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    for name in ("beta_start", "beta_schedule", "steps_offset", "set_alpha_to_one", "clip_sample"):
        assert pipeline.scheduler.config[name] == torch_pipeline.scheduler.config[name], name
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "no temporary folder is left"


def test_clip_weights_are_written_with_the_prefix_that_transformers_4_needs(read, tmp_path):
    write_diffusers(tmp_path / "out", read)
    names = weights.load_file(tmp_path / "out/text_encoder/model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    config = json.loads((tmp_path / "out/text_encoder/config.json").read_text())
    assert config["architectures"] == ["CLIPTextModel"]
    assert config["model_type"] == "clip_text_model"
    again = read_diffusers(tmp_path / "out")
    assert again.text_encoders == read.text_encoders
    assert_same_bits(again.params, read.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_written_and_read_exactly(read, tmp_path, dtype):
    import diffusers
    import torch

    write_diffusers(tmp_path / "out", read, dtype=dtype)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "out", torch_dtype=getattr(torch, dtype)
    )
    exact = as_torch(read)
    for name, model in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder)):
        for key, value in model.named_parameters():
            key = f"{name}.{key.removeprefix('text_model.')}"
            rounded = torch.from_numpy(exact[key]).to(getattr(torch, dtype))
            assert torch.equal(value, rounded), key
    once = read_diffusers(tmp_path / "out")
    write_diffusers(tmp_path / "again", once, dtype=dtype)
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_float16_overflow_is_an_error(read, tmp_path):
    params = dict(read.params)
    params["unet.conv_in.bias"] = params["unet.conv_in.bias"] + 7e4
    big = type(read)(**{**vars(read), "params": params})
    with pytest.raises(ModelError, match=r"unet: conv_in.bias reaches 7e\+04.*bfloat16"):
        write_diffusers(tmp_path / "out", big, dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_sharded_weights_and_variants_are_read(torch_pipeline, read, tmp_path, variant):
    torch_pipeline.save_pretrained(tmp_path, variant=variant or None, max_shard_size="40KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    assert_same_bits(read_diffusers(tmp_path).params, read.params)
    assert_same_bits(read_diffusers(tmp_path, variant=variant).params, read.params)


def test_shards_are_written_as_torch_writes_them(torch_pipeline, read, tmp_path):
    import diffusers

    write_diffusers(tmp_path / "ours", read, max_shard_size="40KB")
    torch_pipeline.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    name = "unet/diffusion_pytorch_model.safetensors.index.json"
    ours, theirs = (json.loads((tmp_path / d / name).read_text()) for d in ("ours", "theirs"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    files = sorted((tmp_path / "ours" / "unet").glob("*.safetensors"))
    assert {f.name for f in files} == set(ours["weight_map"].values()) and len(files) > 2
    largest = max(v.size * 4 for k, v in read.params.items() if k.startswith("unet."))
    for file in files:
        tensors = weights.load_file(file)
        assert sum(v.nbytes for v in tensors.values()) <= max(40_000, largest), file
        assert all(ours["weight_map"][key] == file.name for key in tensors)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert_same_bits(torch_params(pipeline), torch_params(torch_pipeline))
    assert_same_bits(read_diffusers(tmp_path / "ours").params, read.params)
    with pytest.raises(ModelError, match="max_shard_size is '5 apples'; expected a size as"):
        write_diffusers(tmp_path / "out", read, max_shard_size="5 apples")


def test_variants_are_chosen_not_guessed(folder, read):
    plain = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(plain, plain.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    assert_same_bits(read_diffusers(folder).params, read.params)
    plain.rename(plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(ModelError, match="several variants and none without: fp16, non_ema"):
        read_diffusers(folder)
    with pytest.raises(ModelError, match="no weights of variant 'bf16'.*'fp16', 'non_ema'"):
        read_diffusers(folder, components=("vae",), variant="bf16")
    found = read_diffusers(folder, components=("vae",), variant="fp16")
    assert_same_bits(found.params, {k: v for k, v in read.params.items() if k[:4] == "vae."})


def test_one_network_alone(pipeline_folder, read, tmp_path):
    for name in ("unet", "vae", "text_encoder"):
        one = read_any(pipeline_folder / name)
        assert list(one.networks) == [name] and one.schedule is None and not one.tokenizers
        write_diffusers(tmp_path / name, one)
        assert sorted(file.name for file in (tmp_path / name).iterdir())[0] == "config.json"
        assert_same_bits(read_any(tmp_path / name).params, one.params)
    part = read_any(pipeline_folder, components=("vae",))
    assert list(part.networks) == ["vae"] and not part.tokenizers
    with pytest.raises(ModelError, match="holds a vae; expected unet"):
        read_any(pipeline_folder / "vae", components=("unet",))


def test_incomplete_pipeline_is_not_written(read, tmp_path):
    networks = {name: config for name, config in read.networks.items() if name != "vae"}
    part = dataclasses.replace(read, networks=networks, tokenizers={})
    with pytest.raises(ModelError, match="needs vae, tokenizer as well"):
        write_diffusers(tmp_path / "out", part)


def test_only_folders_of_networks_are_replaced(read, tmp_path):
    write_diffusers(tmp_path / "out", read)
    with pytest.raises(ModelError, match="not empty"):
        write_diffusers(tmp_path / "out", read)
    (tmp_path / "out" / "extra").touch()
    write_diffusers(tmp_path / "out", read, overwrite=True)
    assert not (tmp_path / "out" / "extra").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ModelError, match="is not replaced"):
        write_diffusers(tmp_path / "mine", read, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_failed_write_leaves_the_earlier_folder(read, tmp_path, monkeypatch):
    write_diffusers(tmp_path / "out", read)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdjax.formats.weight_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_diffusers(tmp_path / "out", read, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert_same_bits(read_diffusers(tmp_path / "out").params, read.params)


def test_inpainting_unet_makes_an_inpainting_pipeline(read, tmp_path):
    unet = dataclasses.replace(read.denoiser, in_channels=9)
    fresh = weights.init(UNet, unet, jax.random.key(0))
    params = {k: v for k, v in read.params.items() if not k.startswith("unet.")}
    params |= {f"unet.{path}": np.asarray(value) for path, value in fresh.items()}
    networks = {**read.networks, "unet": unet}
    write_diffusers(tmp_path / "out", dataclasses.replace(read, networks=networks, params=params))
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    assert read_diffusers(tmp_path / "out").denoiser.in_channels == 9


# ---- what is wrong -------------------------------------------------------------------------------


def test_all_problems_of_all_networks_are_reported_at_once(folder):
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = weights.load_file(unet)
    tensors["conv_in.bias"] = tensors["conv_in.bias"][:3]
    tensors["conv_in.oops"] = tensors.pop("conv_out.bias")
    weights.save_file(tensors, unet)
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-100])
    edit_json(folder / "text_encoder" / "config.json", hidden_act="relu", frobnicate=1)
    edit_json(folder / "scheduler" / "scheduler_config.json", beta_schedule="mystery")
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError) as caught:
        read_diffusers(folder)
    message = str(caught.value)
    for part in (
        "mis-shaped: conv_in.bias is (3,)",
        "missing: conv_out.bias",
        "unused: conv_in.oops",
        f"{vae}: cannot be read as a whole safetensors file",
        "again",
        "frobnicate = 1",
        "scheduler_config.json",
        "mystery",
        "tokenizer.json: not JSON",
    ):
        assert part in message, part


def test_pickles_are_refused_with_a_remedy(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ModelError, match="diffusion_pytorch_model.bin.*save_pretrained"):
        read_diffusers(folder)


def test_missing_parts_are_named(folder):
    shutil.rmtree(folder / "vae")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        read_diffusers(folder)
    assert "vae/config.json: cannot be read" in str(caught.value)
    assert "unet: no weights; expected diffusion_pytorch_model.safetensors" in str(caught.value)


def test_other_pipelines_are_refused(folder):
    edit_json(
        folder / "model_index.json",
        _class_name="StableCascadeCombinedPipeline",
        prior_prior=["diffusers", "StableCascadeUNet"],
    )
    with pytest.raises(ModelError, match="StableCascadeCombinedPipeline with prior_prior"):
        read_diffusers(folder)


def test_safety_checker_is_ignored_and_said(folder):
    entry = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit_json(folder / "model_index.json", safety_checker=entry)
    assert "safety_checker" in read_diffusers(folder).ignored


def test_private_lists_of_the_index_are_ignored_and_listed(folder, read):
    edit_json(folder / "model_index.json", _ignore_files=["a.bin", "b.bin"], _notes=["x", None])
    found = read_diffusers(folder)
    assert {"_ignore_files", "_notes"} <= set(found.ignored)
    assert_same_bits(found.params, read.params)


def test_text_encoder_in_the_file_of_a_whole_clip_is_read_as_transformers_does(folder, read):
    transformers = pytest.importorskip("transformers")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = weights.load_file(file)
    extra = {
        "text_projection.weight": np.ones((24, 24), np.float32),
        "logit_scale": np.float32(2.6),
        "visual_projection.weight": np.ones((24, 24), np.float32),
        "vision_model.post_layernorm.bias": np.ones(3, np.float32),
        "vision_model.post_layernorm.weight": np.ones(3, np.float32),
    }
    weights.save_file({**tensors, **extra}, file)
    theirs = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
    found = read_diffusers(folder)
    ours = weights.to_diffusers(found.component("text_encoder"))
    assert_same_bits(
        ours, {key.removeprefix("text_model."): value.numpy() for key, value in theirs.items()
               if "position_ids" not in key}
    )  # fmt: skip
    listed = {"text_projection.weight", "logit_scale", "vision_model.* (2 tensors)"}
    assert {f"text_encoder: {name}" for name in listed} <= set(found.ignored)
    weights.save_file({**tensors, "text_projection.bias": np.ones(3, np.float32)}, file)
    with pytest.raises(ModelError, match=r"unused: text_projection.bias \(3,\)"):
        read_diffusers(folder)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_folder_of_torch_is_read_to_the_bit(kind, torch_pipeline, read, folder):
    torch = pytest.importorskip("torch")
    unet = copy.deepcopy(torch_pipeline.unet).to(getattr(torch, kind))
    unet.save_pretrained(folder / "unet")
    found = read_diffusers(folder)
    theirs = {key: value.float().numpy() for key, value in unet.state_dict().items()}
    assert_same_bits(weights.to_diffusers(found.component("unet")), theirs)
    assert_same_bits(found.component("vae"), read.component("vae"))
    with pytest.raises(AssertionError):
        assert_same_bits(found.component("unet"), read.component("unet"))


def test_quantised_folders_are_refused(folder):
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = weights.load_file(unet)
    shape = tensors["time_embedding.linear_1.weight"].shape
    tensors["time_embedding.linear_1.weight"] = np.ones(shape, np.int8)
    weights.save_file(tensors, unet)
    with pytest.raises(ModelError, match="no floats: time_embedding.linear_1.weight is int8"):
        read_diffusers(folder)
    scale = {"time_embedding.linear_1.SCB": np.ones(shape[0], np.float32)}
    weights.save_file({**tensors, **scale}, unet)
    words = rf"{re.escape(str(unet))}: its weights are quantised .*linear_1.SCB"
    with pytest.raises(ModelError, match=words):
        read_diffusers(folder)
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_json(folder / "unet" / "config.json", quantization_config=settings)
    edit_json(folder / "text_encoder" / "config.json", quantization_config=settings)
    with pytest.raises(ModelError) as caught:
        read_diffusers(folder)
    for part in ("unet", "text_encoder"):
        where = f"{folder / part / 'config.json'}: quantization_config (bitsandbytes): its weights"
        assert where in str(caught.value)


def test_weights_that_are_not_finite_are_named_with_their_file(folder):
    for part, file, name in (
        ("unet", "diffusion_pytorch_model.safetensors", "conv_in.weight"),
        ("text_encoder", "model.safetensors", None),
    ):
        tensors = weights.load_file(folder / part / file)
        name = name or next(iter(tensors))
        tensors[name] = np.full_like(tensors[name], np.inf if part == "unet" else np.nan)
        weights.save_file(tensors, folder / part / file)
    with pytest.raises(ModelError) as caught:
        read_diffusers(folder)
    message = str(caught.value)
    assert f"{folder / 'unet' / 'diffusion_pytorch_model.safetensors'}: 1 of " in message
    assert "\n  conv_in.weight: 576 Inf among 576 values" in message
    assert f"{folder / 'text_encoder' / 'model.safetensors'}: 1 of " in message
    assert read_diffusers(folder, components=("vae",)).networks.keys() == {"vae"}


def test_folders_of_neither_kind_are_explained(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        read_any(tmp_path / "nowhere")
    (tmp_path / "picture.png").touch()
    with pytest.raises(ModelError, match="neither a diffusers folder.*picture.png"):
        read_any(tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        read_any(tmp_path / "picture.png")
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    with pytest.raises(ModelError, match="ControlNetModel"):
        read_any(tmp_path)


# ---- the same pictures as torch --------------------------------------------------------------


@pytest.mark.parametrize("negative", ["", "a blue square"])
def test_pipeline_draws_the_picture_that_torch_draws(torch_pipeline, read, negative):
    import torch

    noise = np.random.default_rng(0).normal(size=(len(PROMPTS), 8, 8, 4)).astype(np.float32)
    with torch.no_grad():
        theirs = torch_pipeline(
            PROMPTS,
            negative_prompt=[negative] * len(PROMPTS),
            latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
            guidance_scale=7.5,
            num_inference_steps=6,
            output_type="np",
        ).images

    unet, vae, clip = (
        weights.merge(weights.abstract(cls, read.networks[name])[0], read.component(name))
        for cls, name in ((UNet, "unet"), (VAE, "vae"), (CLIPText, "text_encoder"))
    )
    denoise = guided(
        unet,
        clip(jnp.asarray(read.tokenizers["tokens"].encode(PROMPTS))),
        clip(jnp.asarray(read.tokenizers["tokens"].encode([negative] * len(PROMPTS)))),
        scale=7.5,
    )
    x0, _ = sample(
        denoise,
        jnp.asarray(noise),
        schedule=make_schedule(read.schedule),
        prediction_type=read.prediction_type,
        sampler=SamplerConfig(**{**vars(read.sampler), "steps": 6}),
    )
    ours = np.clip(np.asarray(vae.decode(unscale_latents(x0, read.vae))) / 2 + 0.5, 0, 1)
    assert ours.shape == theirs.shape == (3, 16, 16, 3)
    inside = (theirs > 0) & (theirs < 1)
    assert inside.mean() > 0.5 and theirs.std() > 0.05, "the pictures are too plain to prove much"
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(theirs[0] - theirs[1]).max() > 0.05, "the prompt makes a difference"
