"""Writers, speed, progress, delayed fetching and run health."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.errors import UserError
from sdjax.parallel.chips import peak_flops
from sdjax.train.monitoring import event_files, metrics_log, telemetry
from sdjax.train.monitoring.health import Diverged, NonFiniteCounter, SpikeDetector
from sdjax.train.monitoring.monitor import Interval
from sdjax.train.monitoring.speed import Throughput, device_memory
from sdjax.train.monitoring.telemetry import DelayedMetrics, Telemetry


def rows(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# ---- on the device ---------------------------------------------------------------------------


def test_group_norms():
    rng = np.random.default_rng(0)
    shapes = {
        "unet.conv_in.kernel": (3, 3, 2, 4),
        "unet.conv_in.bias": (4,),
        "unet.down_blocks.0.resnets.0.conv1.kernel": (4, 4),
        "unet.down_blocks.0.attentions.0.norm.scale": (4,),
        "unet.down_blocks.1.resnets.0.conv1.kernel": (4, 4),
        "text_encoder.encoder.layers.0.q_proj.kernel": (4, 4),
        "bare": (2,),
    }
    tree = {p: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for p, s in shapes.items()}
    norms = jax.jit(lambda tree: telemetry.group_norms(telemetry.squares(tree)))(tree)
    groups = {
        "unet.conv_in": "unet.conv_in.",
        "unet.down_blocks.0": "unet.down_blocks.0",
        "unet.down_blocks.1": "unet.down_blocks.1",
        "text_encoder.encoder": "text_encoder",
        "bare": "bare",
    }
    assert set(norms) == set(groups)
    for group, start in groups.items():
        values = [np.asarray(v, np.float64).ravel() for p, v in tree.items() if p.startswith(start)]
        assert norms[group].dtype == jnp.float32
        np.testing.assert_allclose(norms[group], np.linalg.norm(np.concatenate(values)), rtol=1e-6)
    deep = telemetry.group_norms(telemetry.squares(tree), 3)
    assert "unet.down_blocks.0" in deep and "text_encoder.encoder.layers.0" in deep
    assert set(telemetry.group_norms(telemetry.squares(tree), 1)) == {
        "unet",
        "text_encoder",
        "bare",
    }
    total = np.linalg.norm(np.concatenate([np.asarray(v, np.float64).ravel()
                                           for v in tree.values()]))  # fmt: skip
    np.testing.assert_allclose(telemetry.total_norm(telemetry.squares(tree)), total, rtol=1e-6)


def test_bucket_means_add_up_over_micro_batches():
    rng = np.random.default_rng(0)
    timesteps = np.concatenate([[0, 249, 250, 999, 1000.0], rng.uniform(0, 740, 45)])
    values = rng.normal(size=50).astype(np.float32)
    f = jax.jit(telemetry.bucket_means, static_argnums=(2, 3))
    whole = f(values, timesteps.astype(np.float32), 4, 1000)
    index = np.minimum(timesteps // 250, 3)
    for i in range(4):
        np.testing.assert_allclose(whole["sum"][i], values[index == i].sum(), rtol=1e-5)
        assert whole["count"][i] == (index == i).sum()
    parts = [f(values[s], timesteps[s].astype(np.float32), 4, 1000)
             for s in (slice(0, 20), slice(20, 50))]  # fmt: skip
    both = jax.tree.map(jnp.add, *parts)
    scalars = telemetry.bucket_scalars(both, 1000)
    assert list(scalars) == ["t0000-0249", "t0250-0499", "t0500-0749", "t0750-0999"]
    np.testing.assert_allclose(scalars["t0000-0249"], values[index == 0].mean(), rtol=1e-5)


def test_buckets_without_examples_are_left_out_and_nan_stays_in_its_bucket():
    buckets = telemetry.bucket_means(jnp.array([jnp.nan, 2.0]), jnp.array([10, 900]), 4, 1000)
    scalars = telemetry.bucket_scalars(buckets, 1000)
    assert list(scalars) == ["t0000-0249", "t0750-0999"]
    assert np.isnan(scalars["t0000-0249"]) and scalars["t0750-0999"] == 2.0


# ---- fetching --------------------------------------------------------------------------------


def test_metrics_come_late_in_order_and_once():
    queue = DelayedMetrics(delay=2)
    arrived = []
    for step in range(1, 6):
        now = queue.push(step, {"loss": jnp.float32(step), "nested": {"x": jnp.arange(2)}})
        assert [s for s, _ in now] == ([step - 2] if step > 2 else [])
        arrived += now
    arrived += queue.flush()
    assert queue.flush() == []
    assert [s for s, _ in arrived] == [1, 2, 3, 4, 5]
    for step, metrics in arrived:
        assert isinstance(metrics["loss"], np.ndarray) and metrics["loss"] == step


def test_only_old_enough_metrics_are_waited_for(monkeypatch):
    touched = []

    class Pending:
        def __init__(self, step):
            self.step = step

        def __array__(self, dtype=None, copy=None):
            touched.append(self.step)
            return np.zeros(())

    queue = DelayedMetrics(delay=3)
    for step in range(10):
        queue.push(step, {"loss": Pending(step)})
        assert touched == list(range(step - 2))


# ---- speed -----------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_throughput_leaves_out_compilation_and_pauses():
    clock = Clock()
    meter = Throughput(batch_size=8, clock=clock)
    assert meter.measure() is None
    clock.now = 100.0  # compilation and the first step
    meter.done(1)
    assert meter.measure() is None
    for step in range(2, 12):
        clock.now += 0.5
        meter.done(step)
        if step == 6:
            with meter.pause():
                clock.now += 1000
    np.testing.assert_allclose(meter.measure(), 16.0)
    assert meter.measure() is None
    with meter.pause():
        clock.now += 7
    clock.now += 0.25
    meter.done(12)
    np.testing.assert_allclose(meter.measure(), 32.0)


def test_a_pause_that_raises_still_ends():
    clock = Clock()
    meter = Throughput(batch_size=1, clock=clock)
    meter.done(1)
    with pytest.raises(KeyError), meter.pause():
        clock.now += 5
        raise KeyError
    clock.now += 1
    meter.done(2)
    np.testing.assert_allclose(meter.measure(), 1.0)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_flops(kind, peak):
    assert peak_flops(kind) == peak


def test_device_memory_is_empty_or_positive():
    assert all(v > 0 for v in device_memory().values())


# ---- health ----------------------------------------------------------------------------------


def test_stops_after_so_many_in_a_row():
    counter = NonFiniteCounter(3)
    for step, skipped in enumerate([True, True, False, True, True, False]):
        counter.observe(step, skipped)
    assert (counter.total, counter.in_a_row) == (4, 0)
    counter.observe(6, True)
    counter.observe(7, True)
    with pytest.raises(Diverged, match="step 8: .* 3 steps in a row .7 in all") as error:
        counter.observe(8, True)
    assert (error.value.step, error.value.in_a_row, error.value.total) == (8, 3, 7)
    resumed = NonFiniteCounter(3, in_a_row=2, total=5)
    with pytest.raises(Diverged):
        resumed.observe(9, True)


def test_spikes_stand_out_and_do_not_hide_the_next():
    rng = np.random.default_rng(0)
    detector = SpikeDetector(6.0)
    norms = 1 + 0.1 * rng.normal(size=500)
    norms[[200, 210, 400]] = [10, 10, 3]
    found = [i for i, norm in enumerate(norms) if detector.observe(norm)]
    assert found == [200, 210, 400]
    np.testing.assert_allclose(detector.mean, 1, atol=0.1)


def test_running_moments_are_plain_averages_at_first():
    values = np.random.default_rng(0).normal(5, 1, size=30)
    detector = SpikeDetector(6.0, warmup=50)
    for value in values:
        assert not detector.observe(value)
    np.testing.assert_allclose(detector.mean, values.mean())
    np.testing.assert_allclose(detector.variance, values.var())


def test_a_lasting_new_level_is_accepted():
    detector = SpikeDetector(6.0)
    for _ in range(200):
        assert not detector.observe(1.0)
    flags = [detector.observe(2.0) for _ in range(400)]
    assert flags[0] and not any(flags[-100:])


def test_a_smooth_run_raises_no_alarm():
    detector = SpikeDetector(6.0)
    assert not any(detector.observe(1.0 + 1e-4 * (i % 7)) for i in range(300))


def test_non_finite_norms_are_spikes_that_leave_no_trace():
    detector = SpikeDetector(6.0)
    for _ in range(60):
        detector.observe(1.0)
    before = detector.get_state()
    assert detector.observe(float("nan")) and detector.observe(float("inf"))
    assert detector.get_state() == before


def test_detector_resumes_exactly():
    rng = np.random.default_rng(1)
    norms = np.exp(rng.normal(size=200))
    whole, first, second = SpikeDetector(3.0), SpikeDetector(3.0), SpikeDetector(3.0)
    expected = [whole.observe(n) for n in norms]
    flags = [first.observe(n) for n in norms[:77]]
    second.set_state(json.loads(json.dumps(first.get_state())))
    flags += [second.observe(n) for n in norms[77:]]
    assert flags == expected
    assert second.get_state() == whole.get_state()


# ---- where metrics go ------------------------------------------------------------------------


def test_json_lines_are_valid_whatever_the_numbers(tmp_path):
    writer = metrics_log.JsonLines(tmp_path / "metrics.jsonl")
    writer.write_scalars(3, {"a": float("nan"), "b": np.float32(np.inf), "c": -np.inf, "d": 1})
    writer.write_scalars(4, {"a": jnp.float32(0.1), "e": True, "f": np.int64(7)})
    writer.close()

    def constant(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=constant) for line in lines)
    assert first == {"step": 3, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1}
    assert np.isnan(float(first["a"])) and float(first["c"]) == -np.inf
    assert second == {"step": 4, "a": float(np.float32(0.1)), "e": 1, "f": 7}


def test_a_step_has_one_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metrics_log.JsonLines(path)
    writer.write_scalars(3, {"a": 1, "long": 0.123456789})
    writer.write_scalars(4, {"a": 2})
    writer.write_scalars(4, {"b": 3})
    writer.close()
    writer = metrics_log.JsonLines(path)  # as a resumed run does
    writer.write_scalars(4, {"b": 4, "c": 5})
    writer.write_scalars(5, {"a": 6})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 3, "a": 1, "long": 0.123456789},
        {"step": 4, "a": 2, "b": 4, "c": 5},
        {"step": 5, "a": 6},
    ]


def test_resuming_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics_log.trim_metrics(path, 5) == 0
    lines = [json.dumps({"step": s, "train/loss": s / 10}) + "\n" for s in range(1, 9)]
    path.write_text("".join(lines) + "[" * 100_000 + '\n{"step": 4, "train/lo')
    assert metrics_log.trim_metrics(path, 5) == 5
    assert path.read_text() == "".join(lines[:5])
    assert metrics_log.trim_metrics(path, 5) == 0


def read_events(workdir) -> dict:
    """{tag: [(step, value)]}, from the event files themselves."""
    import tensorflow as tf
    from tensorboard.compat.proto.event_pb2 import Event

    found: dict = {}
    for file in sorted((workdir / "tensorboard").iterdir()):
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            event = Event.FromString(record)
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.tensor))
    return found


def test_event_files_are_those_of_clu(tmp_path):
    """clu writes through `tf.summary`: the same tags, steps, plugins and values."""
    import tensorflow as tf
    from clu import metric_writers
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.util.tensor_util import make_ndarray

    rng = np.random.default_rng(0)
    pictures = rng.uniform(-0.1, 1.1, (2, 5, 4, 3)).astype(np.float32)
    found = []
    writers = event_files.open_writer, metric_writers.SummaryWriter
    for folder, make in zip(("ours", "theirs"), writers, strict=True):
        writer = make(str(tmp_path / folder))
        writer.write_hparams({"rate": 1e-4, "name": "x", "flag": True})
        writer.write_scalars(3, {"a": 0.1, "b": 7})
        writer.write_images(4, {"float": pictures, "whole": (pictures * 99).astype(np.uint8)})
        writer.write_texts(5, {"text": "*words* \u00e9\x00"})
        writer.close()
        (file,) = (tmp_path / folder).iterdir()
        values = {}
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            event = Event.FromString(record)
            for value in event.summary.value:
                plugin = value.metadata.plugin_data
                if value.HasField("tensor") and plugin.plugin_name != "hparams":
                    held = make_ndarray(value.tensor)
                    if plugin.plugin_name == "images":
                        assert held[:2].tolist() == [b"4", b"5"]  # width, height
                        held = np.stack([tf.io.decode_png(png) for png in held[2:]])
                else:
                    held = None
                values[value.tag] = (event.step, plugin.plugin_name, plugin.content, held)
        found.append(values)
    ours, theirs = found
    assert ours.keys() == theirs.keys() and len(ours) == 6
    for tag, (step, plugin, content, value) in theirs.items():
        assert ours[tag][:2] == (step, plugin)
        if plugin != "hparams":  # which hold the time
            assert ours[tag][2] == content
            np.testing.assert_array_equal(ours[tag][3], value, err_msg=tag)
            assert ours[tag][3].dtype == value.dtype


def test_a_run_is_written_to_both(tmp_path, capsys):
    with Telemetry(tmp_path, total_steps=4, batch_size=8, terminal=False) as log:
        log.hparams({"optim": {"learning_rate": 1e-4, "groups": (("a", 0.5),)}, "name": "x"})
        for step in range(1, 5):
            log.done(step)
            metrics = {"loss": jnp.float32(step), "learning_rate": 1e-4, "norms": {"unet": 2.0}}
            log.log(step, metrics)
        log.scalars(4, {"eval": {"loss": np.float32(0.5)}})
        log.images(
            4, "samples", np.zeros((2, 8, 8, 3), np.uint8), ["a red *circle*", "a blue square"]
        )
    training = rows(tmp_path)  # what is told of a step later joins its line
    assert [r["step"] for r in training] == [1, 2, 3, 4]
    assert training[2]["train/loss"] == 3.0 and training[2]["train/norms/unet"] == 2.0
    assert [r["train/images_seen"] for r in training] == [8, 16, 24, 32]
    assert "train/images_per_second" not in training[0]
    assert training[1]["train/images_per_second"] > 0
    assert "train/mfu" not in training[1]  # no FLOPs were given
    assert [r.get("eval/loss") for r in training] == [None, None, None, 0.5]

    events = read_events(tmp_path)
    assert [step for step, _ in events["train/loss"]] == [1, 2, 3, 4]
    assert len(events["samples"][0][1].string_val) == 2 + 2  # width, height, two PNGs
    captions = events["samples/captions"][0][1].string_val[0].decode()
    assert "a red *circle*" in captions and "a blue square" in captions
    assert "learning_rate" in events["config"][0][1].string_val[0].decode()
    assert "_hparams_/session_start_info" in events

    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "step 1/4  loss 1.0000  lr 1.00e-04"
    assert printed[1].startswith("step 2/4  loss 2.0000  ")
    assert "images/s  lr 1.00e-04  0:0" in printed[1] and printed[1].endswith(" left")


def test_a_resumed_run_continues_the_file(tmp_path):
    for start, stop in ((0, 6), (4, 8)):
        with Telemetry(tmp_path, total_steps=8, batch_size=1, start_step=start) as log:
            for step in range(start + 1, stop + 1):
                log.done(step)
                log.log(step, {"loss": start + step / 100})
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 9))
    assert [r["train/loss"] for r in rows(tmp_path)][3:5] == [0.04, 4.05]


def test_model_flops_utilisation(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "peak_flops", lambda kind: 1e9)
    with Telemetry(tmp_path, total_steps=2, batch_size=2, flops_per_image=5e8) as log:
        clock = Clock()
        log.throughput = Throughput(2, clock=clock)
        log.done(1)
        clock.now += 4
        log.done(2)
        log.log(2, {})
    row = rows(tmp_path)[0]
    assert row["train/images_per_second"] == 0.5
    np.testing.assert_allclose(row["train/mfu"], 0.25 / jax.device_count())


def test_a_full_disk_is_reported_with_its_path(tmp_path, monkeypatch):
    def full(self, step, scalars):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics_log.JsonLines, "write_scalars", full)
    with pytest.raises(UserError, match=f"written to {tmp_path}: .*No space left on device"):
        with Telemetry(tmp_path, total_steps=2, batch_size=2) as log:
            log.log(1, {"loss": 1.0})
    with pytest.raises(KeyError):  # what went wrong first is what is raised
        with Telemetry(tmp_path, total_steps=2, batch_size=2) as log:
            log.log(1, {"loss": 1.0})
            raise KeyError


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run"):
        Telemetry(tmp_path / "file" / "run", total_steps=2, batch_size=2)


def test_event_files_that_cannot_be_written_are_reported(tmp_path):
    (tmp_path / "tensorboard").touch()  # a file where their folder goes
    with pytest.raises(UserError, match=f": {tmp_path}/tensorboard: Not a directory\n"):
        with Telemetry(tmp_path, total_steps=2, batch_size=2) as log:
            log.log(1, {"loss": 1.0})
            log.flush()
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_flush_puts_all_on_disk(tmp_path):
    with Telemetry(tmp_path, total_steps=9, batch_size=1) as log:
        log.log(1, {"loss": 1.0})
        log.flush()
        assert len(rows(tmp_path)) == 1


def test_the_bar_of_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Telemetry(tmp_path, total_steps=4, batch_size=1, start_step=1, terminal=True) as log:
        log.message("a [bracket] stays")
        for step in (2, 3, 4):
            log.done(step)
            log.log(step, {"loss": 0.25})
    printed = capsys.readouterr().out
    assert "a [bracket] stays" in printed
    assert "4/4" in printed and "loss 0.2500" in printed
    assert "step 4/4" not in printed  # no plain lines beside it


def test_tensorflow_is_quiet_and_sees_no_accelerator():
    """And it is not loaded to write TensorBoard's files."""
    code = (
        "import sys, tempfile; from sdjax.train.monitoring.telemetry import Telemetry\n"
        "with Telemetry(tempfile.mkdtemp(), total_steps=2, batch_size=2, terminal=False) as log:\n"
        "    log.hparams({'a': 1}); log.images(1, 'b', __import__('numpy').zeros((1, 4, 4, 3)))\n"
        "    log.scalars(1, {'loss': 1.0}); log.flush()\n"
        "assert 'tensorflow' not in sys.modules\n"
        "import tensorflow as tf; "
        "print(tf.config.get_visible_devices('GPU'), tf.config.get_visible_devices('TPU'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[] []", "")


def test_waiting_for_data_counts_where_nothing_else_runs():
    metrics = {
        "finite": True, "loss": 1.0, "grad_norm": 1.0, "update_norm": 1.0, "grad_norms": {},
        "param_norms": {}, "update_ratios": {}, "aux": {}, "health": {"skipped": 0},
    }  # fmt: skip
    for busy in (True, False):
        interval = Interval(1000)
        with interval.waiting(lambda busy=busy: busy):
            time.sleep(0.05)
        interval.add(metrics)
        assert (interval.summary()["data_wait"] > 0.5) is not busy
