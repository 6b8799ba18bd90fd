"""FLUX.1-Kontext, -Canny and -Fill are served, and draw as by command."""

import base64

import diffusers
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from sdjax import sample, serve
from sdjax.web.server.app import make_app
from sdjax.web.server.requests import PictureRequest
from tests.conftest import randomise
from tests.families import torch_transformers
from tests.sampling.test_pictures import drawings, remade
from tests.web.server.test_clients import assert_same_picture, decoded

# {task: (its pipeline, channels of a token, what a client hears that sends no picture)}
MODELS = {
    "edit": ("FluxKontextPipeline", 16, ""),
    "condition": ("FluxControlPipeline", 32, "model follows a picture; send one"),
    "inpaint": ("FluxFillPipeline", 48, "model fills in a picture; send one"),
}
WHOLE = {"edit": "edits a whole picture; send no mask", "condition": "follows a whole picture"}
OPTIONS = {
    "edit": ["--init_image={}/picture.png"],
    "condition": ["--control_image={}/picture.png"],
    "inpaint": ["--init_image={}/picture.png", "--mask_image={}/mask.png"],
}


@pytest.fixture(params=list(MODELS))
def task(request):
    return request.param


@pytest.fixture
def folder(task, torch_pipeline, tmp_path):
    """A folder of the model, a picture and a mask."""
    name, channels, _ = MODELS[task]
    base = torch_transformers.flux(torch_pipeline.tokenizer, tmp_path / "words")
    changed = {**base.transformer.config, "in_channels": channels, "out_channels": 16}
    transformer = diffusers.FluxTransformer2DModel(**changed)
    randomise(transformer.eval(), 61)
    remade(base, name, transformer=transformer).save_pretrained(tmp_path / "model")
    (picture, _), mask = drawings((16, 16))
    picture.save(tmp_path / "picture.png")
    mask.point(lambda v: 255 * (v > 127)).save(tmp_path / "mask.png")
    return tmp_path


def in_base64(file):
    return base64.b64encode(file.read_bytes()).decode()


def test_a_picture_is_read_as_by_command(task, folder):
    fixed = [f"--model={folder / 'model'}", "--steps=2", "--guidance=1", "--batch_size=1"]
    args = serve.parser().parse_args([*fixed, "--no-warm_up"])
    service = serve._service(args, serve._limits(args))
    client = TestClient(make_app(service, hosts=("testserver",)), raise_server_exceptions=False)
    assert service.samplers == ("flow_euler",)
    asked = {"prompt": "a red circle", "seed": 7, "width": 16, "height": 16}
    picture, mask = (in_base64(folder / f"{name}.png") for name in ("picture", "mask"))

    alone = client.post("/sdapi/v1/txt2img", json=asked)
    words = MODELS[task][2]
    assert alone.status_code == (422 if words else 200), alone.text
    assert words in alone.text
    # The picture is no beginning: how much of it stays is not asked of those who read it whole.
    body = {**asked, "init_images": [picture], "denoising_strength": 0.5}
    without, under = (
        client.post("/sdapi/v1/img2img", json={**body, "denoising_strength": strength, **more})
        for strength, more in ((0.5, {}), (1.0, {"mask": mask}))
    )
    answer, refused = (under, without) if task == "inpaint" else (without, under)
    assert refused.status_code == 422
    assert WHOLE.get(task, "fills in what is white in a mask; send one") in refused.text

    output = folder / "drawn"
    assert 0 == sample.main([
        *fixed, "--prompts=a red circle", "--seed=7", "--height=16", "--width=16",
        f"--output={output}", *(option.format(folder) for option in OPTIONS[task]),
    ])  # fmt: skip
    wanted = np.asarray(Image.open(output / "00000.png"))
    assert wanted.std() > 5
    found = decoded(answer.json()["images"][0])
    assert_same_picture(found, wanted)
    if not words:  # it draws from words too
        assert np.abs(decoded(alone.json()["images"][0]).astype(int) - found).max() > 5

    programs = len(service.loaded._programs)
    own = service.loaded.own
    service.loaded.warm_up(PictureRequest("", "", 0, 16, 16, own.sampler, own.guidance))
    assert len(service.loaded._programs) == programs  # what it warms up is what clients ask for
