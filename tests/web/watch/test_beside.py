"""The page beside a run: where it listens, how it ends, and that it touches no device."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from sdjax import serve
from sdjax.errors import UserError
from sdjax.web import beside
from tests.web.watch.conftest import make_run


@pytest.mark.parametrize(
    "text, place",
    [
        ("", ("127.0.0.1", 7860)),
        ("8000", ("127.0.0.1", 8000)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_place_of_serve(text, place):
    assert beside.parse(text) == place


@pytest.mark.parametrize("text", ["x", "99999", "-1", "1.5", "localhost:", "a:b"])
def test_wrong_place_is_refused(text):
    with pytest.raises(UserError, match="expected a port"):
        beside.parse(text)


def test_other_machines_take_a_token(monkeypatch):
    monkeypatch.delenv(beside.TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match="needs a token"):
        beside.parse("0.0.0.0:7860")
    monkeypatch.setenv(beside.TOKEN_VARIABLE, "0123456789abcdef")
    assert beside.parse("0.0.0.0:7860") == ("0.0.0.0", 7860)


def wait_for_end(url, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{url}/healthz", timeout=5)
        except httpx.HTTPError:
            return
        time.sleep(0.1)
    raise AssertionError("the page is still served")


PROGRAM = """
import sys
from sdjax.web import beside
with beside.served(sys.argv[1], "127.0.0.1", int(sys.argv[2])):
    print("training", flush=True)
    sys.stdin.read()
"""


def start(folder, port):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    assert process.stdout.readline() == "training\n"
    return process, line


def test_page_is_served_beside_a_run_and_dies_with_it(tmp_path):
    """A port that is taken stops nothing; a run that is killed takes the page with it."""
    run = make_run(tmp_path / "run", 3, pictures=())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process, line = start(run, port)
    assert f"(port {port} is taken)" in line
    url = line.split(" at ")[1].split()[0]
    answer = httpx.get(f"{url}/watch/runs", timeout=60)
    assert [one["name"] for one in answer.json()] == ["run"]
    assert httpx.post(f"{url}/watch/ask", json={"run": "run", "wish": "stop"}).status_code == 403
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for_end(url)


def test_page_ends_with_a_run_that_ends(tmp_path):
    process, line = start(tmp_path / "not there yet", 0)
    url = line.split(" at ")[1].split()[0]
    assert httpx.get(f"{url}/watch/runs", timeout=60).json() == []
    process.stdin.close()
    assert process.wait(30) == 0
    wait_for_end(url, 1)


def test_watching_and_looking_import_no_jax(tmp_path):
    """No model, no device, and a start within a second or two."""
    code = (
        "import sys, sdjax.serve as serve; from sdjax.web.server import views, site, running; "
        "print({'jax', 'tensorflow', 'torch'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_verb_watches_until_a_signal_comes(tmp_path):
    run = make_run(tmp_path / "run", 3, pictures=())
    process = subprocess.Popen(
        [sys.executable, "-m", "sdjax.serve", f"--workdir={run}", f"--data={run}", "--port=0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    url = process.stdout.readline().split(" at ")[1].split()[0]
    assert httpx.get(url, follow_redirects=True).url.path == "/watch"
    assert "Look" in httpx.get(f"{url}/watch").text
    with httpx.stream("GET", f"{url}/watch/events?run=run") as opened:
        next(opened.iter_lines())
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)  # a page that is open does not hold the server up
        assert process.wait(15) == 0
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "nothing to serve"),
        (["--workdir=nowhere"], "no such folder"),
        (["--data=nowhere"], "no such folder"),
        (["--captions=x.jsonl", "--workdir=."], "--data=DIR, which is missing"),
        (["--workdir=.", "--ratings=x"], "--model=DIR draws"),
        (["--workdir=.", "--lora=x"], "--lora is for --model"),
        (["--data=.", "--data=..", "--captions=x.jsonl"], "goes with one --data"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words, capsys):
    assert serve.main([*options, "--port=0"]) == 2
    assert words in capsys.readouterr().err
