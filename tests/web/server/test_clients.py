"""The server by the clients that people have, and the same picture by every way there is."""

import base64
import concurrent.futures
import dataclasses
import io
import json
import re
import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from sdjax import sample
from sdjax.web.server import loaded
from sdjax.web.server.app import make_app
from sdjax.web.server.requests import PictureRequest
from tests.web.server.conftest import STEPS

PROMPT, NEGATIVE, SEED = "a red circle", "a blue square", 7


def decoded(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.fixture(scope="module")
def by_command(pipeline_folder, service, tmp_path_factory):
    """What sdjax.sample draws of some options, without its folder."""

    def draw(*options):
        output = tmp_path_factory.mktemp("drawn")
        fixed = (f"--model={pipeline_folder}", f"--steps={STEPS}", "--guidance=3")
        asked = (f"--prompts={PROMPT}", f"--negative_prompt={NEGATIVE}", f"--output={output}")
        assert sample.main([*fixed, *asked, *options]) == 0
        return np.asarray(Image.open(output / "00000.png"))

    return draw


def assert_same_picture(found, wanted):
    """Equal but for the last bit: sdjax.sample compiles all steps as one program."""
    assert found.shape == wanted.shape
    difference = np.abs(found.astype(int) - wanted)
    assert difference.max() <= 1 and (difference > 0).mean() < 5e-3


def test_webuiapi_draws_pictures_and_reads_their_settings(address, service):
    webuiapi = pytest.importorskip("webuiapi")
    client = webuiapi.WebUIApi(baseurl=f"{address}/sdapi/v1")
    height, width = service.loaded.model.native_size
    result = client.txt2img(
        prompt=PROMPT, negative_prompt=NEGATIVE, seed=SEED, steps=STEPS, cfg_scale=3, batch_size=2,
        width=width, height=height, sampler_name="DPM++ 2M", scheduler="Karras",
    )  # fmt: skip
    assert [image.size for image in result.images] == [(width, height)] * 2
    assert result.info["all_seeds"] == [SEED, SEED + 1]
    assert result.info["sampler_name"] == "DPM++ 2M"
    again = client.png_info(result.images[0])  # saved again by the client, with its text
    assert again.parameters["Prompt"] == PROMPT
    assert again.parameters["Negative prompt"] == NEGATIVE
    assert again.parameters["Steps"] == str(STEPS) and again.parameters["Seed"] == str(SEED)
    assert again.parameters["Schedule type"] == "Karras"
    names = client.util_get_sampler_names()
    assert {"Euler", "Euler a", "DPM++ 2M", "DDIM"} <= set(names)
    assert client.util_get_current_model() == service.title
    client.util_set_model(service.title)
    assert client.get_progress()["state"]["job_count"] == 0
    for ask in ("get_upscalers", "get_loras", "get_embeddings", "get_memory", "get_cmd_flags",
                "get_schedulers", "get_scripts", "interrupt", "refresh_checkpoints"):  # fmt: skip
        getattr(client, ask)()


def test_the_client_of_openai_draws_and_edits(address, service):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list().data
    made = client.images.generate(
        prompt=PROMPT, model=model.id, n=2, size="16x24", response_format="b64_json"
    )
    pictures = [decoded(each.b64_json) for each in made.data]
    assert [picture.shape for picture in pictures] == [(24, 16, 3)] * 2
    assert not np.array_equal(*pictures)
    file = io.BytesIO(base64.b64decode(made.data[0].b64_json))
    mask = Image.new("RGBA", (16, 24), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 16, 12))  # the upper half is drawn anew
    hole = io.BytesIO()
    mask.save(hole, "PNG")
    options = {"image": ("a.png", file), "mask": ("m.png", hole.getvalue()), "prompt": PROMPT}
    edited = client.images.edit(**options, extra_body={"seed": 3}, output_format="webp")
    picture = decoded(edited.data[0].b64_json)
    assert picture.shape == (24, 16, 3)
    with pytest.raises(openai.BadRequestError, match="expected WIDTHxHEIGHT"):
        client.images.generate(prompt=PROMPT, size="9000x9000")


