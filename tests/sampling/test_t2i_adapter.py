"""Drawing with T2I-Adapters: what diffusers' pipelines draw of the same noise and conditions."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import sample
from sdjax.errors import UserError
from sdjax.families.family import Model
from sdjax.families.sd import SD, UNetConfig
from sdjax.models.t2i_adapter.config import T2IAdapterConfig
from sdjax.models.vae import VAEConfig
from sdjax.sampling.control import Control, bind_controls
from tests.conftest import randomise
from tests.sampling.test_control import PROMPTS, SCHEDULE, control_of, ours
from tests.sampling.test_pictures import LEVELS, remade

FULL = dict(channels=[16, 32], downscale_factor=2)
XL = dict(channels=[16, 32, 32, 32], downscale_factor=4, adapter_type="full_adapter_xl")


@pytest.fixture(scope="module")
def folder(torch_pipeline, torch_xl_pipeline, tmp_path_factory):
    """Two pipelines, adapters for each, conditions and noise."""
    folder = tmp_path_factory.mktemp("adapters")
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_spacing="leading", steps_offset=1, **SCHEDULE
    )
    pipelines = {
        "sd": torch_pipeline,
        "sdxl": remade(torch_xl_pipeline, "StableDiffusionXLPipeline", scheduler=scheduler),
    }
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / name)
    control_of(torch_pipeline.unet, 30).save_pretrained(folder / "control")
    shapes = {"sd0": FULL, "sd1": FULL, "sdgrey": {**FULL, "in_channels": 1}, "sdxl0": XL}
    for seed, (name, shape) in enumerate(shapes.items()):
        adapter = diffusers.T2IAdapter(**shape).eval()
        randomise(adapter, 40 + seed)
        adapter.save_pretrained(folder / name)
    rng = np.random.default_rng(3)
    for i in range(2):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        small.resize((24, 24), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        Image.open(folder / f"{i}.png").convert("L").save(folder / f"grey{i}.png")
    np.save(folder / "noise.npy", rng.normal(size=(2, 8, 8, 4)).astype(np.float32))
    return folder, pipelines


def theirs(folder, pipelines, kind, nets, images, *, steps, guidance=4.0, **options):
    """What diffusers draws, [2, H, W, 3], times 255; it takes one picture for all prompts."""
    adapters = [diffusers.T2IAdapter.from_pretrained(folder / f"{kind}{i}") for i in nets]
    one = len(adapters) == 1
    name = f"StableDiffusion{'XL' if kind == 'sdxl' else ''}AdapterPipeline"
    pipeline = remade(pipelines[kind], name, adapter=adapters[0] if one else adapters)
    noise = np.load(folder / "noise.npy").transpose(0, 3, 1, 2)
    with torch.no_grad():
        found = np.concatenate([
            pipeline(
                prompt, image=image, latents=torch.from_numpy(noise[i : i + 1]),
                num_inference_steps=steps, guidance_scale=guidance, height=16, width=16,
                output_type="np", **options,
            ).images
            for i, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True))
        ])  # fmt: skip
    inside = (found > 0) & (found < 1)
    assert inside.mean() > 0.4 and found.std() > 0.05, "too plain to prove much"
    return found * 255


# (family, adapters, what follows them, options of diffusers, steps)
CASES = {
    "one": ("sd", (0,), ":0.7", dict(adapter_conditioning_scale=0.7), 3),
    "unguided": ("sd", (0,), "", dict(guidance=1.0), 3),
    "grey": ("sd", ("grey",), "", {}, 3),
    "two": ("sd", (0, 1), ":0.5", dict(adapter_conditioning_scale=[0.5, 0.5]), 3),
    "xl": ("sdxl", (0,), ":0.8:0:0.6",
           dict(adapter_conditioning_scale=0.8, adapter_conditioning_factor=0.6), 4),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_the_pipelines_of_diffusers(case, folder, tmp_path):
    place, pipelines = folder
    kind, nets, suffix, options, steps = CASES[case]
    files = [place / f"{'grey' if case == 'grey' else ''}{i}.png" for i in range(2)]
    images = [Image.open(file) for file in files]
    # Of two adapters each sees one picture, for both prompts.
    shown = [images, images] if len(nets) == 2 else images
    want = theirs(place, pipelines, kind, nets, shown, steps=steps, **options)
    flags = [f"--t2i_adapter={place / f'{kind}{i}'}{suffix}" for i in nets]
    flags += [f"--control_image={file}" for file in files]
    guidance = options.get("guidance", 4.0)
    found, drawn = ours(place, tmp_path, kind, *flags, steps=steps, guidance=guidance)
    np.testing.assert_allclose(found, want, atol=LEVELS)
    assert f"{kind}{nets[0]}" in drawn[0].text["controlnet"]


def test_adapters_go_with_controlnets_and_with_a_picture_to_begin_with(folder, tmp_path):
    place, _ = folder
    begun = [f"--init_image={place / '1.png'}", "--strength=0.7"]
    control = [f"--controlnet={place / 'control'}", f"--control_image={place / '0.png'}"]
    condition = f"--control_image={place / '1.png'}"
    alone, _ = ours(place, tmp_path / "alone", "sd", *begun, *control, steps=3)
    for weight, equal in ((0, True), (1, False)):
        both, _ = ours(
            place, tmp_path / f"{weight}", "sd", *begun, *control,
            f"--t2i_adapter={place / 'sd0'}:{weight}", condition, steps=3,
        )  # fmt: skip
        assert np.array_equal(alone, both) == equal


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--t2i_adapter={0}/sd0"], "give --control_image=FILE"),
        (["--t2i_adapter={0}/sdxl0", "--control_image={0}/0.png"],
         "is not for this model: of 'full_adapter_xl'"),
        (["--t2i_adapter={0}/sd0", "--control_image={0}/0.png", "--guess_mode"],
         "--guess_mode is for ControlNets, and there is none"),
        (["--t2i_adapter={0}/sd0:1:0.9:0.2", "--control_image={0}/0.png"],
         "a T2I-Adapter's steps are 0.9 to 0.2"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(folder, tmp_path, capsys, options, words):
    place, _ = folder
    given = [option.format(place) for option in options]
    common = [f"--model={place / 'sd'}", f"--output={tmp_path / 'out'}", "--steps=4"]
    assert sample.main([*common, "--prompts", *PROMPTS, *given]) == 2
    assert words in capsys.readouterr().err


def test_a_size_between_its_patches_is_refused(folder, tmp_path, capsys):
    place, _ = folder
    assert 2 == sample.main([
        f"--model={place / 'sdxl'}", f"--output={tmp_path / 'out'}", "--prompts=a", "--steps=2",
        f"--t2i_adapter={place / 'sdxl0'}", f"--control_image={place / '0.png'}", "--height=18",
    ])  # fmt: skip
    assert "reads patches of 4 pixels; expected multiples, got 18 x 16" in capsys.readouterr().err


def test_adapters_of_another_shape_are_refused():
    model = Model(SD, {"unet": UNetConfig(), "vae": VAEConfig()})
    bind_controls(model, [Control("a", T2IAdapterConfig())], "float32")
    fewer = T2IAdapterConfig(channels=(320, 640))
    bind_controls(model, [Control("a", fewer)], "float32")
    nine = Model(SD, {"unet": dataclasses.replace(UNetConfig(), in_channels=9), "vae": VAEConfig()})
    with pytest.raises(UserError, match="latents alone; the model's reads 9 channels, 4 of them"):
        bind_controls(nine, [Control("a", T2IAdapterConfig())], "float32")
    other = T2IAdapterConfig(downscale_factor=16)
    with pytest.raises(UserError, match="320 at 1/16, .*; the UNet has 320 at 1/8, 640 at 1/16"):
        bind_controls(model, [Control("a", other)], "float32")
