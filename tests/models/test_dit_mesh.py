"""Diffusion transformers and T5 on meshes: the same losses and gradients, nothing left whole."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh, NamedSharding

from sdjax.models import weights
from sdjax.models.mmdit.network import MMDiT, MMDiTConfig
from sdjax.models.stacked_paths import leading_axes
from sdjax.models.t5 import T5Config, T5Encoder
from sdjax.parallel import sharding
from sdjax.parallel.mesh import AXES
from tests.conftest import XLA_FLAGS

SCRIPT = Path(__file__).with_name("dit_devices.py")
FLAGS = f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"
LARGE = dataclasses.replace(
    MMDiTConfig(), num_layers=38, num_attention_heads=38, caption_projection_dim=2432,
    qk_norm="rms_norm",
)  # fmt: skip


def test_losses_and_gradients_do_not_depend_on_the_mesh():
    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    for name, meshes in json.loads(run.stdout.splitlines()[-1]).items():
        one = meshes["(1, 1, 1)"]
        assert one["held"] == 1.0
        for mesh, found in meshes.items():
            # Sums over examples and heads in another order.
            assert found["loss"] == pytest.approx(one["loss"], rel=1e-5), (name, mesh)
            assert found["error"] < 2e-5, (name, mesh)
        # Over fsdp and tensor, but for biases and norms.
        assert meshes["(2, 2, 2)"]["held"] < 0.4, name


@pytest.mark.parametrize("fsdp,tensor", [(8, 1), (8, 2)])
@pytest.mark.parametrize(
    "name,network,config",
    [("transformer", MMDiT, LARGE), ("text_encoder_3", T5Encoder, T5Config())],
    ids=["sd35_large", "t5_xxl"],
)
def test_no_large_array_of_a_real_network_stays_whole(name, network, config, fsdp, tensor):
    mesh = AbstractMesh((1, fsdp, tensor), AXES)
    total = held = 0
    for path, array in weights.abstract(network, config)[1].items():
        spec = sharding.param_spec(f"{name}.{path}", array.shape, mesh)
        assert leading_axes(path) == 0 or spec[0] is None  # blocks are never split among devices
        part = math.prod(NamedSharding(mesh, spec).shard_shape(array.shape))
        small = array.size // (array.shape[0] if leading_axes(path) else 1) < sharding.MIN_FSDP_SIZE
        assert part <= array.size // fsdp or small, path
        total, held = total + array.size, held + part
    # The matrices of the blocks are split over `tensor` too; tables, embedders and biases are not.
    assert held < total / fsdp / tensor * 1.05
