"""Folders of made-up runs, and servers that watch them."""

import json
import threading

import pytest

from sdjax.system import locks, paths
from sdjax.web.server.fields import Limits
from sdjax.web.server.site import Place, make_site
from sdjax.web.watch.pages import Watch
from sdjax.web.watch.runs import Runs
from tests.web.report_workdir import lines, make_lines, write_pictures

TOKEN = "0123456789abcdef"


def make_run(folder, count, *, total=4000, seed=0, pictures=(0, 100)):
    """A run of `count` lines, ten steps each."""
    folder.mkdir(parents=True)
    config = {"train": {"steps": total}, "data": {"batch_size": 32}, "ema": {"profiles": ["raw"]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_bytes(lines(*make_lines(count, seed=seed)))
    if pictures:
        write_pictures(folder / "samples", pictures, kinds=("",), side=64)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Two runs, the first of which is held as sdjax.main holds one."""
    make_run(tmp_path / "runs" / "first", 40)
    make_run(tmp_path / "runs" / "second", 30, seed=1, pictures=())
    with locks.held(tmp_path / "runs" / "first", "--workdir", "sdjax.main"):
        yield tmp_path / "runs"


def make_watch(folder, *, token=""):
    """The application that watches a folder, and its view."""
    places = [Place("Watch", "/watch")]
    watch = Watch(Runs([paths.to_path(folder)]), bool(token), places, threading.Event())
    hosts = () if token else ("localhost", "127.0.0.1", "testserver")
    return make_site(watch.routes(), Limits(rate=10**6), token=token, hosts=hosts), watch
