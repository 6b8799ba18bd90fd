"""The curves of the report: what it reads of metrics.jsonl, thins, smooths and draws."""

import base64

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from sdjax.train.monitoring import metrics_log
from sdjax.web.report.figures import POINTS, images_seen, sections
from sdjax.web.report.metrics import Curve, Metrics, parse, read_metrics, smooth, thin
from sdjax.web.report.run import read_run
from sdjax.web.report.warnings import find
from tests.web.report_workdir import lines, make_lines, make_workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with everything in it. Do not write into it."""
    return make_workdir(tmp_path_factory.mktemp("report") / "run")


# ---- metrics.jsonl ---------------------------------------------------------------------------


def test_reads_what_the_run_writes(tmp_path):
    """Through the writer of a run itself: integers, floats, NaN, lines with other names."""
    writer = metrics_log.JsonLines(tmp_path / "metrics.jsonl")
    writer.write_scalars(10, {"train/loss": np.float32(0.5), "train/spikes": 2})
    writer.write_scalars(20, {"train/loss": float("nan"), "train/spikes": 0})
    writer.write_scalars(20, {"validation/raw/loss": 0.25})
    writer.write_scalars(30, {"train/loss": float("inf"), "train/spikes": 1})
    writer.close()
    metrics = read_metrics(tmp_path)
    loss = metrics.curves["train/loss"]
    np.testing.assert_array_equal(loss.steps, [10, 20, 30])
    np.testing.assert_array_equal(loss.values, [0.5, np.nan, np.nan])
    np.testing.assert_array_equal(metrics.curves["train/spikes"].values, [2, 0, 1])
    np.testing.assert_array_equal(metrics.curves["validation/raw/loss"].steps, [20])
    assert metrics.nonfinite == {"train/loss": 2}
    assert (metrics.lines, metrics.broken, metrics.last_step) == (3, 0, 30)


@pytest.mark.parametrize("end", [b'{"step": 3, "train/lo', b'{"step": 3, "a": 0.', b"{", b"\x00"])
def test_a_last_line_half_written_is_not_there_yet(end):
    metrics = parse(lines({"step": 1, "a": 1.5}, {"step": 2, "a": 2.5}) + end)
    np.testing.assert_array_equal(metrics.curves["a"].values, [1.5, 2.5])
    assert metrics.broken == 0


def test_a_last_line_without_its_line_break_counts():
    metrics = parse(lines({"step": 1, "a": 1}) + b'{"step": 2, "a": 2}')
    np.testing.assert_array_equal(metrics.curves["a"].steps, [1, 2])


@pytest.mark.parametrize(
    "bad", [b"no json\n", b'{"a": 3}\n', b"[1]\n", b'{"step": "x", "a": 1}\n', b'{"step": 2, "a"\n']
)
def test_damaged_lines_are_left_out_and_counted(bad):
    metrics = parse(lines({"step": 1, "a": 1}) + bad + lines({"step": 3, "a": 3.5}))
    np.testing.assert_array_equal(metrics.curves["a"].steps, [1, 3])
    np.testing.assert_array_equal(metrics.curves["a"].values, [1, 3.5])
    assert (metrics.lines, metrics.broken) == (3, 1)
    (warning,) = find(read_run("/nowhere"), metrics)
    assert warning.title.startswith("1 of 3 lines")


def test_texts_in_the_metrics_are_no_curves():
    metrics = parse(lines({"step": 1, "a": 1, "b": "word"}, {"step": 2, "a": "word", "c": None}))
    assert set(metrics.curves) == {"a"} and metrics.broken == 0


def test_a_step_that_comes_again_counts_as_it_came_last():
    rows = [{"step": s, "a": v} for s, v in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0))]
    curve = parse(lines(*rows)).curves["a"]
    np.testing.assert_array_equal(curve.steps, [1, 2, 3])
    np.testing.assert_array_equal(curve.values, [1, 20, 30])


def test_both_readers_agree():
    rows = make_lines(300)
    rows[7]["train/loss"] = "NaN"
    data = lines(*rows)
    fast, careful = parse(data), parse(data + b"broken\n")
    assert set(fast.curves) == set(careful.curves) and careful.broken == 1
    for name, curve in fast.curves.items():
        np.testing.assert_array_equal(curve.steps, careful.curves[name].steps)
        np.testing.assert_array_equal(curve.values, careful.curves[name].values)


# ---- thinning, smoothing ---------------------------------------------------------------------


def test_thinning_keeps_ends_and_every_spike():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(100_000)
    values[[5, 41_234, 99_990]] = [50, -60, 70]
    small = thin(Curve(np.arange(100_000) * 7, values), POINTS)
    assert POINTS / 2 < len(small.steps) <= POINTS
    assert {50, -60, 70} <= set(small.values)
    assert (small.steps[0], small.steps[-1]) == (0, 7 * 99_999)
    assert (np.diff(small.steps) > 0).all()
    np.testing.assert_array_equal(small.values, values[small.steps // 7])


@pytest.mark.parametrize("count", [0, 1, 7, 2000])
def test_a_short_curve_is_left_as_it_is(count):
    curve = Curve(np.arange(count), np.zeros(count))
    assert thin(curve, POINTS) is curve


def test_thinning_leaves_a_gap_where_all_is_nan():
    values = np.ones(10_000)
    values[4000:5000] = np.nan
    small = thin(Curve(np.arange(10_000), values), 200)
    inside = (small.steps >= 4000) & (small.steps < 5000)
    assert np.isnan(small.values[inside]).any() and len(small.steps) <= 200
    assert np.isfinite(small.values[~inside]).all()


def test_smoothing_is_scipys_gaussian_over_what_is_finite():
    values = np.sin(np.arange(500) / 20)
    values[100] = np.nan
    steps = np.arange(500) * 10
    smoothed, width = smooth(Curve(steps, values))
    finite = np.delete(values, 100)
    np.testing.assert_array_equal(smoothed.values, gaussian_filter1d(finite, 4.99, mode="nearest"))
    assert width == pytest.approx(4.99 * 10, rel=0.01)
    assert smooth(Curve(steps[:15], values[:15])) is None


def test_smoothing_of_a_long_curve_is_that_of_its_means():
    """A straight line stays one, but for the ends, to the width of a bin."""
    count = 100_000
    smoothed, _ = smooth(Curve(np.arange(count), np.arange(count, dtype=float)))
    assert len(smoothed.steps) == 1000
    middle = slice(50, -50)
    np.testing.assert_allclose(smoothed.values[middle], smoothed.steps[middle], atol=1)


# ---- figures ---------------------------------------------------------------------------------


def decode(packed):
    return np.frombuffer(base64.b64decode(packed["data"]), "<" + packed["type"])


def test_every_metric_is_on_a_figure(workdir):
    metrics = read_metrics(workdir)
    drawn = {f.title: [s.name for s in f.series] for s in sections(metrics) for f in s.figures}
    assert drawn["Loss"] == [
        "training", "validation, raw weights", "validation, warmup-0.9999 weights"
    ]  # fmt: skip
    assert drawn["Validation loss, held-out against training examples"][-1] == (
        "training examples, warmup-0.9999 weights"
    )
    assert drawn["Training loss by timestep"] == [
        "0000-0249",
        "0250-0499",
        "0500-0749",
        "0750-0999",
    ]
    assert drawn["Validation loss by timestep, raw weights"] == ["t0937"]
    assert drawn["Device memory"] == ["in use", "peak", "limit"]
    assert len(drawn["Update to weight ratio"]) == 5
    once = sum(len(names) for names in drawn.values())
    left_out = {"train/images_seen", "train/epoch"} | {
        n for n in metrics.curves if n[:5] == "data/"
    }
    assert once == len(metrics.curves) - len(left_out) + 2  # validation is on two


def test_only_what_is_there_is_drawn_and_what_nobody_foresaw_too():
    metrics = parse(lines(*({"step": s, "train/loss": 1.0, "health/attention_logits/mid": 2.0,
                             "train/new": 3.0, "odd": 4.0} for s in (1, 2))))  # fmt: skip
    titles = [[f.title for f in section.figures] for section in sections(metrics)]
    assert titles == [["Loss"], ["health/attention_logits", "train/new", "odd"]]


def test_what_the_page_gets_is_what_was_measured(workdir):
    metrics = read_metrics(workdir)
    figures = [figure for section in sections(metrics) for figure in section.figures]
    sent = figures[0].data["series"][0]
    curve = metrics.curves["train/loss"]
    np.testing.assert_array_equal(decode(sent["x"]), curve.steps)
    np.testing.assert_array_equal(decode(sent["y"]), curve.values.astype(np.float32))
    assert np.isnan(decode(sent["y"])[5])
    # float32 does not tell 2**24 from 2**24 + 1
    late = Curve(np.array([2**24, 2**24 + 1]), np.zeros(2))
    figures = sections(Metrics({"train/loss": late}, {}, 2, 0))[0].figures
    np.testing.assert_array_equal(decode(figures[0].data["series"][0]["x"]), late.steps)


def test_logarithmic_axes_where_values_span_decades():
    rows = [{"step": s, "train/grad_norms/a": 10.0**-s, "train/loss": 1 / s, "train/spikes": 0}
            for s in range(1, 9)]  # fmt: skip
    by_title = {f.title: f.log for s in sections(parse(lines(*rows))) for f in s.figures}
    assert by_title == {
        "Loss": False, "Skipped steps and spikes": None, "Gradient norm by module": True
    }  # fmt: skip


def test_long_curves_say_that_they_are_thinned():
    curve = Curve(np.arange(50_000), np.random.default_rng(0).random(50_000))
    (section,) = sections(Metrics({"train/loss": curve}, {}, 50_000, 0))
    (figure,) = section.figures
    assert "Thinned from 50,000 to" in figure.note
    assert len(figure.series[0].x) <= POINTS
    # many curves share the page's room
    many = {f"train/grad_norms/{i}": curve for i in range(200)}
    figures = sections(Metrics(many, {}, 50_000, 0))[0].figures
    assert sum(len(s.x) for s in figures[0].series) <= 160_000


def test_images_seen_follows_the_metrics_or_the_batch_size():
    rows = [{"step": s, "train/images_seen": 32 * min(s, 5) + 64 * max(s - 5, 0)} for s in (5, 9)]
    assert images_seen(parse(lines(*rows)), 1) == ([0, 5, 9], [0, 160, 416])
    assert images_seen(parse(lines({"step": 8, "a": 1})), 4) == ([0, 8], [0, 32])
    assert images_seen(parse(lines({"step": 8, "a": 1})), None) == ([], [])