def test_a_seed_is_the_same_picture_by_every_way(client, by_command):
    wanted = by_command(f"--seed={SEED}")
    asked = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": SEED, "steps": STEPS}
    a1111 = client.post("/sdapi/v1/txt2img", json={**asked, "cfg_scale": 3}).json()
    openai = client.post("/v1/images/generations", json={**asked, "guidance": 3}).json()
    first, second = decoded(a1111["images"][0]), decoded(openai["data"][0]["b64_json"])
    np.testing.assert_array_equal(first, second)
    assert_same_picture(first, wanted)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "heun", "pndm", "dpmpp_2m"])
def test_a_sampler_draws_as_by_command(client, by_command, sampler):
    asked = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": SEED, "cfg_scale": 3}
    body = {**asked, "steps": STEPS, "sampler_name": sampler}
    found = client.post("/sdapi/v1/txt2img", json=body).json()["images"][0]
    assert_same_picture(decoded(found), by_command(f"--sampler={sampler}", f"--seed={SEED}"))


@pytest.mark.parametrize("mask", [False, True])
def test_a_picture_to_begin_with_is_taken_as_by_command(client, by_command, tmp_path, mask):
    rng = np.random.default_rng(0)
    files = {"init_image": rng.integers(0, 255, (16, 16, 3), np.uint8)}
    if mask:
        files["mask_image"] = np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((8, 8), np.uint8))
    options = ["--strength=0.5", f"--seed={SEED}"]
    for name, pixels in files.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        options.append(f"--{name}={tmp_path / name}.png")
    encoded = {n: base64.b64encode((tmp_path / f"{n}.png").read_bytes()).decode() for n in files}
    body = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": SEED, "steps": STEPS,
            "cfg_scale": 3, "init_images": [encoded["init_image"]], "denoising_strength": 0.5,
            "mask": encoded.get("mask_image")}  # fmt: skip
    answer = client.post("/sdapi/v1/img2img", json=body)
    assert_same_picture(decoded(answer.json()["images"][0]), by_command(*options))


