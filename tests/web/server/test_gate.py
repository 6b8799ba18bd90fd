"""The gate: what strangers try, and what happens. docs/serving.md has the table."""

import base64
import json
import time

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from sdjax import serve
from sdjax.errors import UserError
from sdjax.system.listening import listen
from sdjax.web.server.fields import InvalidRequest, Limits
from sdjax.web.server.gate import Gate
from sdjax.web.server.requests import decoded_image

TOKEN = "0123456789abcdef"


def client(limits=None, **options):
    async def fail(http):
        raise RuntimeError("a secret of the inside")

    async def echo(http):
        return JSONResponse(len(await http.body()))

    async def fine(http):
        return PlainTextResponse("fine")

    routes = [Route("/", fine), Route("/healthz", fine), Route("/fail", fail),
              Route("/echo", echo, methods=["POST"])]  # fmt: skip
    gate = Gate(Starlette(routes=routes), limits or Limits(), **options)
    return TestClient(gate, base_url="http://localhost:7860", raise_server_exceptions=False)


def basic(password):
    return {"authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


@pytest.mark.parametrize("headers, status", [
    ({}, 401),
    ({"authorization": f"Bearer {TOKEN}"}, 200),
    ({"authorization": f"bearer {TOKEN}"}, 200),
    (basic(TOKEN), 200),
    ({"authorization": f"Bearer {TOKEN[:-1]}"}, 401),
    ({"authorization": f"Bearer {TOKEN}0"}, 401),
    ({"authorization": TOKEN}, 401),
    ({"authorization": "Basic %%%"}, 401),
    (basic(""), 401),
    (basic("ü" * 16), 401),
])  # fmt: skip
def test_a_token_opens_and_nothing_else_does(headers, status):
    answer = client(token=TOKEN).get("/", headers=headers)
    assert answer.status_code == status
    assert ("www-authenticate" in answer.headers) == (status == 401)


def test_only_the_health_is_known_without_the_token():
    assert client(token=TOKEN).get("/healthz").status_code == 200
    for path in ("/metrics", "/healthz/", "//healthz", "/healthz/../", "/docs"):
        assert client(token=TOKEN).get(path).status_code in (401, 404), path


def test_a_name_that_leads_here_by_rebinding_is_refused():
    answer = client().get("/", headers={"host": "evil.example:7860"})
    assert answer.status_code == 421 and "--allow_host=evil.example" in answer.text
    assert client().get("/", headers={"host": ""}).status_code == 421
    for host in ("127.0.0.1:7860", "[::1]:7860", "LOCALHOST"):
        assert client().get("/", headers={"host": host}).status_code == 200
    allowed = client(hosts=("proxy.example",))
    assert allowed.get("/", headers={"host": "proxy.example"}).status_code == 200


def test_a_page_of_another_origin_can_neither_ask_nor_read():
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        answer = client().post("/echo", content=b"{}", headers={"origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    own = {"origin": "http://localhost:7860"}
    assert client().post("/echo", content=b"{}", headers=own).status_code == 200


def test_an_origin_that_is_allowed_passes_its_preflight_without_the_token():
    there = client(token=TOKEN, origins=("https://page.example",))
    headers = {"origin": "https://page.example"}
    asked = there.options("/echo", headers=headers)
    assert asked.status_code == 204
    assert asked.headers["access-control-allow-origin"] == "https://page.example"
    assert there.post("/echo", content=b"", headers=headers).status_code == 401


def test_a_body_is_bounded_by_what_it_says_and_by_what_it_is():
    there = client(Limits(body=1000))
    assert there.post("/echo", content=b"x" * 1000).json() == 1000
    assert there.post("/echo", content=b"x" * 1001).status_code == 413
    parts = (b"x" * 100 for _ in range(11))  # in chunks, without a length
    assert there.post("/echo", content=parts).status_code == 413
    said = {"content-length": "-5"}
    assert there.request("POST", "/echo", content=b"", headers=said).status_code == 413


def test_an_address_that_asks_too_often_waits():
    there = client(Limits(rate=5))
    codes = [there.get("/").status_code for _ in range(7)]
    assert codes == [200] * 5 + [429] * 2


def test_nothing_of_the_inside_is_answered(caplog):
    answer = client().get("/fail")
    assert answer.status_code == 500
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert "secret" in caplog.text


def test_answers_are_neither_sniffed_nor_framed_nor_kept():
    headers = client().get("/").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY" and headers["cache-control"] == "no-store"


@pytest.mark.parametrize("url", [
    "http://169.254.169.254/latest/meta-data", "HTTPS://example.org/x.png", "file:///etc/passwd",
    "ftp://example.org/x",
])  # fmt: skip
def test_a_url_is_never_fetched(url):
    with pytest.raises(InvalidRequest, match="a URL is never fetched"):
        decoded_image("init_images[0]", url, 1000)


@pytest.mark.parametrize("data", [
    b"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%id) run", b"cposix\nsystem\n(S'id'\ntR.", b"<svg/>", b"",
])  # fmt: skip
def test_what_is_no_picture_reaches_no_decoder(data):
    with pytest.raises(InvalidRequest, match="cannot be used"):
        decoded_image("image", base64.b64encode(data).decode(), 1000)


def test_a_picture_larger_than_the_limit_is_refused():
    from tests.web.server.pictures import png

    with pytest.raises(InvalidRequest, match="cannot be used"):
        decoded_image("image", png(100, 100), 9_999)
    assert decoded_image("image", "data:image/png;base64," + png(10, 10), 100).size == (10, 10)


@pytest.mark.parametrize("body", ["[" * 100_000, '{"a":' * 100_000, "\ud800", "NaN", "1e999"])
def test_json_of_strangers_is_an_error_in_words(client, body):
    content = body.encode("utf-8", "surrogatepass")
    answer = client.post("/sdapi/v1/txt2img", content=content)
    assert answer.status_code == 422 and "JSON" in json.loads(answer.text)["detail"]


@pytest.mark.parametrize("path", ["/draw", "/rate", "/sdapi/v1/txt2img", "/v1/images/generations"])
@pytest.mark.parametrize("body", [
    b'{"prompt": "a \\ud800 circle"}', b'{"prompt": "a \xed\xa0\x80 circle"}',
    b'{"prompt": "a circle", "\\udfff": 1}', '{"prompt": "\\ud800"}'.encode("utf-16"),
    b'{"prompt": "\xff"}',
])  # fmt: skip
def test_half_a_letter_is_refused_wherever_it_stands(client, path, body):
    answer = client.post(path, content=body)
    assert answer.status_code in (400, 422) and "the body is no JSON" in answer.text


def test_a_letter_of_two_escapes_is_drawn(client):
    answer = client.post("/draw", content=b'{"prompt": "a \\ud83d\\ude00 circle"}')
    assert "\U0001f600" in json.loads(answer.text.splitlines()[-1])["prompt"]


@pytest.mark.parametrize("options, words", [
    (["--host=0.0.0.0"], "needs a token"),
    (["--host=example.invalid"], "needs a token"),
    (["--host=::"], "needs a token"),
    (["--port=70000"], "--port=70000; expected 0 to 65535"),
    (["--queue=0"], "--queue=0; expected at least 1"),
    (["--host=192.0.2.1", "--token_file=TOKEN"], "cannot be listened at"),
    (["--token_file=SHORT"], "has 5 characters; expected at least 16"),
    (["--token_file=ABSENT"], "cannot be read"),
    (["--ratings=gs://bucket/ratings"], "nothing can be appended"),
    (["--ratings=/proc/self/ratings"], "/proc/self/ratings cannot be made"),
    (["--ratings=/proc/self/fdinfo"], "/proc/self/fdinfo cannot be written"),
])  # fmt: skip
def test_options_that_would_let_strangers_in_are_refused(options, words, tmp_path, capsys):
    (tmp_path / "TOKEN").write_text(TOKEN + "\n")
    (tmp_path / "SHORT").write_text("short")
    given = [o.replace("=TOKEN", f"={tmp_path}/TOKEN").replace("=SHORT", f"={tmp_path}/SHORT")
             .replace("=ABSENT", f"={tmp_path}/ABSENT") for o in options]  # fmt: skip
    assert serve.main([f"--model={tmp_path}", *given]) == 2
    assert words in capsys.readouterr().err


def test_a_token_of_the_environment_is_taken(monkeypatch):
    args = serve.parser().parse_args(["--model=x"])
    assert serve._token(args) == ""
    monkeypatch.setenv(serve.TOKEN_VARIABLE, TOKEN)
    assert serve._token(args) == TOKEN
    monkeypatch.setenv(serve.TOKEN_VARIABLE, "short")
    with pytest.raises(UserError, match="at least 16"):
        serve._token(args)


def test_a_port_that_is_taken_is_named(tmp_path, capsys):
    taken = listen("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    began = time.monotonic()
    assert serve.main([f"--model={tmp_path}", f"--port={port}"]) == 2
    assert f"--port={port} cannot be listened at" in capsys.readouterr().err
    assert time.monotonic() - began < 30
    taken.close()
