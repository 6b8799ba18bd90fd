"""What those who watch a run ask of it: pictures at once, and to stop and save."""

import json
import threading
import time

import pytest

from sdjax.checkpoints.checkpoint import latest_step
from sdjax.config import resolve
from sdjax.parallel import hosts
from sdjax.system import paths, wishes
from sdjax.system.wishes import SAMPLE, STOP
from sdjax.train import loop
from sdjax.train import wishes as listening
from sdjax.train.wishes import Wishes
from tests.conftest import small_autoencoder
from tests.parallel.test_hosts import monitor  # noqa: F401, a fixture


def wait(condition):
    deadline = time.monotonic() + 300  # a busy machine compiles for minutes
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_wish_is_heard_once_and_its_file_goes(tmp_path):
    with Wishes(tmp_path, every=0.01) as heard:
        assert not heard.draws_after(1) and not heard.stops_after(1)
        wishes.make(tmp_path, SAMPLE)
        assert wishes.pending(tmp_path) in ([SAMPLE], [])
        wait(lambda: not wishes.pending(tmp_path))
        wait(lambda: heard.draws_after(2))
        assert not heard.draws_after(3) and not heard.stops_after(3)
        wishes.make(tmp_path, STOP)
        wait(lambda: heard.stops_after(4))


def test_wishes_of_before_the_start_are_void(tmp_path):
    wishes.make(tmp_path, STOP)
    with Wishes(tmp_path, every=0.01) as heard:
        assert wishes.pending(tmp_path) == []
        assert not heard.stops_after(1)


def test_a_folder_that_cannot_be_read_stops_no_run(tmp_path):
    (tmp_path / wishes.FOLDER).write_text("no folder")
    with Wishes(tmp_path, every=0.01) as heard:
        time.sleep(0.05)
        assert not heard.stops_after(1)
    with pytest.raises(ValueError, match="expected"):
        wishes.make(tmp_path, "../x")


@pytest.mark.parametrize("ahead", [-2, -1, 0, 1, 2])
def test_hosts_draw_after_the_same_step(monitor, ahead):  # noqa: F811
    asked, drawn = 21, {}
    assert not any(
        hosts.agreed("wish/sample/0", step, asked=False) for step in range(1, 22 + ahead)
    )
    for step in range(asked, asked + 20):
        if hosts.agreed("wish/sample/0", step, asked=True):
            drawn["asked"] = step
            break
    for step in range(asked + ahead + 1, asked + 20):
        if hosts.agreed("wish/sample/0", step, asked=False):
            drawn["other"] = step
            break
    assert drawn == {"asked": 32, "other": 32}


def test_a_run_draws_and_stops_as_it_is_asked_and_goes_on(
    tiny_config, tmp_path, capsys, monkeypatch
):
    """The same command goes on afterwards, to the steps that the recipe says."""
    monkeypatch.setattr(listening, "EVERY", 0.02)
    small_autoencoder(tiny_config)
    tiny_config.train.update(steps=4000, log_every=10, checkpoint_every=4000)
    tiny_config.train.sample_every = 0
    folder = paths.to_path(tmp_path / "run")

    def ask():
        wait(lambda: (folder / "metrics.jsonl").exists() and lines(folder))
        wishes.make(folder, SAMPLE)
        wait(lambda: list((folder / "samples").glob("0*.png")))
        wishes.make(folder, STOP)

    asking = threading.Thread(target=ask)
    asking.start()
    assert loop.run(resolve(tiny_config), str(folder)) == loop.DONE
    asking.join()
    (picture, *_) = sorted((folder / "samples").glob("0*.png"))
    stopped = latest_step(folder)
    assert 0 < int(picture.stem) <= stopped < 4000
    told = capsys.readouterr().out
    assert f"stopped as asked on the page after step {stopped} and saved" in told
    tiny_config.train.steps = stopped + 5
    assert loop.run(resolve(tiny_config), str(folder)) == loop.DONE
    assert latest_step(folder) == stopped + 5


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
