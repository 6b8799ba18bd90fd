"""The numbers of a run for Prometheus: names, counters that never fall, and no harm to the run."""

import dataclasses
import http.client
import json
import socket
import stat
import sys
import threading
import time

import jax
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sdjax.config import resolve
from sdjax.errors import UserError
from sdjax.monitor_config import MonitorConfig
from sdjax.system import paths, source
from sdjax.train import loop
from sdjax.train.exporting import exporter, server
from sdjax.train.exporting.exporter import Exporter
from sdjax.train.exporting.numbers import METRICS, OF_FIRST, Counters, counters_from
from tests.conftest import small_autoencoder

INFO = {"run": "shapes", "config": "0123456789ab", "git": "", "sdjax": "0", "family": "sd",
        "method": "denoise"}  # fmt: skip


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make(folder, said=None, start=0, **monitor):
    said = [] if said is None else said
    return Exporter(
        MonitorConfig(**monitor), paths.to_path(folder), INFO, said.append,
        start=start, planned=100, images=8, interval=10,
    )  # fmt: skip


def parse(text):
    """{sample: {labels other than run and process: value}}, of a valid exposition."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("run", "process")}
            assert sample.labels["run"] == "shapes" and sample.labels["process"] in "01"
            found.setdefault(sample.name, {})[tuple(sorted(labels.items()))] = sample.value
    return found


def scrape(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain")
    return answer.read().decode()


def settled(own):
    """Publish, and wait for it."""
    own.publish()
    deadline = time.monotonic() + 30
    while own._published.counters != own._numbers.counters and time.monotonic() < deadline:
        time.sleep(0.01)


def train(own, steps, finite=True):
    for step in steps:
        own.dispatched(step * 0.5)
        own.done(step, finite)


def names_of(text):
    return {family.name for family in text_string_to_metric_families(text)}


def test_every_number_is_served_under_its_name_and_type(tmp_path, monkeypatch):
    class Device:
        id = 3

        def memory_stats(self):
            return {"bytes_in_use": 5, "bytes_limit": 9}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    port, said = free_port(), []
    own = make(tmp_path, said, prometheus_port=port)
    train(own, range(1, 5))
    own.paused(1e9)
    train(own, [5], finite=False)
    own.scalars({"train/loss": 0.25, "train/grad_norm": 2.0, "train/learning_rate": 1e-4,
                 "train/mfu": 0.4, "validation/raw/loss": 0.5, "validation/raw/loss_at/t0000": 9.0,
                 "validation_train/warmup-0.9/loss": 0.125})  # fmt: skip
    own.saving(5, time.time())
    own.saved()
    settled(own)
    text = scrape(port)
    kinds = {f.name: f.type for f in text_string_to_metric_families(text)}
    assert kinds == {name.removesuffix("_total"): kind for name, (kind, _) in METRICS.items()}
    found = parse(text)
    one = {name: next(iter(values.values())) for name, values in found.items()}
    assert one["sdjax_steps_total"] == 5 and one["sdjax_images_total"] == 40
    assert one["sdjax_skipped_steps_total"] == 1 and one["sdjax_step"] == 5
    assert one["sdjax_data_wait_seconds_total"] == 2.5
    assert one["sdjax_step_seconds_count"] == 4 and one["sdjax_step_seconds_sum"] < 60
    assert found["sdjax_step_seconds_bucket"][("le", "+Inf"),] == 4
    assert one["sdjax_loss"] == 0.25 and one["sdjax_mfu_ratio"] == 0.4
    assert found["sdjax_validation_loss"] == {
        (("set", "validation"), ("weights", "raw")): 0.5,
        (("set", "validation_train"), ("weights", "warmup-0.9")): 0.125,
    }
    assert found["sdjax_device_memory_bytes"] == {(("device", "3"),): 5}
    assert one["sdjax_checkpoint_seconds_count"] == 1 and one["sdjax_checkpoint_last_step"] == 5
    assert abs(one["sdjax_checkpoint_last_success_timestamp_seconds"] - time.time()) < 60
    info = dict(next(iter(found["sdjax_run_info"])))
    assert info == {k: v for k, v in INFO.items() if k != "run"}
    assert said == [f"numbers for Prometheus at http://127.0.0.1:{port}/metrics"]
    own.close()
    with pytest.raises(ConnectionRefusedError):
        scrape(port)


def test_other_processes_have_what_is_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    port = free_port()
    own = make(tmp_path, prometheus_port=port)
    train(own, [1, 2])
    own.scalars({"train/loss": 0.25})
    settled(own)
    found = names_of(scrape(port))
    own.close()
    assert "sdjax_step_seconds" in found and "sdjax_data_wait_seconds" in found
    assert not found & {name.removesuffix("_total") for name in OF_FIRST}
    assert (tmp_path / "prometheus" / "process_1.json").exists()


def test_counters_read_before_a_kill_never_fall_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "PUBLISH_SECONDS", 1e9)
    port = free_port()
    own = make(tmp_path, prometheus_port=port)
    train(own, range(1, 8))
    settled(own)
    train(own, [8, 9])  # not published, so nobody has seen them
    before = parse(scrape(port))
    own._server.close()  # the process is gone, without a word
    port = free_port()
    again = make(tmp_path, prometheus_port=port, start=4)  # from a checkpoint
    resumed = parse(scrape(port))
    train(again, [5, 6])
    settled(again)
    after = parse(scrape(port))
    again.close()
    growing = [n for n in before if n.endswith(("_total", "_count", "_sum", "_bucket"))]
    assert {"sdjax_steps_total", "sdjax_step_seconds_bucket"} <= set(growing)
    for name in growing:
        for labels, value in before[name].items():
            assert value <= resumed[name][labels] <= after[name][labels], name
    assert after["sdjax_steps_total"][()] == 9 and after["sdjax_step"][()] == 6


def test_port_that_is_taken_is_passed_over_and_said(tmp_path):
    port, said = free_port(), []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        own = make(tmp_path, said, prometheus_port=port)
        assert f":{own._server.port}/metrics (port {port} is taken)" in said[0]
        assert own._server.port != port and "sdjax_step" in scrape(own._server.port)
        own.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no.such.host.invalid"])
def test_run_goes_on_where_nothing_can_be_listened_at(tmp_path, monkeypatch, host):
    monkeypatch.setattr(server, "PORTS", 1)
    port, said = free_port(), []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        own = make(tmp_path, said, prometheus_port=port, prometheus_host=host)
        train(own, [1, 2])
        own.close()
    assert len(said) == 1 and said[0].startswith("warning: no numbers for Prometheus")
    assert f"{host}:{port}" in said[0]


def test_client_that_says_nothing_keeps_nobody_waiting(tmp_path):
    port = free_port()
    own = make(tmp_path, prometheus_port=port)
    with socket.create_connection(("127.0.0.1", port)):
        assert "sdjax_step" in scrape(port)
        own.close()


def test_many_scrapes_at_once_are_answered(tmp_path):
    port, found = free_port(), []
    own = make(tmp_path, prometheus_port=port)
    threads = [threading.Thread(target=lambda: found.append(scrape(port))) for _ in range(20)]
    for thread in threads:
        thread.start()
    train(own, range(1, 200))
    for thread in threads:
        thread.join()
    own.close()
    assert len(found) == 20 and all(parse(text) for text in found)


def test_textfile_is_whole_and_everybodys_to_read(tmp_path):
    folder = tmp_path / "textfile"
    folder.mkdir()
    own = make(tmp_path / "run", textfile=str(folder))
    train(own, [1, 2, 3])
    own.close()
    (file,) = folder.iterdir()
    assert file.name.startswith("sdjax_shapes_") and file.name.endswith("_0.prom")
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert parse(file.read_text())["sdjax_steps_total"][()] == 3
    other = make(tmp_path / "other", textfile=str(folder))
    train(other, [1])
    other.close()
    assert len(list(folder.iterdir())) == 2


def test_what_cannot_be_written_is_said_once(tmp_path):
    (tmp_path / "prometheus").write_text("a file, where a folder is wanted")
    folder, said, port = tmp_path / "gone", [], free_port()
    folder.mkdir()
    own = make(tmp_path, said, prometheus_port=port, textfile=str(folder))
    folder.rmdir()
    for step in range(1, 4):
        train(own, [step])
        settled(own)
    assert parse(scrape(port))["sdjax_steps_total"][()] == 3  # it is served all the same
    own.close()
    assert sum("prometheus" in line for line in said) >= 1
    assert len([line for line in said if line.startswith("warning")]) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"steps": "many", "buckets": [1]}'])
def test_counters_that_cannot_be_read_begin_anew(tmp_path, text):
    (tmp_path / "prometheus").mkdir()
    (tmp_path / "prometheus" / "process_0.json").write_text(text)
    own = make(tmp_path)
    assert own._numbers.counters == Counters()
    own.close()


def test_counters_survive_json():
    own = Counters(steps=3, data_wait=0.5, last_save=1.5, last_saved=3)
    own.took(0.3)
    assert counters_from(json.loads(json.dumps(dataclasses.asdict(own)))) == own


def test_textfile_that_is_no_folder_is_refused_at_the_start(tmp_path):
    with pytest.raises(UserError, match="collector.textfile.directory"):
        exporter.check(MonitorConfig(textfile=str(tmp_path / "none")))


def test_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UserError, match=r"pip install 'sdjax\[prometheus\]'"):
        exporter.check(MonitorConfig(prometheus_port=9470))
    exporter.check(MonitorConfig())


def test_commit_is_that_of_the_clone():
    found = source.commit()
    assert found == "" or len(found) >= 7


def test_run_that_is_killed_and_resumed_counts_on(tiny_config, tmp_path, monkeypatch):
    """S7: scraped at every step of a run that dies at its fifth, and of the one that goes on."""
    texts = []
    monkeypatch.setattr(exporter, "PUBLISH_SECONDS", 0.0)
    port = free_port()
    small_autoencoder(tiny_config)
    tiny_config.monitor.update(prometheus_port=port, name="shapes", textfile=str(tmp_path))
    tiny_config.validation.examples = 4
    make_iterator = loop.make_iterator

    class Killed(Exception):
        pass

    class Scraping:
        def __init__(self, data, kill):
            self.data, self.kill = data, kill

        def __getattr__(self, name):
            return getattr(self.data, name)

        def __next__(self):
            if self.data.step == self.kill:
                raise Killed
            texts.append(scrape(port))
            return next(self.data)

    def run(kill):
        with monkeypatch.context() as patch:
            make = lambda *a, **kw: Scraping(make_iterator(*a, **kw), kill)  # noqa: E731
            patch.setattr(loop, "make_iterator", make)
            return loop.run(resolve(tiny_config), str(tmp_path / "run"))

    with pytest.raises(Killed):
        run(5)
    killed = len(texts)
    assert run(None) == loop.DONE
    assert len(texts) > killed >= 5
    (file,) = tmp_path.glob("*.prom")
    texts.append(file.read_text())
    rows = [parse(text) for text in texts]
    for name in ("sdjax_steps_total", "sdjax_images_total", "sdjax_step_seconds_count",
                 "sdjax_data_wait_seconds_total", "sdjax_skipped_steps_total",
                 "sdjax_checkpoint_seconds_count"):  # fmt: skip
        values = [row[name][()] for row in rows]
        assert values == sorted(values), name
    last = rows[-1]
    assert last["sdjax_step"][()] == 6 == last["sdjax_planned_steps"][()]
    assert last["sdjax_checkpoint_last_step"][()] == 6 and last["sdjax_steps_total"][()] >= 6
    assert (("set", "validation"), ("weights", "raw")) in last["sdjax_validation_loss"]
    assert last["sdjax_loss"][()] > 0 and last["sdjax_learning_rate"][()] > 0
    (labels,) = last["sdjax_run_info"]
    assert dict(labels)["family"] == "sd" and len(dict(labels)["config"]) == 12
