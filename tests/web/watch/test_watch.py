"""The routes that watch runs: what they say, and what they refuse."""

import json
import shutil
import time

import httpx
import pytest
from starlette.testclient import TestClient

from sdjax.system import paths, wishes
from sdjax.train.monitoring.metrics_log import JsonLines, trim_metrics
from sdjax.web.watch import stream
from sdjax.web.watch.runs import Runs
from tests.web.server.conftest import listening
from tests.web.watch.conftest import TOKEN, make_run, make_watch


@pytest.fixture
def client(folder):
    return TestClient(make_watch(folder)[0], raise_server_exceptions=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stream, "LOOK", 0.05)
    monkeypatch.setattr(stream, "_STATE", 0.1)


class Events:
    """The events of a stream, one after the other."""

    def __init__(self, url, runs, last=""):
        headers = {"last-event-id": last} if last else {}
        self._client = httpx.Client(timeout=20)
        self._opened = self._client.stream(
            "GET", f"{url}/watch/events", params=[("run", run) for run in runs], headers=headers
        )
        self.response = self._opened.__enter__()
        self._lines = self.response.iter_lines()
        self.id = ""

    def next(self, name):
        """The data of the next event of a name."""
        found, deadline = {}, time.monotonic() + 60
        for line in self._lines:
            assert time.monotonic() < deadline, name
            field, _, value = line.partition(": ")
            if line and field:
                found[field] = value
            elif "data" in found:
                self.id = found["id"]
                if found["event"] == name:
                    return json.loads(found["data"])
                found = {}
        raise AssertionError(f"the stream ended without {name}")

    def close(self):
        self._opened.__exit__(None, None, None)
        self._client.close()


@pytest.fixture
def follow(folder):
    application, watch = make_watch(folder)
    opened = []
    with listening(application) as url:

        def start(*runs, last=""):
            opened.append(Events(url, runs, last))
            return opened[-1]

        yield start
        watch.ending.set()
        for each in opened:
            each.close()


def test_every_run_of_the_folder_is_listed(client, folder):
    found = {run["name"]: run["active"] for run in client.get("/watch/runs").json()}
    assert found == {"first": True, "second": False}


def test_curves_come_first_and_then_what_is_added(folder, follow):
    events = follow("first", "second")
    plans = events.next("plans")["plans"]
    loss = next(plan for plan in plans if plan["title"] == "Loss")
    assert loss["names"]["train/loss"] == "training" and "train/loss" in loss["noisy"]
    assert {events.next("curves")["run"], events.next("curves")["run"]} == {0, 1}
    log = JsonLines(folder / "second" / "metrics.jsonl")
    log.write_scalars(310, {"train/loss": 0.25, "fidelity/colour": 0.5})
    assert any(plan["title"] == "Prompt fidelity" for plan in events.next("plans")["plans"])
    added = events.next("rows")
    assert added == {"run": 1, "rows": [{"step": 310, "train/loss": 0.25, "fidelity/colour": 0.5}]}
    log.close()


def test_who_comes_back_gets_what_was_missed(folder, follow):
    events = follow("second")
    events.next("curves")
    last = events.id
    assert last.split("-")[0] == str((folder / "second" / "metrics.jsonl").stat().st_size)
    events.close()
    log = JsonLines(folder / "second" / "metrics.jsonl")
    log.write_scalars(310, {"train/loss": 0.25})
    log.close()
    again = follow("second", last=last)
    assert again.next("rows")["rows"] == [{"step": 310, "train/loss": 0.25}]
    assert "plans" in follow("second", last=last).next("plans")


def test_run_that_went_back_is_sent_anew(folder, follow):
    events = follow("second")
    events.next("curves")
    last = events.id
    file = folder / "second" / "metrics.jsonl"
    trim_metrics(file, 200)
    log = JsonLines(file)
    log.write_scalars(210, {"train/loss": 7.0})
    log.close()
    assert_anew(events)
    assert_anew(follow("second", last=last))


def assert_anew(events):
    """Check that 20 steps are sent, and one more: with them, or after them if they went before."""
    loss = events.next("curves")["curves"]["train/loss"]
    steps, losses = list(np_decode(loss["x"])), list(np_decode(loss["y"]))
    if len(steps) == 20:
        (row,) = events.next("rows")["rows"]
        steps, losses = [*steps, row["step"]], [*losses, row["train/loss"]]
    assert steps == list(range(10, 220, 10)) and losses[-1] == 7.0


def np_decode(packed):
    import base64

    import numpy as np

    return np.frombuffer(base64.b64decode(packed["data"]), f"<{packed['type']}")


