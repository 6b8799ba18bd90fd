"""W&B, MLflow and trackio beside TensorBoard: what they get, and what they cannot do to a run."""

import importlib
import inspect
import sys
import threading
import time

import numpy as np
import pytest

from sdjax.config import resolve
from sdjax.errors import UserError
from sdjax.monitor_config import TRACKERS, MonitorConfig
from sdjax.system import paths
from sdjax.train import loop
from sdjax.train.trackers import registry, tracker
from sdjax.train.trackers.tracker import TrackedRun, TrackerThread, close_all
from tests.conftest import small_autoencoder
from tests.train import fake_trackers
from tests.train.fake_trackers import STORE

CONFIG = {
    "optim": {"name": "adamw", "learning_rate": 1e-4},
    "many": {str(i): i for i in range(150)},
}


@pytest.fixture
def fakes(monkeypatch):
    yield fake_trackers.install(monkeypatch)
    fake_trackers.uninstall()


def tracked(folder, name="wandb", config=CONFIG):
    return TrackedRun(name, paths.to_path(folder), "project", "shapes", config)


def thread(run, open_tracker, said, **options):
    return TrackerThread(run, open_tracker, said.append, **options)


def opened(name):
    return importlib.import_module(registry.MODULES[name]).open_tracker


# ---- each tracker ----------------------------------------------------------------------------


def process(folder, name, steps, config=CONFIG):
    """A process of a run: it opens the tracker, logs steps, and pictures of the last one."""
    said = []
    run = opened(name)(tracked(folder, name, config), said.append)
    for step in steps:
        run.scalars(step, {"train/loss": 1 / step})
    run.images(steps[-1], "samples", np.zeros((2, 4, 4, 3), np.uint8), ["a red circle"])
    run.close()
    return said


def test_wandb_run_that_is_resumed_keeps_all_points_by_step(fakes, tmp_path):
    said = process(tmp_path, "wandb", range(1, 6))
    process(tmp_path, "wandb", range(4, 9), CONFIG | {"seed": 1})
    ((id, run),) = STORE["wandb"].items()
    assert said == [f"W&B: https://wandb.invalid/{id}"] and run["opened"] == 2
    assert run["metrics"] == {"step": None, "*": "step"}
    losses = [(row["step"], row["train/loss"]) for row in run["rows"] if "train/loss" in row]
    assert losses == [(step, 1 / step) for step in (1, 2, 3, 4, 5, 4, 5, 6, 7, 8)]
    shown = [(row["step"], row["samples"]) for row in run["rows"] if "samples" in row]
    assert [step for step, _ in shown] == [5, 8]
    assert [image.caption for image in shown[0][1]] == ["a red circle", None]
    assert run["config"] == CONFIG | {"seed": 1} and run["project"] == "project"


def test_fake_wandb_drops_steps_that_do_not_rise(fakes):
    """The trap that `step` as data avoids."""
    run = fakes["wandb"].init(id="a", resume="allow")
    for step in (1, 2, 3, 2, 4):
        run.log({"x": step}, step=step)
    assert [row["x"] for row in STORE["wandb"]["a"]["rows"]] == [1, 2, 3, 4]


def test_mlflow_run_is_resumed_by_its_id(fakes, tmp_path):
    process(tmp_path, "mlflow", range(1, 4))
    process(tmp_path, "mlflow", range(3, 5), CONFIG | {"optim": {"name": "lion"}})
    ((id, run),) = STORE["mlflow"].items()
    assert [(key, step) for key, _, step in run["metrics"]] == [
        ("train/loss", step) for step in (1, 2, 3, 3, 4)
    ]
    assert run["params"]["optim.learning_rate"] == "0.0001" and len(run["params"]) == 152
    assert run["params"]["optim.name"] == "adamw"  # MLflow changes none ...
    assert run["config.json"]["optim"] == {"name": "lion"}  # ... this is what runs
    assert run["images"][:2] == [("samples_1", 3, (4, 4, 3)), ("samples_2", 3, (4, 4, 3))]
    assert (run["status"], run["name"], run["experiment"]) == ("FINISHED", "shapes", "project")


