"""Cross-validation by a sweep: one setting, or each of several, on every fold."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from scipy import stats

from sdjax import sweep as verb
from sdjax.config import resolve
from sdjax.data.config import DataConfig, Part
from sdjax.data.sources import open_source
from sdjax.models.config import ConfigError
from sdjax.sweeps import folds, ranking
from sdjax.sweeps.folds import Setting, check_base
from sdjax.sweeps.study import begin_trial, open_study
from sdjax.sweeps.worker import work
from tests.sweeps.fake_sweep import COMMAND, ROOT, SPACE, base, make


def run(sweep, trials):
    return work(sweep, trials, tell=lambda line: None, command=COMMAND, poll=0.02)


def test_mean_deviation_and_interval_are_scipys():
    values = np.random.default_rng(0).normal(0.3, 0.02, 5)
    one = Setting(0, {}, dict(enumerate(values, 1)), 5)
    assert one.is_complete and one.mean == pytest.approx(values.mean())
    assert one.deviation == pytest.approx(values.std(ddof=1))
    want = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert one.interval == pytest.approx(want, rel=1e-12)
    few = Setting(0, {}, {1: 0.5}, 5)
    assert not few.is_complete and few.mean == 0.5
    assert few.deviation is few.interval is Setting(0, {}, {}, 5).mean is None


def test_the_recipe_alone_is_judged_on_each_fold(tmp_path):
    sweep = make(tmp_path, space="", folds=3)
    study = run(sweep, 3)
    found = json.loads((tmp_path / "sweep.json").read_text())
    (setting,) = found["settings"]
    limit = (np.log10(1e-4) + 3) ** 2 + 1 / 3  # of the fake main after three validations
    assert list(setting["values"].values()) == pytest.approx([limit + i / 10 for i in (1, 2, 3)])
    assert setting["mean"] == pytest.approx(limit + 0.2) and setting["complete"]
    assert setting["deviation"] == pytest.approx(0.1)
    assert found["best"] == setting and found["importances"] == {}
    folds_of = [trial["fields"]["data.fold"] for trial in found["trials"]]
    assert folds_of == ["1/3", "2/3", "3/3"]
    made = {}
    exec((tmp_path / "best.py").read_text(), made)
    assert resolve(made["get_config"]()) == sweep.base  # of all of the training split
    assert "3 of 3" in "".join(map(str, folds.table(sweep, study).columns[1].cells))


def test_each_setting_has_the_same_values_on_every_fold_and_the_best_mean_wins(tmp_path):
    sweep = make(tmp_path, SPACE, folds=2)
    study = run(sweep, 6)
    params = [trial.params for trial in study.get_trials()]
    assert params[0::2] == params[1::2] and params[0] != params[2]
    ranked = folds.settings(sweep, study)
    means = [one.mean for one in ranked]
    assert len(ranked) == 3 and means == sorted(means)
    for one in ranked:
        assert one.values[2] - one.values[1] == pytest.approx(0.1)
    best = ranking.best_config(sweep, study)
    assert best.optim.learning_rate == ranked[0].fields["optim.learning_rate"]
    assert best.data.fold == ""


def test_a_fold_that_fails_leaves_its_setting_unranked(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "diverge@1")
    sweep = make(tmp_path, SPACE, folds=2)
    study = run(sweep, 4)
    assert [one.number for one in folds.settings(sweep, study)] == [1, 0]
    monkeypatch.setenv("FAKE", "diverge@0 diverge@3")
    none = make(tmp_path / "none", SPACE, folds=2)
    study = run(none, 4)
    assert ranking.best_config(none, study) is None
    assert not (tmp_path / "none" / "best.py").exists()
    with pytest.raises(ConfigError, match="folds"):
        run(make(tmp_path, SPACE, folds=3), 3)  # the folder of another cross-validation


@pytest.mark.parametrize(
    ("count", "data", "pruner", "words"),
    [
        (1, {}, "none", "--folds=1"),
        (5, {"fold": "1/5"}, "none", "data.fold"),
        (5, {"validation_share": 0.1}, "none", "data.validation_share"),
        (5, {"split": "train[:90%]"}, "none", r"train\[:90%\]"),
        (5, {"mixture": (Part(name="a", eval_split="test"),)}, "none", "eval_split"),
        (5, {}, "median", "pruner: none"),
    ],
)
def test_folds_that_cannot_be_made_are_refused(count, data, pruner, words):
    config = base()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    with pytest.raises(ConfigError, match=words):
        check_base(config, count, pruner)


def test_trials_train_on_the_rest_and_validate_on_their_fold(tmp_path, shapes_dir):
    """By the dataset itself: disjoint, whole, and the same however often it is opened."""
    own = DataConfig(data_dir=str(shapes_dir), resolution=16, shapes_train=40, shapes_test=8)
    sweep = make(tmp_path, space="", folds=4)
    everything = sorted(open_source(own, "train").texts())
    held_out = []
    study = open_study(sweep)
    for number in range(4):
        begin_trial(sweep, study)
        fields = sweep.values(study.get_trials()[number])
        data = dataclasses.replace(own, **{name[5:]: value for name, value in fields.items()})
        rest = open_source(data, data.split).texts()
        part = open_source(data, data.eval_split).texts()
        assert part and sorted(rest + part) == everything
        assert part == open_source(data, data.eval_split).texts()
        held_out += part
    assert sorted(held_out) == everything


def test_the_verb_counts_settings_and_needs_no_space(tmp_path, monkeypatch, capsys):
    asked = {}

    def fake(sweep, trials, tell):
        asked.update(folds=sweep.folds, trials=trials, fields=dict(sweep.space.fields))
        return run(sweep, 2)

    monkeypatch.setattr("sdjax.sweeps.worker.work", fake)
    arguments = ["sweep", f"--config={ROOT / 'configs' / 'base.py'}", f"--workdir={tmp_path}",
                 "--folds=2", "--config.train.steps=30"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)  # where ml_collections looks for the fields
    verb.FLAGS.unparse_flags()
    assert verb.main(arguments) == 0
    verb.FLAGS["folds"].unparse(), verb.FLAGS["workdir"].unparse()
    assert asked == {"folds": 2, "trials": 2, "fields": {}}
    shown = capsys.readouterr().out
    assert "2 of 2" in shown and "best.py" in shown and "the best model" not in shown