def test_state_says_what_a_run_does(folder, follow):
    state = follow("first").next("state")
    tiles = {name: value for name, value, _ in state["tiles"]}
    assert tiles["Steps"] == "400" and tiles["Waiting for data"] == "10.0%"
    assert tiles["Device memory, GiB"] == "30.00"
    # 3,600 steps of 32 pictures at some 500 a second.
    assert tiles["Time left"].startswith("3:")
    assert state["active"] and "sdjax.main" in state["doing"] and state["done"] == 400
    assert state["pictures"] == [{"kind": "", "title": "raw weights, guided", "steps": [0, 100]}]
    assert any("waited for data" in one["title"] for one in state["warnings"])


def test_long_run_is_thinned_and_smoothed(tmp_path):
    make_run(tmp_path / "run", 3000, pictures=())
    (run,) = Runs([paths.to_path(tmp_path / "run")]).all().values()
    curves, seen, thinned = run.curves()
    assert thinned and seen.offset == (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert len(np_decode(curves["train/loss"]["x"])) <= 1000
    assert len(np_decode(curves["train/loss"]["sx"])) > 100
    assert "sx" not in curves["train/learning_rate"]


def test_a_picture_comes_with_its_prompts(client):
    found = client.get("/watch/picture", params={"run": "first", "kind": "", "step": 100}).json()
    assert found["uri"].startswith("data:image/webp;base64,") and found["width"] == 64
    assert found["prompts"].startswith("a large red circle\n")


@pytest.mark.parametrize(
    "values",
    [
        {"run": "first", "kind": "/../../../etc/passwd", "step": "1"},
        {"run": "first", "kind": "..", "step": "1"},
        {"run": "../runs/first", "kind": "", "step": "100"},
        {"run": "first", "kind": "", "step": "-1"},
        {"run": "first", "kind": "", "step": "1e3"},
        {"run": "", "kind": "", "step": "100"},
    ],
)
def test_no_request_names_a_file(client, values):
    answer = client.get("/watch/picture", params=values)
    assert answer.status_code == 422 and "Traceback" not in answer.text


def test_links_that_lead_out_are_not_followed(folder, tmp_path):
    make_run(tmp_path / "outside", 3)
    (folder / "link").symlink_to(tmp_path / "outside")
    shutil.copy(folder / "first/samples/00000100.png", tmp_path / "secret.png")
    (folder / "first/samples/00000200.png").symlink_to(tmp_path / "secret.png")
    client = TestClient(make_watch(folder)[0])
    assert [run["name"] for run in client.get("/watch/runs").json()] == ["first", "second"]
    answer = client.get("/watch/picture", params={"run": "first", "kind": "", "step": 200})
    assert answer.status_code == 422 and "leads out" in answer.json()["detail"]


def test_without_a_token_nobody_asks_a_run(client, folder):
    answer = client.post("/watch/ask", json={"run": "first", "wish": "stop"})
    assert answer.status_code == 403 and "--token_file" in answer.json()["detail"]
    assert wishes.pending(paths.to_path(folder / "first")) == []


def test_with_the_token_a_run_is_asked(folder):
    client = TestClient(make_watch(folder, token=TOKEN)[0])
    body = {"run": "first", "wish": "stop"}
    assert client.post("/watch/ask", json=body).status_code == 401
    assert client.get("/watch/events?run=first").status_code == 401
    client.headers["authorization"] = f"Bearer {TOKEN}"
    assert client.post("/watch/ask", json=body).status_code == 200
    assert client.post("/watch/ask", json={**body, "wish": "sample"}).status_code == 200
    assert wishes.pending(paths.to_path(folder / "first")) == ["stop", "sample"]
    idle = client.post("/watch/ask", json={"run": "second", "wish": "stop"})
    assert idle.status_code == 422 and "not being trained" in idle.json()["detail"]
    for wrong in ({**body, "wish": "../x"}, {**body, "run": "third"}, {"wish": "stop"}, []):
        assert client.post("/watch/ask", json=wrong).status_code == 422
    other = client.post("/watch/ask", json=body, headers={"origin": "https://evil.example"})
    assert other.status_code == 403


def test_streams_are_bounded(client):
    names = [("run", "first")] * 17
    assert client.get("/watch/events", params=names).status_code == 422
    assert client.get("/watch/events").status_code == 422


def test_files_that_nobody_foresaw_are_named(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", 3, pictures=())
    (run / "config.json").write_text('["no object"]')
    (found,) = Runs([paths.to_path(run)]).all().values()
    state = found.state()
    assert any("cannot be read" in one["title"] for one in state.warnings)
    assert not state.active and state.total == 0