def test_mlflow_store_without_the_run_gets_a_new_one_and_says_so(fakes, tmp_path):
    process(tmp_path, "mlflow", range(1, 4))
    STORE["mlflow"].clear()
    said = process(tmp_path, "mlflow", range(3, 5))
    assert "has no run" in said[0] and len(STORE["mlflow"]) == 1


def test_trackio_run_is_resumed_by_a_name_of_its_own(fakes, tmp_path):
    process(tmp_path / "a", "trackio", range(1, 4))
    process(tmp_path / "a", "trackio", range(3, 5))
    process(tmp_path / "b", "trackio", range(1, 2))
    (first, a), (second, _) = STORE["trackio"].items()
    assert first.startswith("shapes-") and second.startswith("shapes-")
    assert [step for step, row in a["rows"] if "train/loss" in row] == [1, 2, 3, 3, 4]
    assert {name for step, row in a["rows"] for name in row} == {
        "train/loss", "samples/1", "samples/2",
    }  # fmt: skip


@pytest.mark.parametrize("text", ['{"id": "../../evil"}', '{"id": 5}', "{}"])
def test_id_of_a_workdir_that_is_none_is_not_taken(tmp_path, text):
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "wandb.json").write_text(text)
    assert tracked(tmp_path).id() is None


@pytest.mark.parametrize("name", TRACKERS)
def test_fake_has_the_signatures_of_the_package(name):
    real = pytest.importorskip(name)
    if name == "wandb":
        pairs = [(fake_trackers.WandbRun, real.Run, ("log", "define_metric", "finish"))]
    elif name == "mlflow":
        methods = ("create_run", "get_run", "update_run", "log_batch", "log_dict", "log_image",
                   "set_terminated")  # fmt: skip
        pairs = [(fake_trackers.MlflowClient, real.tracking.MlflowClient, methods)]
    else:
        pairs = [(fake_trackers.TrackioRun, real.Run, ("log", "finish"))]
    for fake, own, methods in pairs:
        for method in methods:
            wanted = set(inspect.signature(getattr(fake, method)).parameters)
            assert wanted <= set(inspect.signature(getattr(own, method)).parameters), method
    if name != "mlflow":
        fake = getattr(fake_trackers, name)()
        wanted = set(inspect.signature(fake.init).parameters)
        assert wanted <= set(inspect.signature(real.init).parameters)


# ---- the thread ------------------------------------------------------------------------------


class Raising:
    """A tracker that fails at every call."""

    def __getattr__(self, name):
        def call(*args):
            raise ConnectionError(f"no {name} today\nand more")

        return call


class Hanging:
    """A tracker whose calls do not come back until `free` is set."""

    def __init__(self):
        self.free = threading.Event()

    def __getattr__(self, name):
        return lambda *args: self.free.wait(60)


def test_tracker_that_raises_gives_one_warning_and_a_count(tmp_path):
    said = []
    own = thread(tracked(tmp_path), lambda run, say: Raising(), said)
    for step in range(50):
        own.call("scalars", step, {})
    close_all([own])
    assert said == [
        "warning: wandb failed: ConnectionError: no scalars today; the run goes on, and goes on "
        "trying",
        "wandb has not got 50 of 50 calls (0 dropped, 50 failed, 0 not sent in time); "
        "metrics.jsonl has all numbers",
    ]


@pytest.mark.parametrize("error", [OSError("no route"), SystemExit(3)])
def test_tracker_that_cannot_be_opened_gives_one_warning_and_a_count(tmp_path, error):
    def open_tracker(run, say):
        raise error

    said = []
    own = thread(tracked(tmp_path), open_tracker, said)
    for step in range(9):
        own.call("scalars", step, {})
    close_all([own])
    assert len(said) == 2 and said[0].startswith("warning: wandb cannot be opened: ")
    assert "has not got 9 of 9 calls" in said[1]


