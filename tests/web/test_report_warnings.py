"""The warnings of the report: what is found, and whether the advice names what exists."""

import ast
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from sdjax.__main__ import VERBS
from sdjax.config import Config, to_dict
from sdjax.system import paths
from sdjax.web.report import warnings
from sdjax.web.report.metrics import Curve, Metrics, parse
from sdjax.web.report.page import gather
from sdjax.web.report.run import read_run
from sdjax.web.report.warnings import find
from sdjax.web.templating import asset
from tests.web.report_workdir import lines, make_workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with everything in it. Do not write into it."""
    return make_workdir(tmp_path_factory.mktemp("report") / "run")


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


def advice():
    """Every text of the warnings and chapters, those that no test has in a page included."""
    tree = ast.parse(Path(warnings.__file__).read_text())
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    return " ".join(str(text) for text in [*texts, asset("chapters.html")])


def options_of(verb):
    """The names of the options that a verb knows."""
    modules = [importlib.import_module(f"sdjax.{verb}")]
    if verb == "prepare":
        modules.append(importlib.import_module("sdjax.encode"))
    return {name for module in modules for name in getattr(module, "FLAGS", flags.FLAGS)}


def test_commands_that_the_report_advises_exist():
    found = re.findall(r"python -m sdjax\.(\w+)((?: --[^\s`]+)*)", advice())
    assert len(found) > 3 and len(found) == len(re.findall(r"sdjax\.\w", advice()))
    for verb, options in found:
        assert verb in VERBS
        assert set(re.findall(r"--(\w+)", options)) <= options_of(verb)


def test_fields_that_the_report_advises_exist():
    groups = "|".join(name for name, value in to_dict(Config()).items() if isinstance(value, dict))
    found = re.findall(rf"\b(?:{groups})(?:\.\w+)+", advice())
    assert len(found) > 10
    for name in found:
        value = to_dict(Config())
        for part in name.split("."):
            assert part in value, name
            value = value[part]


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
