"""The same losses and parameters on any mesh, on virtual CPU devices in a process of their own."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from sdjax.config import resolve, to_dict
from sdjax.families import sd
from sdjax.models import weights
from sdjax.models.unet import UNet, UNetConfig
from sdjax.parallel import sharding as sharding_lib
from sdjax.parallel.mesh import AXES
from tests.conftest import XLA_FLAGS, make_tiny_config

SCRIPT = Path(__file__).with_name("eight_devices.py")
FLAGS = f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"


ADAPTERS = {"lora": [(1, 1, 1), (2, 4, 1), (2, 2, 2)], "lokr": [(1, 1, 1), (2, 2, 2)]}
WHOLE = [(1, 1, 1), (8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)]


def whole_run(config):
    # Adam makes a step of up to the learning rate from a gradient that is zero but for rounding.
    config.optim.learning_rate = 2e-4
    # More to split over `tensor` than the middle of the UNet has.
    config.model.text_encoder.intermediate_size = 128
    config.validation.rows = 2
    config.optim.clip_norm = 1.0  # the norm is over all shards


def adapter_run(config, kind):
    config.method = {
        "name": "adapters", "kind": kind, "targets": ("all",), "text_targets": ("linear",),
    }  # fmt: skip
    config.optim.learning_rate = 2e-4


def on_meshes(folder, every):
    """Run {name: (config, meshes)} in one process of eight devices, for `read`."""
    given = {n: {"config": to_dict(resolve(c)), "meshes": m} for n, (c, m) in every.items()}
    (folder / "runs.json").write_text(json.dumps(given))
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=os.environ | {"XLA_FLAGS": FLAGS},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stderr
    print(run.stderr)


def read(folder, name):
    """(a configuration's results, the parameters after its steps)."""
    with np.load(folder / f"{name}.npz") as file:
        params = dict(file)
    return json.loads((folder / f"{name}.json").read_text()), params


@pytest.fixture(scope="module")
def eight(tiny_vae, shapes_dir, tmp_path_factory):
    """The folder with what came of all runs."""
    folder, every = tmp_path_factory.mktemp("eight"), {}
    for name, meshes in (("whole", WHOLE), *ADAPTERS.items()):
        config = make_tiny_config(tiny_vae, shapes_dir)
        whole_run(config) if name == "whole" else adapter_run(config, name)
        every[name] = (config, meshes)
    on_meshes(folder, every)
    return folder


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_do_not_depend_on_the_mesh(kind, eight):
    output, params = read(eight, kind)
    one, *others = output["runs"]
    assert [tuple(result["mesh"]) for result in output["runs"]] == ADAPTERS[kind]
    for result in others:
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-5)
        np.testing.assert_allclose(result["grad_norm"], one["grad_norm"], rtol=1e-4)
        assert result["redrawn"] and result["recompiled"] == 0
        for name in {key.split(":")[1] for key in params}:
            np.testing.assert_allclose(
                params[f"{tuple(result['mesh'])}:{name}"], params[f"(1, 1, 1):{name}"],
                rtol=1e-5, atol=1e-5, err_msg=name,
            )  # fmt: skip


def test_nothing_depends_on_the_mesh(eight):
    output, params = read(eight, "whole")
    results = output["runs"]
    assert output["kernel_error"] < 1e-5
    assert output["summed_error"] == 0.0 and output["exchanges"] == []
    assert [tuple(r["mesh"]) for r in results] == WHOLE
    one = results[0]
    validated = [r["validation"] for r in results if r["validation"]]
    assert len(validated) == 3 and np.asarray(validated[0]).shape == (7, 8)
    assert validated[0] == validated[1] == validated[2]  # to the bit
    for result in results:
        # Losses and timesteps (the buckets count them) of the same examples and noise.
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-5)
        np.testing.assert_allclose(result["grad_norm"], one["grad_norm"], rtol=1e-5)
        assert result["buckets"] == one["buckets"]
        assert result["recompiled"] == 0
        assert result["redrawn"]
        data, fsdp, tensor = mesh = tuple(result["mesh"])
        for name in {key.split(":")[1] for key in params}:
            np.testing.assert_allclose(
                params[f"{mesh}:{name}"], params[f"(1, 1, 1):{name}"],
                rtol=1e-5, atol=1e-5, err_msg=f"{name} on {mesh}",
            )  # fmt: skip
        assert result["whole"] == []
        for kind in ("params", "opt_state", "ema"):
            whole, held = one["bytes"][kind][0], result["bytes"][kind]
            assert len(held) == data * fsdp * tensor and len(set(held)) == 1
            # Biases and norms, which stay whole, are some 3 % of this tiny model.
            assert 1 / (fsdp * tensor) <= held[0] / whole <= 1 / fsdp + 0.04
            assert tensor == 1 or held[0] / whole < 0.95 / fsdp, (mesh, kind, held[0] / whole)


@pytest.mark.parametrize("preset", [UNetConfig(), sd.UNET_SD2], ids=["sd15", "sd21"])
@pytest.mark.parametrize("fsdp,tensor", [(8, 1), (64, 1), (8, 2)])
def test_no_large_array_of_a_real_unet_stays_whole(preset, fsdp, tensor):
    mesh = AbstractMesh((1, fsdp, tensor), AXES)
    _, shapes = weights.abstract(UNet, preset)
    total = held = 0
    for path, array in shapes.items():
        sharding = NamedSharding(mesh, sharding_lib.param_spec(f"unet.{path}", array.shape, mesh))
        part = math.prod(sharding.shard_shape(array.shape))
        assert part == array.size // fsdp or array.size < sharding_lib.MIN_FSDP_SIZE or (
            part * fsdp * tensor == array.size
        ), path  # fmt: skip
        total, held = total + array.size, held + part
    # 860 million parameters, of which biases, norms and conv_in are half a million.
    assert held < total / fsdp * (1.0 if tensor == 1 else 0.9) + 0.6e6
