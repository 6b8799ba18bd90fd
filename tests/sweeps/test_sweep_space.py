"""Mistakes in the space of a sweep, each named with its remedy."""

import dataclasses

import pytest

from sdjax.models.config import ConfigError
from sdjax.sweeps.space import read_space
from sdjax.sweeps.study import make_sweep
from tests.sweeps.fake_sweep import base, make


@pytest.mark.parametrize(
    "entry, message",
    [
        ("optim.learning_rat: {low: 1, high: 2}", "did you mean learning_rate"),
        ("optimizer.x: {low: 1, high: 2}", "config has no field 'optimizer'; did you mean optim"),
        ("optim: {low: 1, high: 2}", "is a group of fields"),
        ("optim.learning_rate.x: {low: 1, high: 2}", "and no group"),
        ("optim.learning_rate: {low: 1e-2, high: 1e-5}", "low 0.01 is not below high 1e-05"),
        ("optim.learning_rate: {low: 0, high: 1, log: true}", "low is 0; with log"),
        ("optim.learning_rate: {low: 1e-5}", "high is missing"),
        ("optim.learning_rate: {low: a, high: 1}", "low is 'a'; expected a number"),
        ("optim.learning_rate: {low: 1, high: 2, step: 3}", "step is 3"),
        ("optim.learning_rate: {low: 1, high: 2, base: 3}", "base is unknown"),
        ("optim.learning_rate: 1", "expected {low: ..., high: ...} or {choices"),
        ("optim.learning_rate: {choices: []}", "choices is .*expected a list"),
        ("optim.learning_rate: {choices: [0.1, fast]}", "can be 'fast', but .*expected float"),
        ("optim.learning_rate: {choices: [1, 1]}", "each value once"),
        ("data.batch_size: {low: 1, high: 2.5}", "takes whole numbers"),
        ("train.accumulation: {low: 0, high: 2}", "can be 0, but .*expected at least 1"),
        ("objective.weighting: {low: 1, high: 2}", "is no number"),
        ("objective.weighting: {choices: [uniform, nonsense]}", "can be 'nonsense', but"),
    ],
)
def test_mistakes_in_the_space_are_named(tmp_path, entry, message):
    file = tmp_path / "space.yaml"
    file.write_text(f"fields:\n  {entry}\n")
    with pytest.raises(ConfigError, match=f"space.yaml(?s:.)*{message}"):
        read_space(file, base())


def test_mistakes_beside_the_fields_are_named_together(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "fields: {seed: {low: 0, high: 9}}\nprune: 1\nmode: least\nsampler: {name: grid}\n"
        "pruner: {name: median, startup: 3}\nmetric: 3\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_space(file, base())
    for part in ("prune is unknown", "mode is 'least'", "sampler is {'name': 'grid'}", "metric is",
                 "pruner.startup is unknown; median has startup_trials, warmup_steps"):  # fmt: skip
        assert part in str(caught.value)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="expected a group `fields:`"):
        read_space(file, base())
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read"):
        read_space(tmp_path / "nowhere.yaml", base())


def test_what_cannot_be_judged_is_refused(tmp_path):
    seeds = "fields: {seed: {low: 0, high: 9}}\n"
    config = base()
    none = dataclasses.replace(config.validation, examples=0)
    with pytest.raises(ConfigError, match="validation.examples is 0"):
        make(tmp_path, seeds, dataclasses.replace(config, validation=none))
    with pytest.raises(ConfigError, match="every is 10 and .*steps 10: the pruner median"):
        make(tmp_path, seeds, base(steps=10))
    assert make(tmp_path, seeds + "pruner: none", base(steps=10)).mode == "min"
    assert make(tmp_path, seeds + "metric: train/loss").metric == "train/loss"
    with pytest.raises(ConfigError, match="a bucket does not have"):
        make_sweep("gs://bucket/sweep", config, read_space(tmp_path / "space.yaml", config))
