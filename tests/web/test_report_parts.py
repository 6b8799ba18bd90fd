"""The parts of the report: pictures, evaluations, and what was trained."""

import base64
import contextlib
import io
import json
import os
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.config import to_dict
from sdjax.sampling.grids import save_png
from sdjax.sampling.strips import append_column
from sdjax.system import paths
from sdjax.web.report import evaluations as judged
from sdjax.web.report import pictures
from sdjax.web.report.metrics import parse, read_metrics
from sdjax.web.report.page import gather, write_report
from sdjax.web.report.run import Run, Sizes, read_run, recipe, summary
from tests.web.report_workdir import NASTY, make_workdir, write_evaluation, write_pictures


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with everything in it. Do not write into it."""
    return make_workdir(tmp_path_factory.mktemp("report") / "run")


# ---- pictures and evaluations ----------------------------------------------------------------


def test_grids_of_each_kind_by_step(workdir):
    gallery = pictures.gather(workdir)
    assert [(row.kind, row.steps) for row in gallery.rows] == [
        ("", (0, 1000, 2000)), ("raw-unguided", (0, 1000, 2000))
    ]  # fmt: skip
    assert [kind for kind, _ in gallery.strips] == [""]
    assert gallery.rows[0].pictures[0].prompts == f"a large red circle\n{NASTY}"
    uri = gallery.rows[0].pictures[0].uri
    kind, data = uri.split(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (240, 240)
        original = np.asarray(Image.open(workdir / "samples" / "00000000.png").convert("RGB"))
        assert np.abs(np.asarray(image).astype(float) - original).mean() < 8  # lossy


def test_too_many_pictures_are_thinned_and_that_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_pictures(tmp_path / "samples", range(0, 7000, 100), kinds=("",), side=32)
    gallery = pictures.gather(tmp_path)
    (row,) = gallery.rows
    assert row.steps == (*range(0, 7000, 200), 6900) and gallery.found == 70
    assert "36 of 70 grids" in write_report(tmp_path).read_text()


def test_of_many_steps_a_choice_that_lasts():
    for count in range(1, 400):
        chosen = pictures.strided(range(count), 48)
        assert len(chosen) <= 48 and chosen[0] == 0 and chosen[-1] == count - 1
        assert len(chosen) == count if count < 48 else len(chosen) > 23
        later = set(pictures.strided(range(count + 1), 48))
        assert len(set(chosen) - later) <= 1 or len(later) < 26  # the stride has doubled


def test_a_picture_that_changes_is_read_again(tmp_path):
    path = paths.to_path(tmp_path / "00000001.png")
    save_png(path, np.zeros((8, 8, 3), np.uint8))
    before = pictures.embed(path)
    assert pictures.embed(path) is before
    save_png(path, np.full((9, 9, 3), 255, np.uint8))
    assert pictures.embed(path).size == (9, 9)


def test_pictures_keep_to_their_bytes(tmp_path, monkeypatch):
    write_pictures(tmp_path / "samples", range(20), kinds=("", "-raw-guided"), side=64)
    whole = pictures.gather(tmp_path)
    size = sum(p.bytes for row in whole.rows for p in row.pictures)
    monkeypatch.setattr(pictures, "SAMPLE_BYTES", size * 3 / 4 / 3)
    fewer = pictures.gather(tmp_path)
    assert sum(p.bytes for row in fewer.rows for p in row.pictures) <= size / 3
    assert [row.steps[0] for row in fewer.rows] == [0, 0] and fewer.rows[0].steps[-1] == 19


def test_a_long_strip_keeps_whole_columns(tmp_path):
    for step in range(50):
        image = np.full((2, 16, 16, 3), 5 * step, np.uint8)
        append_column(tmp_path / "strip.png", step, image, side=16)
    width = Image.open(tmp_path / "strip.png").width // 50
    small = pictures.embed_strip(paths.to_path(tmp_path / "strip.png"))
    assert small.size[0] == pictures.STRIP_COLUMNS * width


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1}\n')
    write_pictures(tmp_path / "samples", [10, 20], kinds=("",), side=32)
    whole = (tmp_path / "samples" / "00000010.png").read_bytes()
    (tmp_path / "samples" / "00000010.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "samples" / "strip.png").write_text("no picture")
    text = write_report(tmp_path).read_text()
    assert "samples/00000010.png" in text and "samples/strip.png" in text
    assert pictures.gather(tmp_path).rows[0].steps == (20,)


def test_evaluations_become_tables_intervals_and_curves(workdir):
    evaluations, problems = judged.gather(workdir)
    assert problems == [] and [one.step for one in evaluations] == [1000, 2000]
    assert evaluations[0].rows()[:2] == [
        ("fid", "30", "28 to 33", "lower"), ("clip_score", "22.5", "", "higher")
    ]  # fmt: skip
    assert [p.name for p in evaluations[0].pictures] == ["grid.png", "loss.png"]
    figures = {figure.title: figure for figure in judged.figures(evaluations)}
    assert "words" not in figures  # x is no number
    (fid,) = figures["fid"].series
    np.testing.assert_array_equal(fid.x, [1000, 2000])
    np.testing.assert_array_equal([fid.y, fid.low, fid.high], [[30, 20], [28, 18], [33, 23]])
    assert figures["fid"].note.startswith("Lower is better. Bars")
    lengths = figures["ema_lengths/fid"].series
    assert [s.name for s in lengths] == ["step-1000", "step-2000"]
    np.testing.assert_array_equal(lengths[0].y, [30, np.nan, 26])
    assert figures["ema_lengths/fid"].log_x and figures["ema_lengths/fid"].over == "width"
    settings = dict(evaluations[0].settings())
    assert settings["sampler"] == "name ddim, steps 25" and "seed" in settings
    assert settings["best length of the average"] == "0.1, with fid 26.0"


def test_audits_are_tables(tmp_path):
    """As `audit_shares` writes them: every share of the file is in the table."""
    from sdjax.evaluation import audit_shares
    from sdjax.evaluation.audit import Attribute, Audit

    hair = Attribute("hair", ("dark", "fair"), (), (0.5, 0.5))
    size = Attribute("size", ("big", "small"), (), (0.2, 0.8))
    audit = Audit(("a doctor", "a nurse"), 4, (hair, size), "x:y")
    codes = {"hair": np.array([0, 0, 0, 1, 1, 1, -1, -1]), "size": np.full(8, -1)}
    content = audit_shares.to_json(audit, audit_shares.count(audit, codes, resamples=50))
    folder = tmp_path / "evaluations" / "x"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"audit": content}))
    evaluations, _ = judged.gather(tmp_path)
    (name, head, rows), (_, _, nothing) = evaluations[0].audits
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
        "list/metrics.json", "the audit of odd", "torn/metrics.json"
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

    from sdjax.config import resolve

    file = Path(__file__).parents[2] / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    raw = module.get_config()
    raw.data.path = raw.data.path or "data"
    raw.init_from = raw.init_from or "x"
    config = resolve(raw)
    saved = json.loads(json.dumps(to_dict(config)))
    run = Run(paths.to_path("x"), saved, Sizes({}, {}, {}), ())
    made = {}
    exec(recipe(run), made)
    assert resolve(made["get_config"]()) == config


CODE = "x = 1\n    __import__('os').system('touch ran')  #"


@pytest.mark.parametrize(
    "config",
    [{CODE: 1}, {"seed": 1, "a b": {}}, {"data": {CODE: 1, "path": CODE}}, {"__class__": 1},
     {"model": {CODE: {"unet": 1}, "unet": {CODE: 1}}}, {"method": {CODE: CODE}},
     {"\ud800": "\ud800"},
     {"model": {"text_encoder_2": {CODE: [CODE, float("inf")]}}}, {"lambda": 0, "": 1, "a.b": 2}],
)  # fmt: skip
def test_config_of_a_stranger_becomes_no_code(config, tmp_path, monkeypatch):
    """Names that Config lacks are left out; values are literals, whatever they are."""
    from tests.fuzz.targets_settings import check_recipe

    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert check_recipe(page) == "with recipe"
    run = Run(paths.to_path("x"), config, Sizes({}, {}, {}), ())
    made = {}
    exec(recipe(run), made)
    with contextlib.suppress(AttributeError, TypeError, ValueError, KeyError):
        made["get_config"]()
    assert not (tmp_path / "ran").exists()


def test_fields_that_config_lacks_are_told_in_the_recipe():
    config = {"seed": 7, "data": {"colour": 1}, "new\nfield": 2}
    run = Run(paths.to_path("x"), config, Sizes({}, {}, {}), ())
    text = recipe(run)
    assert "# Left out, as there are no such fields: ['data.colour', 'new\\nfield']\n" in text
    assert "c.seed = 7" in text and "colour =" not in text


@pytest.mark.parametrize(
    "fields",
    [{"train": {"steps": "many"}}, {"data": {"batch_size": "all"}},
     {"ema": {"profiles": {"a": 1}}}, {"data": {"batch_size": 10**40}}],
)  # fmt: skip
def test_report_with_fields_of_another_type_is_written(fields, workdir, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes((workdir / "metrics.jsonl").read_bytes())
    (folder / "config.json").write_text(json.dumps(fields))
    assert "Curves" in write_report(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    ["config.json", "rollbacks.json", "metrics.jsonl", "frozen.safetensors", "frozen.json",
     "evaluations/step-1000/metrics.json"],
)  # fmt: skip
def test_pipe_in_place_of_a_file_keeps_no_report_waiting(name, workdir, tmp_path):
    folder = shutil.copytree(workdir, tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    page = write_report(folder).read_text(encoding="utf-8")
    assert "a device, a pipe or a socket; expected a file" in page


def test_sizes_are_those_of_the_files(tmp_path):
    """A checkpoint as training writes it, and what is frozen: nothing is restored."""
    import jax
    from safetensors.numpy import save_file

    from sdjax.checkpoints.checkpoint import Checkpoints

    params = {"unet.a.kernel": np.zeros((3, 4), np.float32), "unet.b": np.zeros(5, np.float32)}
    state = {
        "params": params | {"text_encoder.c": np.zeros((2, 2), np.float32)},
        "ema": {"warmup-0.99": params},
        "step": np.zeros((), np.int32),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, jax.tree.map(jax.numpy.asarray, state), {}, {})
    save_file({"vae.x": np.zeros((10, 10), np.float32)}, tmp_path / "frozen.safetensors")
    elsewhere = {"text_encoder_2": {"path": "/models", "parameters": 300}}
    (tmp_path / "frozen.json").write_text(json.dumps(elsewhere))
    (tmp_path / "checkpoints" / "9").mkdir()  # under way
    run = read_run(tmp_path)
    assert run.checkpoints == (7,)
    assert run.sizes.trained == {"unet": 17, "text_encoder": 4}
    assert run.sizes.frozen == {"vae": 100, "text_encoder_2": 300}
    assert run.sizes.state == {"params": 21, "EMA warmup-0.99": 17, "step": 1}
    trained = "text_encoder (4 trained), unet (17 trained)"
    networks = f"{trained}, vae (100 frozen), text_encoder_2 (300 frozen)"
    assert ("Networks", networks) in summary(run, parse(b""))


def test_a_converted_workdir_has_no_counts_but_its_networks(tmp_path):
    """Orbax lists no shapes of numpy arrays: better no number than a wrong one."""
    from sdjax.checkpoints.checkpoint import Checkpoints

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"params": {"unet.b": np.zeros(5, np.float32)}}, {}, {})
    (tmp_path / "config.json").write_text(
        '{"method": {"name": "denoise"}, "model": {"unet": {"a": 1}}}'
    )
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
    assert "no such fields: ['new']" in unescape(write_report(tmp_path).read_text())
    assert gather(paths.to_path(tmp_path), tmp_path / "x").problems == []
