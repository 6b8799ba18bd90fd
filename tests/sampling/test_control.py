"""Drawing with ControlNets: what diffusers' pipelines draw of the same noise and conditions."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import sample
from sdjax.errors import UserError
from sdjax.families import sd
from sdjax.families.family import Model
from sdjax.models.controlnet.config import ControlNetConfig
from sdjax.models.vae import VAEConfig
from sdjax.sampling.control import Control, bind_controls
from sdjax.sampling.control_options import Asked, parse
from tests.conftest import randomise
from tests.sampling.test_pictures import LEVELS, remade

PROMPTS = ["a red circle", "a green star"]
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SMALL = ControlNetConfig(conditioning_embedding_out_channels=(4, 8))


def control_of(unet, seed, **changes):
    """A ControlNet with random weights, its convolutions at zero too."""
    own = {"conditioning_embedding_out_channels": (4, 8), **changes}
    made = diffusers.ControlNetModel.from_unet(
        unet, load_weights_from_unet=False,
        conditioning_embedding_out_channels=own["conditioning_embedding_out_channels"],
    )  # fmt: skip
    made.register_to_config(**own)
    randomise(made, seed)
    return made.eval()


@pytest.fixture(scope="module")
def folder(torch_pipeline, torch_xl_pipeline, tmp_path_factory):
    """Two pipelines, ControlNets of each, conditions and noise."""
    folder = tmp_path_factory.mktemp("controls")
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_spacing="leading", steps_offset=1, **SCHEDULE
    )
    pipelines = {
        "sd": torch_pipeline,
        "sdxl": remade(torch_xl_pipeline, "StableDiffusionXLPipeline", scheduler=scheduler),
    }
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / name)
        for i, changes in enumerate(({}, {}, {"global_pool_conditions": True})):
            control_of(pipeline.unet, 30 + i, **changes).save_pretrained(folder / f"{name}{i}")
    rng = np.random.default_rng(3)
    for i in range(2):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        small.resize((24, 24), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    np.save(folder / "noise.npy", rng.normal(size=(2, 8, 8, 4)).astype(np.float32))
    return folder, pipelines


def theirs(folder, pipelines, kind, nets, images, *, steps, guidance=4.0, **options):
    """What diffusers draws, [2, H, W, 3], times 255."""
    controls = [diffusers.ControlNetModel.from_pretrained(folder / f"{kind}{i}") for i in nets]
    one = len(controls) == 1
    name = f"StableDiffusion{'XL' if kind == 'sdxl' else ''}ControlNetPipeline"
    pipeline = remade(pipelines[kind], name, controlnet=controls[0] if one else controls)
    noise = np.load(folder / "noise.npy").transpose(0, 3, 1, 2)
    with torch.no_grad():
        found = pipeline(
            PROMPTS, image=images, latents=torch.from_numpy(noise), num_inference_steps=steps,
            guidance_scale=guidance, height=16, width=16, output_type="np", **options,
        ).images  # fmt: skip
    inside = (found > 0) & (found < 1)
    assert inside.mean() > 0.4 and found.std() > 0.05, "too plain to prove much"
    return found * 255


def ours(folder, out, kind, *options, steps, guidance=4.0):
    assert 0 == sample.main([
        f"--model={folder / kind}", "--prompts", *PROMPTS, f"--output={out}", f"--steps={steps}",
        f"--guidance={guidance}", f"--latents={folder / 'noise.npy'}", "--height=16",
        "--width=16", *options,
    ])  # fmt: skip
    files = [Image.open(out / f"{i:05d}.png") for i in range(2)]
    return np.stack([np.asarray(file) for file in files]).astype(np.float64), files


CASES = {
    "one": ("sd", (0,), ":0.7", dict(controlnet_conditioning_scale=0.7), 4),
    "guess": ("sd", (0,), "", dict(guess_mode=True), 3),
    "range": (
        "sd", (1,), ":1.2:0.2:0.8",
        dict(controlnet_conditioning_scale=1.2, control_guidance_start=0.2,
             control_guidance_end=0.8), 5,
    ),
    "pooled": ("sd", (2,), "", {}, 3),
    "unguided": ("sd", (0,), "", dict(guidance=1.0), 3),
    "two": (
        "sd", (0, 1), ":0.5", dict(controlnet_conditioning_scale=[0.5, 0.5]), 3,
    ),
    "xl": ("sdxl", (0,), ":0.8:0:0.5",
           dict(controlnet_conditioning_scale=0.8, control_guidance_end=0.5), 4),
    "xl guess": ("sdxl", (1,), "", dict(guess_mode=True), 3),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_the_pipelines_of_diffusers(case, folder, tmp_path):
    place, pipelines = folder
    kind, nets, suffix, options, steps = CASES[case]
    images = [Image.open(place / f"{i}.png") for i in range(2)]
    want = theirs(place, pipelines, kind, nets, images, steps=steps, **options)
    flags = [f"--controlnet={place / f'{kind}{i}'}{suffix}" for i in nets]
    flags += [f"--control_image={place / f'{i}.png'}" for i in range(2)]
    flags += ["--guess_mode"] if options.get("guess_mode") else []
    guidance = options.get("guidance", 4.0)
    found, files = ours(place, tmp_path, kind, *flags, steps=steps, guidance=guidance)
    np.testing.assert_allclose(found, want, atol=LEVELS)
    assert f"{kind}{nets[0]}" in files[0].text["controlnet"]


def test_a_weight_of_zero_draws_what_the_model_draws_and_others_do_not(folder, tmp_path):
    place, _ = folder
    condition = f"--control_image={place / '0.png'}"
    plain, _ = ours(place, tmp_path / "plain", "sd", steps=3)
    for weight, equal in ((0, True), (1, False)):
        steered, _ = ours(
            place, tmp_path / f"{weight}", "sd", f"--controlnet={place / 'sd0'}:{weight}",
            condition, steps=3,
        )  # fmt: skip
        assert np.array_equal(plain, steered) == equal


def test_controlnets_go_with_a_picture_to_begin_with(folder, tmp_path):
    place, _ = folder
    flags = [f"--init_image={place / '1.png'}", "--strength=0.6"]
    control = [f"--controlnet={place / 'sd0'}", f"--control_image={place / '0.png'}"]
    plain, _ = ours(place, tmp_path / "plain", "sd", *flags, steps=5)
    steered, files = ours(place, tmp_path / "steered", "sd", *flags, *control, steps=5)
    assert np.any(plain != steered) and files[1].text["control_image"].count("0.png") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DIR", Asked("DIR")),
        ("DIR:0.5", Asked("DIR", 0.5)),
        ("DIR:0.5:0:0.8", Asked("DIR", 0.5, 0.0, 0.8)),
        ("a:b:1", Asked("a:b", 1.0)),
    ],
)
def test_what_controlnet_asks_for(text, expected):
    assert parse(text) == expected


def test_a_folder_whose_name_ends_in_a_number_is_a_folder(tmp_path):
    (tmp_path / "net:0.5").mkdir()
    assert parse(str(tmp_path / "net:0.5")) == Asked(str(tmp_path / "net:0.5"))
    with pytest.raises(UserError, match="ends in two numbers"):
        parse("DIR:0.5:0.1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--control_image={0}/0.png"], "--control_image is for --controlnet"),
        (["--guess_mode"], "--guess_mode is for --controlnet"),
        (["--controlnet={0}/sd0"], "give --control_image=FILE"),
        (["--controlnet={0}/sd0", *["--control_image={0}/0.png"] * 3], "given 3 times for 1"),
        (["--controlnet={0}/sdxl0", "--control_image={0}/0.png"], "is not for this model: its"),
        (["--controlnet={0}/sd", "--control_image={0}/0.png"], "config.json"),
        (["--controlnet={0}/sd/vae", "--control_image={0}/0.png"], "of a 'AutoencoderKL'"),
        (["--controlnet={0}/nowhere", "--control_image={0}/0.png"], "no such folder"),
        (["--controlnet={0}/sd0:1:0.9:0.2", "--control_image={0}/0.png"], "0 <= START < END"),
        (["--controlnet={0}/sd0:nan", "--control_image={0}/0.png"], "weight is nan"),
        (["--controlnet={0}/sd0:1:0.1:0.2", "--control_image={0}/0.png"], "no whole step lies"),
        (["--controlnet={0}/sd0", "--control_image={0}/noise.npy"], "cannot be used"),
        (["--controlnet={0}/sd0", "--control_image={0}/0.png", "--interpolate=2"],
         "--interpolate does not go with --controlnet"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(folder, tmp_path, capsys, options, words):
    place, _ = folder
    given = [option.format(place) for option in options]
    common = [f"--model={place / 'sd'}", f"--output={tmp_path / 'out'}", "--steps=4"]
    assert sample.main([*common, "--prompts", *PROMPTS, *given]) == 2
    assert words in capsys.readouterr().err


def test_networks_of_another_shape_are_refused():
    vae = VAEConfig(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    unet = sd.UNetConfig()
    model = Model(sd.SD, {"unet": unet, "vae": vae})
    bind_controls(model, [Control("a", SMALL)], "float32")
    for changes, words in (
        ({"cross_attention_dim": 1024}, "cross_attention_dim is 1024, the UNet's 768"),
        ({"conditioning_embedding_out_channels": (4,)}, "to 1/1 .* 1/2; expected 2 widths"),
    ):
        other = dataclasses.replace(SMALL, **changes)
        with pytest.raises(UserError, match=words):
            bind_controls(model, [Control("a", other)], "float32")
    nine = dataclasses.replace(unet, in_channels=9)
    with pytest.raises(UserError, match="in_channels is 4, the UNet's 9"):
        bind_controls(Model(sd.SD, {"unet": nine, "vae": vae}), [Control("a", SMALL)], "float32")