def test_tracker_that_hangs_takes_no_time_and_loses_what_does_not_fit(tmp_path):
    hanging, said = Hanging(), []
    own = thread(tracked(tmp_path), lambda run, say: hanging, said, size=10)
    began = time.monotonic()
    for step in range(1000):
        own.call("scalars", step, {})
    close_all([own], seconds=0.2)
    assert time.monotonic() - began < 5
    hanging.free.set()
    assert len(said) == 2 and "10 calls wait" in said[0]
    lost = int(said[1].split("not got ")[1].split()[0])
    assert 999 <= lost <= 1000


def test_tracker_that_hangs_takes_no_time_from_another(tmp_path):
    hanging, got, said = Hanging(), [], []

    class Good:
        def scalars(self, step, values):
            got.append(step)

        def close(self):
            got.append("closed")

    own = [thread(tracked(tmp_path), lambda run, say, t=t: t, said) for t in (hanging, Good())]
    for each in own:
        each.call("scalars", 1, {})
    close_all(own, seconds=0.5)
    hanging.free.set()
    assert got == [1, "closed"]


# ---- the configuration, and a run ------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, said",
    [({"trackers": ("comet",)}, "'comet'; expected some of wandb, mlflow, trackio"),
     ({"trackers": ("wandb", "wandb")}, "each name once"),
     ({"trackers": ("wandb",), "project": " "}, "monitor.project is empty"),
     ({"prometheus_port": 70000}, "expected 0 \\(none\\) to 65535"),
     ({"prometheus_port": 1, "prometheus_host": ""}, "prometheus_host is empty")],
)  # fmt: skip
def test_wrong_monitor_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        MonitorConfig(**fields)


def test_names_of_trackers_are_those_that_there_are():
    assert set(registry.MODULES) == set(TRACKERS)


@pytest.mark.parametrize("name", TRACKERS)
def test_tracker_that_is_not_installed_is_refused_at_the_start(
    tiny_config, tmp_path, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, name, None)
    tiny_config.monitor.trackers = (name,)
    with pytest.raises(UserError, match=rf"pip install 'sdjax\[{name}\]'"):
        loop.run(resolve(tiny_config), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_run_outlives_its_trackers_and_keeps_all_points_over_a_kill(
    fakes, tiny_config, tmp_path, monkeypatch, capsys
):
    """One tracker works, one raises at every call, one hangs; the run is killed and resumed."""
    hanging = Hanging()
    fakes["trackio"].init = lambda **options: hanging
    monkeypatch.setattr(fake_trackers.MlflowClient, "log_batch", Raising().log_batch)
    monkeypatch.setattr(tracker, "CLOSE_SECONDS", 1.0)
    small_autoencoder(tiny_config)
    tiny_config.monitor.trackers = ("wandb", "mlflow", "trackio")
    tiny_config.train.update(steps=6, checkpoint_every=3, sample_every=3)
    make = loop.make_iterator

    class Killed(Exception):
        pass

    class Killing:
        def __init__(self, data):
            self.data = data

        def __getattr__(self, name):
            return getattr(self.data, name)

        def __next__(self):
            if self.data.step == 5:
                raise Killed
            return next(self.data)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_iterator", lambda *a, **kw: Killing(make(*a, **kw)))
        with pytest.raises(Killed):
            loop.run(resolve(tiny_config), str(tmp_path / "run"))
    capsys.readouterr()
    assert loop.run(resolve(tiny_config), str(tmp_path / "run")) == loop.DONE
    hanging.free.set()
    output = capsys.readouterr().out
    assert output.count("warning: mlflow cannot be opened") == 1
    assert "trackio has not got" in output and "wandb has not got" not in output
    ((_, run),) = STORE["wandb"].items()
    steps = [row["step"] for row in run["rows"] if "train/loss" in row]
    assert steps[:3] == [1, 2, 3] and steps[-3:] == [4, 5, 6] and set(steps) == set(range(1, 7))
    assert [row["step"] for row in run["rows"] if "samples" in row] == [3, 6]
    assert run["finished"] and run["name"] == "run" and run["config"]["train"]["steps"] == 6
