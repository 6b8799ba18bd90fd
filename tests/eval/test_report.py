"""The report without a browser: what it reads, thins, says and escapes."""

import base64
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter1d

from sdjax import paths
from sdjax.eval import report_data, report_evaluations, report_pictures, report_run
from sdjax.eval.grids import save_png
from sdjax.eval.report_figures import POINTS, images_seen, sections, to_json
from sdjax.eval.report_metrics import Curve, Metrics, parse, read_metrics, smooth, thin
from sdjax.eval.report_page import gather, write_report
from sdjax.eval.report_run import read_run, recipe, summary
from sdjax.eval.report_warnings import find
from sdjax.eval.strips import append_column
from sdjax.report import main
from tests.eval.report_workdir import (
    NASTY,
    make_lines,
    make_workdir,
    write_evaluation,
    write_lines,
    write_pictures,
)
from tests.fake_gcs import FakeGCS


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with everything in it. Do not write into it."""
    return make_workdir(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(workdir, tmp_path_factory):
    """Its report."""
    return write_report(workdir, tmp_path_factory.mktemp("page") / "x.html").read_text()


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# ---- metrics.jsonl ---------------------------------------------------------------------------


def test_reads_what_the_run_writes(tmp_path):
    """Through the writer of a run itself: integers, floats, NaN, lines with other names."""
    writers = pytest.importorskip("sdjax.train.writers")
    writer = writers.JsonLinesWriter(tmp_path / "metrics.jsonl")
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
    sent = to_json(figures)["figures"][0]["series"][0]
    curve = metrics.curves["train/loss"]
    np.testing.assert_array_equal(decode(sent["x"]), curve.steps)
    np.testing.assert_array_equal(decode(sent["y"]), curve.values.astype(np.float32))
    assert np.isnan(decode(sent["y"])[5])
    # float32 does not tell 2**24 from 2**24 + 1
    late = Curve(np.array([2**24, 2**24 + 1]), np.zeros(2))
    figures = sections(Metrics({"train/loss": late}, {}, 2, 0))[0].figures
    np.testing.assert_array_equal(
        decode(to_json(figures)["figures"][0]["series"][0]["x"]), late.steps
    )


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


# ---- warnings --------------------------------------------------------------------------------


def titles(metrics, workdir="/nowhere", **more):
    return [w.title for w in find(read_run(workdir), metrics, **more)]


def test_all_that_is_wrong_with_the_run_is_told(workdir):
    found = gather(paths.to_path(workdir), paths.to_path(workdir) / "report.html")
    assert found.problems == []
    warnings = find(found.run, found.metrics, found.evaluations, found.data)
    text = "\n".join(w.title for w in warnings)
    for words in (
        "1 of 4,000 steps were skipped", "train/loss (1 lines)", "Overfitting: validation/warmup",
        "rose by 83.3% since step 2,000", "Stopped early at step 4,000 of 8,000",
        "1 spike(s): a loss or gradient norm far above", "waited for data 10.0%",
        "5.0% of the captions", "12 NASTY", "50 of 1,000 rows (5.0%)", "38.5 of 40.0 GiB",
        "Evaluation step-1000",
    ):  # fmt: skip
        assert words in text
    assert all(len(w.remedy) > 20 for w in warnings)
    assert [w.level for w in warnings] == sorted(
        (w.level for w in warnings), key="bad warn note".find
    )


def test_a_healthy_run_has_no_warnings():
    rows = [{"step": s, "train/loss": 1 / s, "train/skipped_steps": 0, "train/spikes": 0,
             "train/data_wait": 0.01, "train/images_seen": s, "train/truncated_captions": 0,
             "validation/raw/loss": 1 / s, "validation_train/raw/loss": 0.9 / s}
            for s in range(1, 30)]  # fmt: skip
    assert titles(parse(lines(*rows))) == []


def curve_of(name, values):
    return {name: Curve(np.arange(1, len(values) + 1), np.array(values, float))}


@pytest.mark.parametrize(
    ("held_out", "training", "overfits"),
    [
        ([5, 4, 3, 4, 5], [5, 4, 3, 2, 1], True),
        ([5, 4, 3, 4, 5], [1, 2, 3, 4, 5], False),  # both rise: something else
        ([5, 4, 3, 3.01, 3.02], [5, 4, 3, 2, 1], False),  # hardly at all
        ([5, 4, 3, 2, 3], [5, 4, 3, 2, 1], False),  # one validation is none
        ([5, 4, 3, 4, 3.01], [5, 4, 3, 2, 1], False),  # came back
    ],
)
def test_overfitting_is_a_gap_that_widens(held_out, training, overfits):
    curves = curve_of("validation/raw/loss", held_out)
    for name in ("validation_train/raw/loss", "train/loss"):
        found = titles(Metrics(curves | curve_of(name, training), {}, 5, 0))
        assert any("Overfitting" in title for title in found) == overfits


def test_what_a_run_counts_of_its_data_is_a_table(tmp_path):
    row = {"step": 0, "data/bucket_64x96": 1234, "data/cropped_share": 0.0625}
    (tmp_path / "metrics.jsonl").write_bytes(lines(row, {"step": 1, "train/loss": 1}))
    words = Elements(write_report(tmp_path).read_text()).words
    assert words[words.index("bucket 64x96") + 1] == "1,234"
    assert words[words.index("cropped share") + 1] == "0.0625"


def test_rollbacks_are_told(tmp_path):
    event = {"step": 1234, "batch": 1240, "what": "gradient norm", "value": 9.0, "mean": 1.0}
    (tmp_path / "rollbacks.json").write_text(json.dumps([event]))
    assert titles(parse(b""), tmp_path) == [
        "The run went back to a checkpoint 1 time(s), at step 1,234 (gradient norm)"
    ]


def test_cut_captions_are_counted_over_restarts():
    """The counter begins anew in each process: 30 and 20 of 100, not 20 of 100."""
    curves = curve_of("train/truncated_captions", [10, 30, 5, 20])
    curves |= curve_of("train/images_seen", [25, 50, 75, 100])
    assert titles(Metrics(curves, {}, 4, 0))[0].startswith("50.0% of the captions")


# ---- pictures and evaluations ----------------------------------------------------------------


def test_grids_of_each_kind_by_step(workdir):
    gallery = report_pictures.gather(workdir)
    assert [(row.kind, row.steps) for row in gallery.rows] == [
        ("", (0, 1000, 2000)), ("raw-unguided", (0, 1000, 2000))
    ]  # fmt: skip
    assert [kind for kind, _ in gallery.strips] == [""]
    assert gallery.rows[0].pictures[0].prompts == f"a large red circle\n{NASTY}"
    uri = gallery.rows[0].pictures[0].uri
    kind, data = uri.split(",")
    assert kind == "data:image/webp;base64"
    import io

    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (240, 240)
        original = np.asarray(Image.open(workdir / "samples" / "00000000.png").convert("RGB"))
        assert np.abs(np.asarray(image).astype(float) - original).mean() < 8  # lossy


def test_too_many_pictures_are_thinned_and_that_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_pictures(tmp_path / "samples", range(0, 7000, 100), kinds=("",), side=32)
    gallery = report_pictures.gather(tmp_path)
    (row,) = gallery.rows
    assert row.steps == (*range(0, 7000, 200), 6900) and gallery.found == 70
    assert "36 of 70 grids" in write_report(tmp_path).read_text()


def test_of_many_steps_a_choice_that_lasts():
    for count in range(1, 400):
        chosen = report_pictures.strided(range(count), 48)
        assert len(chosen) <= 48 and chosen[0] == 0 and chosen[-1] == count - 1
        assert len(chosen) == count if count < 48 else len(chosen) > 23
        later = set(report_pictures.strided(range(count + 1), 48))
        assert len(set(chosen) - later) <= 1 or len(later) < 26  # the stride has doubled


def test_a_picture_that_changes_is_read_again(tmp_path):
    path = paths.to_path(tmp_path / "00000001.png")
    save_png(path, np.zeros((8, 8, 3), np.uint8))
    before = report_pictures.embed(path)
    assert report_pictures.embed(path) is before
    save_png(path, np.full((9, 9, 3), 255, np.uint8))
    assert report_pictures.embed(path).size == (9, 9)


def test_pictures_keep_to_their_bytes(tmp_path, monkeypatch):
    write_pictures(tmp_path / "samples", range(20), kinds=("", "-raw-guided"), side=64)
    whole = report_pictures.gather(tmp_path)
    size = sum(p.bytes for row in whole.rows for p in row.pictures)
    monkeypatch.setattr(report_pictures, "SAMPLE_BYTES", size * 3 / 4 / 3)
    fewer = report_pictures.gather(tmp_path)
    assert sum(p.bytes for row in fewer.rows for p in row.pictures) <= size / 3
    assert [row.steps[0] for row in fewer.rows] == [0, 0] and fewer.rows[0].steps[-1] == 19


def test_a_long_strip_keeps_whole_columns(tmp_path):
    for step in range(50):
        image = np.full((2, 16, 16, 3), 5 * step, np.uint8)
        append_column(tmp_path / "strip.png", step, image, side=16)
    width = Image.open(tmp_path / "strip.png").width // 50
    small = report_pictures.embed_strip(paths.to_path(tmp_path / "strip.png"))
    assert small.size[0] == report_pictures.STRIP_COLUMNS * width


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1}\n')
    write_pictures(tmp_path / "samples", [10, 20], kinds=("",), side=32)
    whole = (tmp_path / "samples" / "00000010.png").read_bytes()
    (tmp_path / "samples" / "00000010.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "samples" / "strip.png").write_text("no picture")
    text = write_report(tmp_path).read_text()
    assert "samples/00000010.png" in text and "samples/strip.png" in text
    assert report_pictures.gather(tmp_path).rows[0].steps == (20,)


def test_evaluations_become_tables_intervals_and_curves(workdir):
    evaluations, problems = report_evaluations.gather(workdir)
    assert problems == [] and [one.step for one in evaluations] == [1000, 2000]
    assert report_evaluations.rows(evaluations[0])[:2] == [
        ("fid", "30", "28 to 33", "lower"), ("clip_score", "22.5", "", "higher")
    ]  # fmt: skip
    assert [p.name for p in evaluations[0].pictures] == ["grid.png", "loss.png"]
    figures = {figure.title: figure for figure in report_evaluations.figures(evaluations)}
    assert "words" not in figures  # x is no number
    (fid,) = figures["fid"].series
    np.testing.assert_array_equal(fid.x, [1000, 2000])
    np.testing.assert_array_equal([fid.y, fid.low, fid.high], [[30, 20], [28, 18], [33, 23]])
    assert figures["fid"].note.startswith("Lower is better. Bars")
    lengths = figures["ema_lengths/fid"].series
    assert [s.name for s in lengths] == ["step-1000", "step-2000"]
    np.testing.assert_array_equal(lengths[0].y, [30, np.nan, 26])
    assert figures["ema_lengths/fid"].log_x and figures["ema_lengths/fid"].over == "width"
    settings = dict(report_evaluations.settings(evaluations[0]))
    assert settings["sampler"] == "name ddim, steps 25" and "seed" in settings
    assert settings["best length of the average"] == "0.1, with fid 26.0"


def test_audits_are_tables(tmp_path):
    """As `audit_shares` writes them: every share of the file is in the table."""
    from sdjax.eval import audit_shares
    from sdjax.eval.audit import Attribute, Audit

    hair = Attribute("hair", ("dark", "fair"), (), (0.5, 0.5))
    size = Attribute("size", ("big", "small"), (), (0.2, 0.8))
    audit = Audit(("a doctor", "a nurse"), 4, (hair, size), "x:y")
    codes = {"hair": np.array([0, 0, 0, 1, 1, 1, -1, -1]), "size": np.full(8, -1)}
    content = audit_shares.to_json(audit, audit_shares.count(audit, codes, resamples=50))
    folder = tmp_path / "evaluations" / "x"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"audit": content}))
    evaluations, _ = report_evaluations.gather(tmp_path)
    (name, head, rows), (_, _, nothing) = report_evaluations.audit_tables(evaluations[0])
    assert name == "hair" and head[1] == "dark (target 50 %)"
    assert [row[0] for row in rows] == ["a doctor", "a nurse", "all prompts"]
    assert rows[0][1].startswith("75 % (") and rows[1][1:4:2][1] == "2"
    assert rows[2][1].startswith("50 % (") and rows[2][4].startswith("0.00 (")
    assert nothing[0][1:] == ["-", "-", "4", "-", "-", "-"]
    assert "75 % (" in write_report(tmp_path).read_text()


def test_an_evaluation_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    write_evaluation(tmp_path / "evaluations" / "good", 10, pictures=False)
    for name, text in (("torn", "{"), ("list", "[]")):
        (tmp_path / "evaluations" / name).mkdir()
        (tmp_path / "evaluations" / name / "metrics.json").write_text(text)
    odd = {"step": "x", "metrics": {"a": 1, "b": {"value": None}, "c": {"value": 2}}, "curves": 3,
           "warnings": "w", "sampler": None, "audit": {"attributes": {"a": 1}}}  # fmt: skip
    (tmp_path / "evaluations" / "odd").mkdir()
    (tmp_path / "evaluations" / "odd" / "metrics.json").write_text(json.dumps(odd))
    found = gather(paths.to_path(tmp_path), tmp_path / "report.html")
    assert [one.name for one in found.evaluations] == ["odd", "good"]
    assert list(found.evaluations[0].metrics) == ["c"]
    assert sorted(text.split(":")[0] for text in found.problems) == [
        "list/metrics.json", "torn/metrics.json"
    ]  # fmt: skip
    text = write_report(tmp_path).read_text()
    assert "good" in text and "the audit of odd: TypeError" in text


# ---- the run ---------------------------------------------------------------------------------


def test_the_recipe_trains_the_same_configuration(workdir, tmp_path):
    from sdjax.config import resolve

    run = read_run(workdir)
    text = recipe(run)
    made = {}
    exec(compile(text, "recipe.py", "exec"), made)
    assert resolve(made["get_config"]()) == resolve(json.loads(json.dumps(run.config)))
    assert "c.data.batch_size = 32" in text and "beta_start" not in text


@pytest.mark.parametrize("name", ["base", "sdxl", "sd15_finetune"])
def test_recipes_of_the_configs_too(name):
    """SDXL has a second encoder, None by default; its config.json has it as a group."""
    import importlib.util
    from pathlib import Path

    from sdjax.config import resolve, to_dict

    file = Path(__file__).parents[2] / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    raw = module.get_config()
    raw.data.path = raw.data.path or "data"
    raw.init_from = raw.init_from or "x"
    config = resolve(raw)
    saved = json.loads(json.dumps(to_dict(config)))
    run = report_run.Run(paths.to_path("x"), saved, report_run.Sizes({}, {}, {}), ())
    made = {}
    exec(recipe(run), made)
    assert resolve(made["get_config"]()) == config


def test_sizes_are_those_of_the_files(tmp_path):
    """A checkpoint as training writes it, and frozen.safetensors: nothing is restored."""
    import jax
    from safetensors.numpy import save_file

    from sdjax.train.checkpoint import Checkpoints

    params = {"unet.a.kernel": np.zeros((3, 4), np.float32), "unet.b": np.zeros(5, np.float32)}
    state = {
        "params": params | {"text_encoder.c": np.zeros((2, 2), np.float32)},
        "ema": {"warmup-0.99": params},
        "step": np.zeros((), np.int32),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, jax.tree.map(jax.numpy.asarray, state), {}, {})
    save_file({"vae.x": np.zeros((10, 10), np.float32)}, tmp_path / "frozen.safetensors")
    (tmp_path / "checkpoints" / "9").mkdir()  # under way
    run = read_run(tmp_path)
    assert run.checkpoints == (7,)
    assert run.sizes.trained == {"unet": 17, "text_encoder": 4} and run.sizes.frozen == {"vae": 100}
    assert run.sizes.state == {"params": 21, "EMA warmup-0.99": 17, "step": 1}
    assert ("Networks", "text_encoder (4 trained), unet (17 trained), vae (100 frozen)") in summary(
        run, parse(b"")
    )


def test_a_converted_workdir_has_no_counts_but_its_networks(tmp_path):
    """Orbax lists no shapes of numpy arrays: better no number than a wrong one."""
    from sdjax.train.checkpoint import Checkpoints

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"params": {"unet.b": np.zeros(5, np.float32)}}, {}, {})
    (tmp_path / "config.json").write_text('{"task": "text_to_image", "model": {"unet": {"a": 1}}}')
    run = read_run(tmp_path)
    assert run.sizes.trained == {} and ("Networks", "unet") in summary(run, parse(b""))
    assert "parameters trained" not in write_report(tmp_path).read_text().lower()


def test_the_summary_says_what_was_trained(workdir):
    rows = dict(summary(read_run(workdir), read_metrics(workdir)))
    assert rows["Progress"] == "4,000 of 8,000 steps, 128,000 images, 25.6 epochs"
    assert rows["Batch"] == "32 images over all devices" and rows["Seed"] == "0"
    assert rows["Data"].endswith("split train, 5,000 examples")
    assert rows["Optimizer"].startswith("adamw, b1 0.9, b2 0.999")


def test_a_config_of_another_version_is_no_obstacle(tmp_path):
    (tmp_path / "config.json").write_text('{"data": {"batch_size": 4}, "new": {"field": 1}}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "train/loss": 0.5}\n')
    assert "c.new = {&#x27;field&#x27;: 1}" in write_report(tmp_path).read_text()
    assert gather(paths.to_path(tmp_path), tmp_path / "x").problems == []


# ---- the page --------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Tags with their attributes, and the text outside scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._inside = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if not self._inside:
            self.words.append(data)


def test_what_comes_from_files_stays_text(page):
    """NASTY is in captions, config values, metric names, warnings and the data report."""
    found = Elements(page)
    assert sum(tag == "script" for tag, _ in found.tags) == 3  # data, plotly, our own
    assert all(a.get("src", "").startswith("data:image/") for t, a in found.tags if t == "img")
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert sum(NASTY in words for words in found.words) > 6
    assert NASTY not in page


def test_the_page_names_nothing_to_load(page):
    found = Elements(page)
    for tag, attrs in found.tags:
        for name in {"src", "href", "action", "srcset", "data"} & set(attrs):
            value = attrs[name]
            assert value.startswith(("data:", "#")) or (tag, name) == ("a", "href"), (tag, attrs)
    assert [a["href"] for t, a in found.tags if t == "a" and a["href"][0] != "#"] != []
    policy = next(a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "connect-src" not in policy
    assert len(page) < 15e6


def test_the_page_is_outlined_and_its_pictures_described(page):
    found = Elements(page)
    levels = [int(t[1]) for t, _ in found.tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all(attrs.get("alt") for tag, attrs in found.tags if tag == "img")
    plots = [a for t, a in found.tags if a.get("class") == "plot"]
    assert len(plots) > 15 and all(len(a["aria-label"]) > 20 for a in plots)
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["href"][1:] in ids for t, a in found.tags if t == "a" and a["href"][0] == "#")


PARTS = ["config.json", "metrics.jsonl", "samples", "evaluations"]


@pytest.mark.parametrize("kept", [[], *([part] for part in PARTS)], ids=lambda kept: "".join(kept))
def test_each_part_may_be_missing(workdir, tmp_path, kept):
    for name in kept:
        source = workdir / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    found = Elements(write_report(tmp_path).read_text())
    words = " ".join(found.words)
    assert "cannot be read" not in words and "could not be made" not in words
    assert ("0 of" in words or "4,000" in words) if "metrics.jsonl" in kept else True


@pytest.mark.parametrize(
    "name", ["config.json", "checkpoints/5/state/_METADATA", "frozen.safetensors"]
)
def test_damaged_files_are_named_and_the_rest_is_shown(workdir, tmp_path, name):
    shutil.copy(workdir / "metrics.jsonl", tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("[}")
    words = " ".join(Elements(write_report(tmp_path).read_text()).words)
    assert "config.json and checkpoints: " in words and "Gradient norm" in words


def test_a_chapter_that_fails_leaves_the_others(workdir, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("nobody foresaw this")

    monkeypatch.setattr(report_data, "show", fail)
    text = write_report(workdir, tmp_path / "x.html").read_text()
    assert "This part could not be made" in text and "nobody foresaw this" in text
    assert "Gradient norm" in text


def test_a_long_run_is_written_quickly(tmp_path):
    """Not a timed test: only that nothing is quadratic. 20,000 lines take about half a second."""
    write_lines(tmp_path / "metrics.jsonl", make_lines(200) * 100)
    start = time.process_time()
    size = write_report(tmp_path).stat().length
    assert time.process_time() - start < 20 and size < 8e6


# ---- the verb --------------------------------------------------------------------------------


def test_the_verb_writes_where_it_is_told(workdir, tmp_path, capsys):
    output = tmp_path / "new" / "a.html"
    assert main([f"--workdir={workdir}", f"--output={output}"]) == 0
    assert str(output) in capsys.readouterr().out
    assert output.read_text().startswith("<!doctype html>")
    link = re.search(r'href="([^"]*report\.html)"', output.read_text())[1]
    assert (output.parent / link).resolve() == (workdir.parent / "data" / "report.html").resolve()


def test_the_verb_tells_what_is_wrong(workdir, tmp_path, capsys):
    assert main([f"--workdir={tmp_path / 'none'}"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main([f"--workdir={tmp_path}"]) == 2
    assert "neither config.json nor metrics.jsonl" in capsys.readouterr().err
    assert main([f"--workdir={workdir}", f"--output={tmp_path}"]) == 2
    assert "is a folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([f"--workdir={workdir}", f"--output={tmp_path / 'file' / 'x.html'}"]) == 2
    assert "cannot be made" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "gs://" in capsys.readouterr().out


IN_A_BUCKET = """
from sdjax.report import main
assert main(["--workdir=gs://bucket/runs/a"]) == 0
assert main(["--workdir=gs://bucket/runs/a", "--output=gs://bucket/pages/a.html"]) == 0
assert main(["--workdir=gs://bucket/runs/none"]) == 2
assert main(["--workdir=gs://none/runs"]) == 2
"""


def test_a_run_in_a_bucket(workdir, tmp_path):
    with FakeGCS(tmp_path, "bucket") as gcs:
        for file in workdir.rglob("*"):
            if file.is_file():
                gcs.write(f"bucket/runs/a/{file.relative_to(workdir)}", file.read_bytes())
        done = subprocess.run(
            [sys.executable, "-c", IN_A_BUCKET],
            # A device that a run is using could not be opened: it opens none.
            env=gcs.environment | {"JAX_PLATFORMS": "none"},
            timeout=300,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        page = gcs.objects["bucket/runs/a/report.html"].decode()
        assert page.count("data:image/webp") > 8 and "Gradient norm" in page
        assert "Left out of this report" not in page
        assert gcs.objects["bucket/pages/a.html"].startswith(b"<!doctype html>")


def test_unicode_survives(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "train/höhe": 1.0}, ensure_ascii=False) + "\n"
    )
    save_png(tmp_path / "samples" / "1.png", np.zeros((8, 8, 3), np.uint8), {"prompts": "ein Öhr"})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "train/höhe" in text and "ein Öhr" in text
