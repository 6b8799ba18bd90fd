"""Drawing with IP-Adapters: what diffusers draws that has loaded the same files."""

import dataclasses
import math

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from sdjax import sample
from sdjax.families.beside.ip_adapter import PART, crossings
from sdjax.families.bind import abstract_params
from sdjax.formats.ip_adapter import FILE, write_ip_adapter
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.models.unet_config import UNetConfig
from tests.conftest import randomise
from tests.sampling.test_control import PROMPTS, SCHEDULE, control_of, ours
from tests.sampling.test_pictures import LEVELS, remade

DIM = 12


def adapter_for(unet, folder, seed, **changes):
    """A file of an IP-Adapter with random weights, and its folder."""
    config, _ = UNetConfig.from_json(dict(unet.config))
    widths = tuple(width for _, width in crossings(config))
    shape = IPAdapterConfig(DIM, config.cross_attention_dim, 4, widths)
    shape = dataclasses.replace(shape, **changes)
    rng = np.random.default_rng(seed)
    params = {
        path: (rng.normal(size=v.shape) * (2 / math.prod(v.shape[:-1])) ** 0.5).astype(np.float32)
        for path, v in abstract_params(PART, shape).items()
    }
    write_ip_adapter(folder, params)


@pytest.fixture(scope="module")
def folder(torch_pipeline, torch_xl_pipeline, tmp_path_factory):
    """Two pipelines, adapters of each, an image tower, pictures to see, and noise."""
    folder = tmp_path_factory.mktemp("ip")
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_spacing="leading", steps_offset=1, **SCHEDULE
    )
    pipelines = {
        "sd": torch_pipeline,
        "sdxl": remade(torch_xl_pipeline, "StableDiffusionXLPipeline", scheduler=scheduler),
    }
    for i, (name, pipeline) in enumerate(pipelines.items()):
        pipeline.save_pretrained(folder / name)
        for j in range(2 - i):
            adapter_for(pipeline.unet, folder / f"{name}{j}", 40 + 2 * i + j)
    plus = {"embedding_dim": 16, "resampler_layers": 4, "resampler_width": 64}
    adapter_for(torch_pipeline.unet, folder / "sdplus", 50, **plus)
    control_of(torch_pipeline.unet, 30).save_pretrained(folder / "control")
    tower = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            image_size=12, patch_size=4, hidden_act="gelu", projection_dim=DIM,
        )
    )  # fmt: skip
    randomise(tower, 9)
    tower.eval().save_pretrained(folder / "tower")
    rng = np.random.default_rng(3)
    for i, size in enumerate([(40, 24), (20, 31)]):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    np.save(folder / "noise.npy", rng.normal(size=(2, 8, 8, 4)).astype(np.float32))
    return folder, pipelines, tower


def theirs(folder, pipeline, tower, files, scale, images, *, steps, guidance=4.0):
    """What diffusers draws, [2, H, W, 3], times 255."""
    unet = diffusers.UNet2DConditionModel.from_config(pipeline.unet.config)
    unet.load_state_dict(pipeline.unet.state_dict())
    pipeline = remade(
        pipeline, type(pipeline).__name__, unet=unet.eval(), image_encoder=tower,
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}
        ),
    )  # fmt: skip
    pipeline.load_ip_adapter([str(f) for f in files], subfolder="", weight_name=[FILE] * len(files))
    pipeline.set_ip_adapter_scale(scale)
    noise = np.load(folder / "noise.npy").transpose(0, 3, 1, 2)
    made = []
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            made.append(pipeline(
                prompt, ip_adapter_image=[images[i]] if len(files) == 1 else images,
                latents=torch.from_numpy(noise[i : i + 1]), num_inference_steps=steps,
                guidance_scale=guidance, height=16, width=16, output_type="np",
            ).images)  # fmt: skip
    found = np.concatenate(made)
    inside = (found > 0) & (found < 1)
    assert inside.mean() > 0.4 and found.std() > 0.05, "too plain to prove much"
    return found * 255