@pytest.mark.parametrize("body, words", [
    ({"width": 15}, "width is 15; expected a multiple of"),
    ({"steps": 10**6}, "steps is 1000000; expected a whole number from 1 to 150"),
    ({"steps": 10**400}, "steps is"),
    ({"steps": "many"}, "steps is 'many'; expected a whole number"),
    ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
    ({"seed": 2**32}, "seed is 4294967296"),
    ({"sampler_name": "DPM++ 7"}, r"sampler_name is 'DPM\+\+ 7'; expected one of Euler"),
    ({"prompt": "a <lora:x:1> cat"}, "the prompt has '<lora:x:1>'; .* and it has none"),
    ({"prompt": "x" * 20_000}, "prompt has 20000 characters"),
    ({"batch_size": 3, "n_iter": 2}, r"batch_size \* n_iter is 6; expected at most 4"),
    ([], "expected a JSON object"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_in_words(client, body, words):
    answer = client.post(
        "/sdapi/v1/txt2img", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 422
    assert re.search(words, answer.json()["detail"])


def test_fields_that_nobody_knows_are_ignored(client):
    body = {"prompt": PROMPT, "steps": 1, "alwayson_scripts": {"x": {"args": []}}, "eta": None,
            "override_settings": {"CLIP_stop_at_last_layers": 2}, "enable_hr": False}  # fmt: skip
    assert client.post("/sdapi/v1/txt2img", json=body).status_code == 200


def test_memory_is_that_of_the_machine(client):
    ram = client.get("/sdapi/v1/memory").json()["ram"]
    assert 0 < ram["used"] < ram["total"] and 0 < ram["free"] < ram["total"]


@pytest.mark.parametrize("path, body", [
    ("/sdapi/v1/options", {"sd_model_checkpoint": "other"}),
    ("/sdapi/v1/txt2img", {"override_settings": {"sd_model_checkpoint": "other"}}),
    ("/v1/images/generations", {"model": "other", "prompt": PROMPT}),
])  # fmt: skip
def test_another_model_is_refused(client, path, body):
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 422) and "alone: start another" in answer.text


def test_a_hundred_requests_at_once_are_neither_lost_nor_mixed(address, service):
    programs = len(service.loaded._programs)
    height, width = service.loaded.model.native_size

    def ask(seed):
        body = {"prompt": PROMPT, "seed": seed, "steps": 2, "cfg_scale": 1 + seed % 5}
        while True:
            answer = httpx.post(f"{address}/sdapi/v1/txt2img", json=body, timeout=300)
            if answer.status_code != 503:
                return decoded(answer.json()["images"][0])
            time.sleep(float(answer.headers["retry-after"]) / 4)

    with concurrent.futures.ThreadPoolExecutor(100) as threads:
        found = list(threads.map(ask, range(100)))
    assert len(service.loaded._programs) - programs <= 4  # guided or not, one or two at once
    own = service.loaded.own
    for seed in range(0, 100, 9):
        sampler = type(own.sampler)(**{**vars(own.sampler), "steps": 2})
        request = PictureRequest(PROMPT, "", seed, height, width, sampler, 1.0 + seed % 5)
        alone = service.loaded.draw([request], lambda i, x0: np.zeros(len(x0), bool))[0]
        assert_same_picture(found[seed], alone)


@pytest.mark.parametrize("seconds, looks", [(0.0, [0, 1, 2, 3, 4, 5]), (1e9, [0, 1, 5])])
def test_how_often_the_host_looks_changes_no_bit(service, seconds, looks):
    """The pace is known after the first step, when the second is under way."""
    model = dataclasses.replace(service.loaded, look_every=seconds)
    height, width = model.model.native_size
    sampler = dataclasses.replace(model.own.sampler, steps=6)
    seen = []

    def watch(i, estimates):
        seen.append(i)
        return np.zeros(len(estimates), bool)

    request = PictureRequest(PROMPT, "", SEED, height, width, sampler, 3.0)
    found = model.draw([request], watch)[0]
    assert seen == looks
    wanted = service.loaded.draw([request], lambda i, x0: np.zeros(len(x0), bool))[0]
    np.testing.assert_array_equal(found, wanted)


def test_a_call_takes_what_steps_there_is_time_for_of_one_network(monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 1.4])
    monkeypatch.setattr(loaded, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    calls = loaded._Calls([1] * 30 + [0] * 10, 1.0)
    calls.seen(0)
    assert calls.steps(0) == 1  # of unknown length
    calls.seen(1)
    assert calls.steps(2) == 1  # of a second
    calls.seen(3)
    assert (calls.steps(4), calls.steps(28), calls.steps(30), calls.steps(38)) == (5, 2, 5, 2)


def test_the_metrics_are_read_by_prometheus(client, service):
    client.post("/sdapi/v1/txt2img", json={"prompt": PROMPT, "steps": 1})
    families = {f.name: f for f in text_string_to_metric_families(client.get("/metrics").text)}
    samples = {s.labels["outcome"]: s.value for s in families["sdjax_serve_pictures"].samples}
    assert samples["drawn"] == service.engine.tally.drawn > 0 and samples["failed"] == 0
    (info,) = families["sdjax_serve_info"].samples
    assert info.labels == {"model": "diffusers", "digest": service.digest}


def test_the_options_of_the_server_are_for_what_a_client_leaves_out(service, client):
    given = dataclasses.replace(service, negative=NEGATIVE)
    own = TestClient(make_app(given, hosts=("testserver",)))
    asked = {"prompt": PROMPT, "seed": SEED, "steps": 2}

    def drawn(there, path, **more):
        answer = there.post(path, json={**asked, **more}).json()
        return decoded(answer["images"][0] if "images" in answer else answer["data"][0]["b64_json"])

    for path in ("/sdapi/v1/txt2img", "/v1/images/generations"):
        wanted = drawn(client, path, negative_prompt=NEGATIVE)
        np.testing.assert_array_equal(drawn(own, path), wanted)
        assert not np.array_equal(drawn(own, path, negative_prompt=""), wanted)


def test_a_prompt_that_is_cut_is_counted(client):
    def cut():
        text = client.get("/metrics").text
        return float(re.search(r"^sdjax_serve_truncated_total (\S+)", text, re.M)[1])

    before = cut()
    client.post("/sdapi/v1/txt2img", json={"prompt": "a circle " * 50, "steps": 1})
    assert cut() > before
