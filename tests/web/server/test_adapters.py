"""Adapters that requests weigh, and prompts with weights: the pictures of `sdjax.sample`."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from sdjax import sample, serve
from sdjax.checkpoints.adapters import Lora, read_loras
from sdjax.checkpoints.reading import read_any
from sdjax.errors import UserError
from sdjax.formats.adapters.writing import write_kohya_adapter
from sdjax.system import paths
from sdjax.web.server.a1111_requests import text_requests
from sdjax.web.server.adapters import Adapters, make_member, names_of
from sdjax.web.server.app import make_app
from sdjax.web.server.fields import Fields, InvalidRequest
from tests.checkpoints.adapters import samples
from tests.web import accessibility
from tests.web.conftest import PHONE, WIDE
from tests.web.server.conftest import STEPS, listening
from tests.web.server.test_clients import assert_same_picture, decoded

PROMPT, SEED = "a red circle", 7
FIXED = (f"--steps={STEPS}", "--guidance=3")


@pytest.fixture(scope="module")
def files(pipeline_folder, tmp_path_factory):
    """A LoRA and a DoRA of the tiny pipeline: {name: file}."""
    model, folder = read_any(pipeline_folder), tmp_path_factory.mktemp("adapters")
    made = {
        "style": samples.lora_adapter(model, ranks=(4,)),
        "shape": samples.dora_adapter(model, ranks=(2,), wanted=lambda p: p.startswith("unet.")),
    }
    for name, adapter in made.items():
        write_kohya_adapter(folder / f"{name}.safetensors", model, adapter, {})
    return {name: folder / f"{name}.safetensors" for name in made}


def served(*options):
    args = serve.parser().parse_args(
        [*FIXED, *options, "--batch_size=2", "--max_side=64", "--rate=1000000", "--no-warm_up"]
    )
    return serve._service(args, serve._limits(args))


@pytest.fixture(scope="module")
def service(pipeline_folder, files):
    """One adapter with the weight 0.8, and one that is off; of one set the parameters are kept."""
    loras = (f"--lora={files['style']}:0.8", f"--lora={files['shape']}:0")
    return served(f"--model={pipeline_folder}", *loras, "--lora_sets=1")


@pytest.fixture(scope="module")
def client(service):
    return TestClient(make_app(service, hosts=("testserver",)), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def by_command(pipeline_folder, tmp_path_factory):
    """What sdjax.sample draws."""

    def draw(*options, prompt=PROMPT):
        output = tmp_path_factory.mktemp("drawn")
        asked = (f"--model={pipeline_folder}", f"--prompts={prompt}", f"--output={output}")
        assert sample.main([*asked, *FIXED, f"--seed={SEED}", *options]) == 0
        return np.asarray(Image.open(output / "00000.png"))

    return draw


def asked(client, prompt=PROMPT, **more):
    body = {"prompt": prompt, "seed": SEED, **more}
    answer = client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def drawn(client, prompt=PROMPT, **more):
    return decoded(asked(client, prompt, **more)["images"][0])


@pytest.mark.parametrize("prompt, style, shape", [
    (PROMPT, 0.8, 0.0),  # as at the start
    (f"{PROMPT} <lora:style:0.25>", 0.25, 0.0),
    (f"<lora:style:0.5> {PROMPT}<lora:shape:-0.7>", 0.5, -0.7),
    (f"{PROMPT} <lora:style:0>", 0.0, 0.0),
])  # fmt: skip
def test_weights_in_a_prompt_draw_what_sample_draws_with_them(
    client, service, files, by_command, prompt, style, shape
):
    loras = [f"--lora={files[name]}:{w}" for name, w in (("style", style), ("shape", shape)) if w]
    found = drawn(client, prompt)
    assert_same_picture(found, by_command(*loras))
    weights = {"loras": {"style": style, "shape": shape}}
    np.testing.assert_array_equal(drawn(client, **weights), found)
    openai = client.post("/v1/images/generations", json={"prompt": prompt, "seed": SEED}).json()
    np.testing.assert_array_equal(decoded(openai["data"][0]["b64_json"]), found)


def test_weights_change_the_picture_and_compile_nothing(client, service):
    first = drawn(client, loras={"style": 0.1})
    (program,) = {id(each): each for each in service.loaded._programs.values()}.values()
    compiled = [each._cache_size() for each in program]
    for weight in (0.9, 0.4, 0.1):
        again = drawn(client, loras={"style": weight, "shape": 1 - weight})
    assert [each._cache_size() for each in program] == compiled
    assert not np.array_equal(again, first)
    assert len(service.loaded.adapters._sets) == 1
    np.testing.assert_array_equal(drawn(client, loras={"style": 0.1}), first)


def test_pictures_of_the_same_weights_alone_are_drawn_together(service):
    def alike(prompt, **fields):
        return text_requests(service, Fields({"prompt": prompt, **fields}))[0].alike

    assert alike("a") == alike("b <lora:style:0.8>") == alike("c", loras={"shape": 0})
    assert alike("a") != alike("a <lora:style:0.7>") != alike("a <lora:shape:0.7>")


def test_settings_of_a_picture_say_its_weights_and_bring_them_back(client):
    answer = asked(client, "a star <lora:shape:0.5>")
    info = client.post("/sdapi/v1/png-info", json={"image": answer["images"][0]}).json()
    prompt = info["parameters"]["Prompt"]
    assert prompt == "a star <lora:style:0.8> <lora:shape:0.5>"
    picture = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    np.testing.assert_array_equal(drawn(client, prompt), np.asarray(picture))
    names = [each["name"] for each in client.get("/sdapi/v1/loras").json()]
    assert names == ["style", "shape"]


@pytest.mark.parametrize("body, words", [
    ({"prompt": "<lora:stile:1>"}, "'<lora:stile:1>'; .* which are style, shape"),
    ({"prompt": "<lora:style:1e3>"}, "the weight is '1e3'; expected a number from -10 to 10"),
    ({"prompt": "<lora:style:nan>"}, "the weight is 'nan'"),
    ({"prompt": "<lora:style:0.5:1>"}, "with two weights"),
    ({"prompt": "<lora:style:1:dyn=4>"}, "'dyn' is not known"),
    ({"prompt": "<hypernet:style:1>"}, "no hypernetworks"),
    ({"loras": {"../style": 1}}, r"loras has '../style'; .* which are style, shape"),
    ({"loras": {"style": 11}}, "style is 11; expected a number from -10 to 10"),
    ({"loras": ["style"]}, "expected an object"),
])  # fmt: skip
def test_adapters_that_there_are_not_are_refused_in_words(service, body, words):
    with pytest.raises(InvalidRequest, match=words):
        text_requests(service, Fields(body))


def test_one_weight_said_twice_or_by_kind_is_one(service):
    for prompt in ("<lora:style:te=0.5:unet=0.5>", "<lyco:style:0.5:0.5>", "<lora:style:0.5>"):
        (request,) = text_requests(service, Fields({"prompt": f"a{prompt}"}))
        assert request.adapters == (0.5, 0.0) and request.prompt == "a"


def test_adapters_have_names_of_their_own():
    def names(*places):
        return names_of([Lora(p, paths.to_path(p), 1.0, (), {}) for p in places])

    assert names("a/style.safetensors", "b:c.safetensors") == ("style", "b_c")
    assert names("a/x.safetensors", "b/x.safetensors", "y.pt") == ("a/x", "b/x", "y")
    assert names("cat/adapter/pytorch_lora_weights.safetensors") == ("cat",)
    with pytest.raises(UserError, match="given twice"):
        names("a/x.safetensors", "a/x.safetensors")


def test_words_beside_an_adapter_of_the_table_of_words_stay(pipeline_folder, files):
    """Learnt words lengthen a table that an adapter changes too."""
    model, loras = read_loras(read_any(pipeline_folder), [str(files["style"])])
    path = next(p for p in make_member(model, loras, model).model.params if "mlp.fc1.kernel" in p)
    longer = np.concatenate([model.params[path], np.full((2, *model.params[path].shape[1:]), 5.0)])
    ready = type(model)(**{**vars(model), "params": {**model.params, path: longer}})
    made = Adapters([make_member(model, loras, ready)]).params((0.0,))[path]
    np.testing.assert_array_equal(np.asarray(made), np.float32(longer))


def test_prompts_with_weights_draw_what_sample_draws(pipeline_folder, by_command):
    weighed = served(f"--model={pipeline_folder}", "--prompt_syntax=a1111")
    client = TestClient(make_app(weighed, hosts=("testserver",)), raise_server_exceptions=False)
    long = "a (red:1.5) circle, [small] BREAK " + "a green star and a blue square, " * 4
    options = ("--prompt_syntax=a1111", "--negative_prompt=a (star:1.2)")
    found = drawn(client, long, negative_prompt="a (star:1.2)")
    assert_same_picture(found, by_command(*options, prompt=long))
    assert not np.array_equal(found, drawn(client, long.replace("1.5", "0.5")))
    for prompt, words in (("a (b:1.2.3)", "is no number"), ("a BREAK " * 40, "has 40 chunks")):
        answer = client.post("/sdapi/v1/txt2img", json={"prompt": prompt})
        assert answer.status_code == 422 and words in answer.json()["detail"]


def test_the_page_has_a_field_for_each_adapter(visit, service, client, files):
    with listening(make_app(service)) as url:
        page = visit(url)
        page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text }")
        assert [page.get_by_label(name).input_value() for name in ("style", "shape")] == [
            "0.8",
            "0",
        ]
        page.fill("#prompt", PROMPT)
        page.fill("#seed", str(SEED))
        page.get_by_label("style").fill("0.25")
        page.click("#draw")
        made = page.locator("#pictures li").first
        source = made.locator("img").get_attribute("src")
        np.testing.assert_array_equal(
            decoded(source.partition(",")[2]), drawn(client, loras={"style": 0.25})
        )
        assert "style 0.25" in made.inner_text() and "shape" not in made.inner_text()
        page.get_by_role("button", name="Copy command").click()
        assert f"--lora='{files['style']}:0.25' --seed" in page.evaluate("window.copied")
        page.get_by_label("style").fill("1")
        page.get_by_role("button", name="Use settings").click()
        assert page.get_by_label("style").input_value() == "0.25"
        page.reload()
        assert page.get_by_label("style").input_value() == "0.25"


def test_webuiapi_lists_and_weighs_adapters(service, client):
    webuiapi = pytest.importorskip("webuiapi")
    with listening(make_app(service)) as url:
        api = webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1")
        names = [each["name"] for each in api.get_loras()]
        height, width = service.loaded.model.native_size
        result = api.txt2img(
            prompt=f"{PROMPT} <lora:{names[0]}:0.25>", seed=SEED, steps=STEPS, cfg_scale=3,
            width=width, height=height, sampler_name="Euler",
        )  # fmt: skip
    wanted = drawn(client, loras={"style": 0.25}, sampler_name="Euler")
    np.testing.assert_array_equal(np.asarray(result.image), wanted)
    assert "<lora:style:0.25>" in result.info["prompt"]


def test_axe_finds_nothing_in_the_fields_of_adapters(visit, service):
    axe = accessibility.script()
    with listening(make_app(service)) as url:
        for size, scheme in ((WIDE, "light"), (PHONE, "dark")):
            page = visit(url, viewport=size, color_scheme=scheme)
            assert accessibility.violations(page, axe) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