# (family, adapters, what follows them, scale of diffusers, guidance)
CASES = {
    "one": ("sd", (0,), ":0.7", 0.7, 4.0),
    "two, unguided": ("sd", (0, 1), ":0.5", [0.5, 0.5], 1.0),
    "plus": ("sd", ("plus",), ":0.8", 0.8, 4.0),
    "xl": ("sdxl", (0,), "", 1.0, 4.0),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_the_pipelines_of_diffusers(case, folder, tmp_path):
    """FT-54. Pictures of two shapes go through the image processor."""
    place, pipelines, tower = folder
    kind, nets, suffix, scale, guidance = CASES[case]
    images = [Image.open(place / f"{i}.png") for i in range(2)]
    files = [place / f"{kind}{i}" for i in nets]
    want = theirs(
        place, pipelines[kind], tower, files, scale, images, steps=3, guidance=guidance
    )  # fmt: skip
    flags = [f"--ip_adapter={file / FILE}{suffix}" for file in files]
    flags += [f"--ip_image={place / f'{i}.png'}" for i in range(2)]
    found, drawn = ours(
        place, tmp_path, kind, *flags, f"--image_encoder={place / 'tower'}", steps=3,
        guidance=guidance,
    )  # fmt: skip
    np.testing.assert_allclose(found, want, atol=LEVELS)
    assert "0.png" in drawn[0].text["ip_image"]


def test_a_weight_of_zero_shows_nothing_and_a_controlnet_goes_with_it(folder, tmp_path):
    place, _, _ = folder
    control = [f"--controlnet={place / 'control'}", f"--control_image={place / '0.png'}"]
    alone, _ = ours(place, tmp_path / "alone", "sd", *control, steps=4)
    shown = [f"--ip_image={place / '1.png'}", f"--image_encoder={place / 'tower'}"]
    for suffix, equal in ((":0", True), (":1:0.5:1", False)):
        both, _ = ours(
            place, tmp_path / suffix[1:], "sd", *control, *shown,
            f"--ip_adapter={place / 'sd0' / FILE}{suffix}", steps=4,
        )  # fmt: skip
        assert np.array_equal(alone, both) == equal


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ip_image={0}/0.png"], "--ip_image is for --ip_adapter"),
        (["--image_encoder={0}/tower"], "--image_encoder is for --ip_adapter"),
        (["--ip_adapter={0}/sd0/ip_adapter.safetensors"], "give --ip_image=FILE and"),
        (["--ip_adapter={0}/sd0/ip_adapter.safetensors", *["--ip_image={0}/0.png"] * 3,
          "--image_encoder={0}/tower"], "--ip_image is given 3 times for 1 of --ip_adapter"),
        (["--ip_adapter={0}/sdxl0/ip_adapter.safetensors", "--ip_image={0}/0.png",
          "--image_encoder={0}/tower"], "makes words of 56 numbers, and the UNet reads 24"),
        (["--ip_adapter={0}/control", "--ip_image={0}/0.png", "--image_encoder={0}/tower"],
         "is no IP-Adapter"),
        (["--controlnet={0}/sd0/ip_adapter.safetensors", "--control_image={0}/0.png"],
         "is an IP-Adapter; give it as --ip_adapter"),
        (["--ip_adapter={0}/sd0/ip_adapter.safetensors", "--ip_image={0}/0.png",
          "--image_encoder={0}/nowhere"], "no such folder; expected that of a CLIP image tower"),
        (["--ip_adapter={0}/sd0/ip_adapter.safetensors", "--ip_image={0}/noise.npy",
          "--image_encoder={0}/tower"], "cannot be used"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(folder, tmp_path, capsys, options, words):
    place, _, _ = folder
    given = [option.format(place) for option in options]
    common = [f"--model={place / 'sd'}", f"--output={tmp_path / 'out'}", "--steps=4"]
    assert sample.main([*common, "--prompts", *PROMPTS, *given]) == 2
    assert words in capsys.readouterr().err
