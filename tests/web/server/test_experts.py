"""Experts by noise level behind a server: the pictures of `sdjax.sample`."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from sdjax import sample, serve
from sdjax.checkpoints.reading import read_any
from sdjax.errors import UserError
from sdjax.formats.adapters.writing import write_kohya_adapter
from sdjax.formats.diffusers_folder import write_diffusers
from sdjax.web.server.requests import PictureRequest
from tests.checkpoints.adapters import samples

OPTIONS = ("--steps=4", "--guidance=3", "--sampler=dpmpp_2m")


def loaded(*options):
    return serve._loaded(serve.parser().parse_args([*OPTIONS, *options]))[0]


def drawn(model, **more):
    own = model.own
    request = PictureRequest("a circle", "", 7, 16, 16, own.sampler, own.guidance, **more)
    return model.draw([request], lambda i, x0: np.zeros(1, bool))[0]


@pytest.fixture(scope="module")
def other(pipeline_folder, tmp_path_factory):
    """A folder of the same model with another UNet."""
    model = read_any(pipeline_folder)
    params = {k: v * 1.3 if k.startswith("unet.") else v for k, v in model.params.items()}
    folder = tmp_path_factory.mktemp("other") / "model"
    write_diffusers(folder, dataclasses.replace(model, params=params))
    return folder


def test_served_experts_draw_what_sample_draws(pipeline_folder, other, tmp_path):
    options = (f"--model={pipeline_folder}", f"--expert={other}:0.5:1",
               f"--expert={pipeline_folder}:0:0.5")  # fmt: skip
    model = loaded(*options)
    ours = drawn(model)
    held = [path for path in model.params if path.endswith("unet.conv_in.kernel")]
    assert sorted(held) == ["2:unet.conv_in.kernel", "unet.conv_in.kernel"]
    assert sample.main([
        *OPTIONS, *options, "--prompts=a circle", "--seed=7", "--height=16", "--width=16",
        f"--output={tmp_path}",
    ]) == 0  # fmt: skip
    theirs = np.asarray(Image.open(tmp_path / "00000.png"), int)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.abs(ours.astype(int) - drawn(loaded(options[0]))).max() > 1, "the expert draws"


def test_adapters_of_experts_are_weighed_as_by_sample(pipeline_folder, other, tmp_path):
    file, base = tmp_path / "style.safetensors", read_any(pipeline_folder)
    write_kohya_adapter(file, base, samples.lora_adapter(base, ranks=(2,)), {})
    options = (f"--model={pipeline_folder}", f"--expert={other}:0.5:1",
               f"--expert={pipeline_folder}:0:0.5")  # fmt: skip
    model = loaded(*options, f"--lora={file}:0")
    ours = drawn(model, adapters=(0.7,))
    assert sample.main([
        *OPTIONS, *options, f"--lora={file}:0.7", "--prompts=a circle", "--seed=7", "--height=16",
        "--width=16", f"--output={tmp_path}",
    ]) == 0  # fmt: skip
    theirs = np.asarray(Image.open(tmp_path / "00000.png"), int)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.abs(ours.astype(int) - drawn(model)).max() > 1


def test_experts_of_another_shape_or_vocabulary_are_not_served(pipeline_folder, other, tmp_path):
    model = read_any(other)
    unet = dataclasses.replace(model.denoiser, sample_size=16)
    write_diffusers(
        tmp_path / "other",
        dataclasses.replace(model, networks={**model.networks, "unet": unet}),
    )
    assert (
        json.loads((tmp_path / "other" / "unet" / "config.json").read_text())["sample_size"] == 16
    )
    with pytest.raises(UserError, match="other networks or tokenizers than --model"):
        loaded(f"--model={pipeline_folder}", f"--expert={tmp_path / 'other'}:0:1")
    with pytest.raises(UserError, match="no expert is for the noise levels 0 to 0.5"):
        loaded(f"--model={pipeline_folder}", f"--expert={other}:0.5:1")
