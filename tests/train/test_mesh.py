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
from tests.conftest import XLA_FLAGS

SCRIPT = Path(__file__).with_name("eight_devices.py")
FLAGS = f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"


def on_meshes(config, tmp_path, *meshes):
    """(what `eight_devices.py` prints, the parameters that it writes)."""
    (tmp_path / "config.json").write_text(json.dumps(to_dict(resolve(config))))
    files = [str(tmp_path / "config.json"), str(tmp_path / "out.npz")]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *files, *([json.dumps(meshes)] if meshes else [])],
        env=os.environ | {"XLA_FLAGS": FLAGS},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    print(run.stderr)
    with np.load(tmp_path / "out.npz") as file:
        params = dict(file)
    return json.loads(run.stdout.splitlines()[-1]), params


@pytest.fixture
def eight(tiny_config, tmp_path):
    # Adam makes a step of up to the learning rate from a gradient that is zero but for rounding.
    tiny_config.optim.learning_rate = 2e-4
    # More to split over `tensor` than the middle of the UNet has.
    tiny_config.model.text_encoder.intermediate_size = 128
    tiny_config.validation.rows = 2
    tiny_config.optim.clip_norm = 1.0  # the norm is over all shards
    return on_meshes(tiny_config, tmp_path)


@pytest.mark.parametrize(
    ("kind", "meshes"), [("lora", [(2, 4, 1), (2, 2, 2)]), ("lokr", [(2, 2, 2)])]
)
def test_adapters_do_not_depend_on_the_mesh(kind, meshes, tiny_config, tmp_path):
    tiny_config.method = {
        "name": "adapters", "kind": kind, "targets": ("all",), "text_targets": ("linear",),
    }  # fmt: skip
    tiny_config.optim.learning_rate = 2e-4
    output, params = on_meshes(tiny_config, tmp_path, (1, 1, 1), *meshes)
    one, *others = output["runs"]
    assert len(others) == len(meshes)
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
    output, params = eight
    results = output["runs"]
    assert output["kernel_error"] < 1e-5
    assert output["summed_error"] == 0.0 and output["exchanges"] == []
    assert [tuple(r["mesh"]) for r in results] == [
        (1, 1, 1), (8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)
    ]  # fmt: skip
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
