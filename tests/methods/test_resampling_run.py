"""Loss-aware timesteps in a run: their history is saved, resumed, and the same on a mesh."""

import re

import numpy as np
import pytest

from sdjax.config import Stage, resolve
from sdjax.config_model import blank_method
from sdjax.errors import UserError
from sdjax.methods.registry import METHODS
from sdjax.train import loop
from tests.conftest import make_tiny_config
from tests.methods.runs import assert_same_state, broken_off, on_devices, rows, state_of

NOT = ("autoencoder", "dpo", "dpo_adapters", "lcm", "lcm_lora", "progressive", "dmd", "dmd_lora")


@pytest.fixture(scope="module")
def config(tiny_vae, shapes_dir):
    c = make_tiny_config(tiny_vae, shapes_dir)
    c.objective.update(resampling="loss_second_moment", resampling_bins=2)
    c.optim.learning_rate = 2e-4
    c.train.accumulation = 2
    return c


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("resampling") / "unbroken"
    assert loop.run(resolve(config), str(workdir)) == loop.DONE
    return workdir


def test_a_resumed_run_has_the_same_history_to_the_bit(config, unbroken, tmp_path):
    workdir = broken_off(unbroken, tmp_path / "broken", 3)
    assert loop.run(resolve(config), str(workdir)) == loop.DONE
    assert_same_state(unbroken, workdir, 6)
    state = state_of(unbroken, 6)
    assert state["memory/main/counts"].sum() == 48 and state["memory/main/counts"].min() >= 10
    assert (state["memory/main/losses"] > 0).all()
    assert not any("resampling" in name for row in rows(unbroken).values() for name in row)


def test_the_history_does_not_depend_on_the_mesh(config, unbroken, tmp_path):
    one = config.copy_and_resolve_references()
    one.train.accumulation = 1  # nor on the parts of a batch
    other = on_devices(one, tmp_path / "eight")
    want, have = state_of(unbroken, 6), state_of(other, 6)
    np.testing.assert_array_equal(want["memory/main/counts"], have["memory/main/counts"])
    np.testing.assert_allclose(want["memory/main/losses"], have["memory/main/losses"], rtol=1e-4)
    for step, row in rows(unbroken).items():
        np.testing.assert_allclose(row["train/loss"], rows(other)[step]["train/loss"], rtol=1e-4)


def test_switching_it_on_half_way_is_refused(config, unbroken, tmp_path):
    workdir = broken_off(unbroken, tmp_path / "broken", 3)
    config = config.copy_and_resolve_references()
    config.objective.resampling = "none"
    with pytest.raises(UserError, match=r"objective\.resampling: was 'loss_second_moment'"):
        loop.run(resolve(config), str(workdir))


def test_methods_whose_loss_has_no_single_timestep_refuse_it(config):
    assert set(NOT) < set(METHODS)
    for name in ("dpo",):
        c = config.copy_and_resolve_references()
        c.method = {"name": name}
        c.data.images = ({"name": "rejected", "kind": "picture"},)
        with pytest.raises(UserError, match=rf"objective\.resampling is .* method '{name}', whose"):
            blank_method(resolve(c))


def test_a_stage_with_another_range_of_timesteps_is_refused(config):
    c = config.copy_and_resolve_references().unlock()
    c.stages = (vars(Stage(start=2, timestep_min=100)),)
    with pytest.raises(ValueError, match=re.escape("a stage has another range of timesteps")):
        resolve(c)
