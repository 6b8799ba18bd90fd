"""A run on an interval of the noise levels: what it trains and validates at, resumed or not."""

import json

import pytest

from sdjax.checkpoints.experts import read_expert_option, trained_levels
from sdjax.config import resolve
from sdjax.train import loop
from tests.methods.runs import broken_off
from tests.train.test_loop import assert_same_run, rows


@pytest.fixture
def config(tiny_config):
    tiny_config.objective.timestep_min = 750
    tiny_config.train.update(steps=4, checkpoint_every=2, keep_last=2)
    tiny_config.validation.update(examples=4, train_examples=0, every=4, strata=2, rows=4)
    return resolve(tiny_config)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return tmp_path_factory.mktemp("expert") / "run"


def test_an_expert_trains_and_validates_at_its_levels_alone(config, unbroken):
    assert loop.run(config, str(unbroken)) == loop.DONE
    found = rows(unbroken)
    seen = {name for row in found.values() for name in row if name.startswith("train/loss_at/")}
    assert seen == {"train/loss_at/t0750-0999"}
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").open()]
    at = {name.rpartition("/")[2] for line in lines for name in line if "raw/loss_at" in name}
    assert at == {"t0812", "t0937"}  # the middles of two halves of 750 to 1000
    assert trained_levels(unbroken) == (0.75, 1.0)
    assert read_expert_option(str(unbroken)) == (str(unbroken), (0.75, 1.0))


def test_an_expert_that_is_broken_off_goes_on_to_the_same_bits(config, unbroken, tmp_path):
    workdir = broken_off(unbroken, tmp_path / "run", 2)
    assert loop.run(config, str(workdir)) == loop.DONE
    assert_same_run(unbroken, workdir)


def test_the_levels_of_a_curriculum_are_those_of_the_checkpoint(config, unbroken, tmp_path):
    """A stage that begins where the checkpoint stands has not trained yet."""
    workdir = broken_off(unbroken, tmp_path / "run", 4)
    content = json.loads((workdir / "config.json").read_text())
    content["objective"]["timestep_min"] = 0
    content["stages"] = [{"start": 2, "timestep_max": 500}]
    (workdir / "config.json").write_text(json.dumps(content))
    assert trained_levels(workdir / "checkpoints" / "2") == (0.0, 1.0)
    assert trained_levels(workdir) == (0.0, 0.5)
