"""Curricula: what a stage changes, and that it changes at its step, resumed or not."""

import json

import jax
import pytest

from sdjax.config import Stage, resolve
from sdjax.data.pipeline import make_iterator
from sdjax.errors import UserError
from sdjax.parallel.mesh import make_mesh
from sdjax.train import loop, program, stages
from tests.methods.runs import broken_off
from tests.train.test_loop import assert_same_run, rows

SECOND = {"start": 3, "resolution": 8, "batch_size": 4, "timestep_min": 500, "learning_rate": 1e-4}


@pytest.fixture
def staged(tiny_config):
    tiny_config.stages = (SECOND,)
    tiny_config.train.update(checkpoint_every=1, keep_last=6)
    return tiny_config


def test_segments_and_what_is_in_force(staged):
    staged.stages = (SECOND, {"start": 5, "timestep_max": 750})
    config = resolve(staged)
    first, second, third = stages.segments(config)
    assert [(s.first, s.end) for s in (first, second, third)] == [(0, 3), (3, 5), (5, 6)]
    assert (first.config.data.resolution, first.config.data.batch_size) == (16, 8)
    assert (second.config.data.resolution, second.config.data.batch_size) == (8, 4)
    objective = third.config.objective
    assert (objective.timestep_min, objective.timestep_max) == (500, 750)  # both stages'
    assert third.config.optim.learning_rate == 1e-4 and third.config.stages == ()
    assert len({s.seed for s in (first, second, third)}) == 3
    assert [stages.segment_at(config, step).number for step in (0, 2, 3, 5, 6)] == [0, 0, 1, 2, 2]
    assert [stages.images_seen(config, step) for step in (0, 3, 4, 6)] == [0, 24, 28, 36]


@pytest.mark.parametrize(
    "change, message",
    [
        ((SECOND, SECOND), r"stages start at \[3, 3\]"),
        (({"start": 0, "resolution": 8},), "rising steps above 0"),
        (({"start": 2, "timestep_min": 2000},), r"stages\[0\].*timestep_min is 2000"),
        (({"start": 2, "batch_size": -4},), r"stages\[0\].*batch_size is -4"),
        (({"start": 2, "resolutoin": 8},), "resolution"),
    ],
)
def test_stages_that_cannot_be_are_errors_that_name_them(tiny_config, change, message):
    tiny_config.stages = change
    with pytest.raises(ValueError, match=message):
        resolve(tiny_config)


def test_later_stages_are_checked_at_the_start(tiny_config, tmp_path):
    part = {"name": "image_text_folder", "path": str(tmp_path / "nothing")}
    tiny_config.stages = ({"start": 3, "mixture": (part,)},)
    with pytest.raises(UserError, match=r"config.stages\[0\].*nothing"):
        loop.run(resolve(tiny_config), str(tmp_path / "run"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return tmp_path_factory.mktemp("staged") / "run"


def test_a_run_goes_through_its_stages(staged, unbroken, monkeypatch):
    compiled = []
    compile_step = program.compile_step

    def counted(built, config):
        compiled.append(built.batch["image"].shape)
        return compile_step(built, config)

    monkeypatch.setattr(program, "compile_step", counted)
    assert loop.run(resolve(staged), str(unbroken)) == loop.DONE
    assert compiled == [(8, 16, 16, 3), (4, 8, 8, 3)]
    found = rows(unbroken)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert [found[s]["train/images_seen"] for s in (3, 4, 6)] == [24, 28, 36]
    assert [found[s]["train/learning_rate"] for s in (3, 4)] == pytest.approx([1e-3, 1e-4])
    late = {name for s in (4, 5, 6) for name in found[s] if name.startswith("train/loss_at/")}
    assert late <= {"train/loss_at/t0500-0749", "train/loss_at/t0750-0999"} and late
    assert len(json.loads((unbroken / "config.json").read_text())["stages"]) == 1


def test_the_first_step_of_a_stage_is_that_of_its_own_configuration(staged, unbroken):
    """Its loss, from the checkpoint before it and the stream of a run with that configuration."""
    from sdjax.checkpoints.assemble import assemble
    from sdjax.checkpoints.checkpoint import Checkpoints
    from sdjax.config_model import method_of_run
    from sdjax.train.startup import place_frozen

    assembled = assemble(resolve(staged))
    segment = stages.segments(assembled.config)[1]
    config, mesh = segment.config, make_mesh(segment.config.mesh)
    method = method_of_run(config, assembled.tokenizers)
    built = program.build(config, method, mesh)
    with Checkpoints(unbroken) as checkpoints:
        step, state, _, _ = checkpoints.restore(built.state, 3)
    frozen = place_frozen(
        config, unbroken, assembled, method, built, lambda encode: None, saved=config
    )
    data = make_iterator(config.data, assembled.tokenizers, split="train", seed=segment.seed)
    _, metrics = built.step(state, frozen, jax.device_put(next(data)))
    data.close()
    assert float(metrics["loss"]) == pytest.approx(rows(unbroken)[4]["train/loss"], rel=1e-6)


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_broken_off_at_or_after_a_change_it_goes_on_to_the_same_bits(
    staged, unbroken, tmp_path, step
):
    workdir = broken_off(unbroken, tmp_path / "run", step)
    assert loop.run(resolve(staged), str(workdir)) == loop.DONE
    assert_same_run(unbroken, workdir)


def test_a_stage_that_has_begun_cannot_change_and_a_later_one_can(staged, unbroken):
    config = resolve(staged)
    later = dict(staged.to_dict(), stages=(SECOND, {"start": 5, "timestep_max": 750}))
    other = resolve(dict(staged.to_dict(), stages=({**SECOND, "batch_size": 2},)))
    with pytest.raises(UserError, match="config.stages: this run is at step 4"):
        stages.check_begun(config, other, 4)
    stages.check_begun(config, other, 3)
    stages.check_begun(config, resolve(later), 5)
    assert config.stages[0] == Stage(**SECOND)
