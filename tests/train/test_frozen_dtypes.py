"""Frozen parameters lie on the devices in the dtype they are used in, and the step is the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints.assemble import assemble
from sdjax.config import resolve
from sdjax.config_model import method_of_run
from sdjax.data.pipeline import make_iterator
from sdjax.formats.diffusers_folder import read_diffusers
from sdjax.parallel.mesh import make_mesh
from sdjax.train import loop, program, startup
from sdjax.train.frozen import placed


@pytest.fixture
def config(tiny_config, pipeline_folder):
    """A fine-tune in bfloat16 of which one layer of the UNet is trained."""
    tiny_config.init_from = str(pipeline_folder)
    tiny_config.vae_from = ""
    tiny_config.model.dtype = "bfloat16"
    tiny_config.optim.groups = ((r"^unet\.conv_out\.", 1.0), ("", 0.0))
    return tiny_config


def test_the_step_is_that_of_frozen_parameters_in_float32_to_the_bit(config):
    assembled = assemble(resolve(config))
    config = assembled.config
    method, mesh = method_of_run(config, assembled.tokenizers), make_mesh(config.mesh)
    wide = dataclasses.replace(method, dtypes={})
    data = make_iterator(config.data, assembled.tokenizers, split="train", seed=0)
    batch = jax.device_put(next(data))
    data.close()
    found = []
    for one in (method, wide):
        built = program.build(config, one, mesh)
        params = startup.initial_params(config, one, assembled, built.split, mesh)
        frozen = placed(assembled.params, built.frozen)
        assert {p: v.dtype for p, v in frozen.items()} == {
            p: v.dtype for p, v in built.frozen.items()
        }
        found.append((built, built.step(built.fresh(params), frozen, batch)))
    (narrow, (state, metrics)), (_, (wide_state, wide_metrics)) = found
    assert metrics["loss"] == wide_metrics["loss"] and metrics["grad_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, state, wide_state)
    jax.tree.map(np.testing.assert_array_equal, metrics["grad_norms"], wide_metrics["grad_norms"])
    kinds = {path: value.dtype for path, value in narrow.frozen.items()}
    halves = {path for path, dtype in kinds.items() if dtype == jnp.bfloat16}
    norms = {path for path in kinds if "norm" in path.split(".")[-2]}
    assert halves == kinds.keys() - norms and norms


def test_what_a_run_exports_is_exact_and_one_that_resumes_places_the_same(
    tiny_config, tiny_vae, tmp_path, monkeypatch
):
    tiny_config.model.dtype = "bfloat16"
    tiny_config.train.update(steps=1, export=True)
    seen = []
    place = startup.place_frozen
    monkeypatch.setattr(
        startup, "place_frozen", lambda *a, **k: seen.append(place(*a, **k)) or seen[-1]
    )
    assert loop.run(resolve(tiny_config), str(tmp_path / "run")) == loop.DONE
    want = read_diffusers(tiny_vae).params
    exported = read_diffusers(tmp_path / "run" / "diffusers").params
    assert all(np.array_equal(exported[path], value) for path, value in want.items())
    for steps, bundled in ((2, True), (3, True)):
        tiny_config.train.update(steps=steps, export=False, bundle_frozen=bundled)
        assert loop.run(resolve(tiny_config), str(tmp_path / "run")) == loop.DONE
    first, *others = seen
    assert len(others) == 2 and any(v.dtype == jnp.bfloat16 for v in first.values())
    for other in others:  # from the reference, and from the copy
        assert {p: v.dtype for p, v in other.items()} == {p: v.dtype for p, v in first.items()}
        jax.tree.map(np.testing.assert_array_equal, other, first)
