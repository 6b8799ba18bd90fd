"""FLUX on 8 virtual devices: the same prediction and gradients as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import XLA_FLAGS

SCRIPT = Path(__file__).with_name("flux_devices.py")


@pytest.fixture(scope="module")
def found():
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_nothing_depends_on_the_mesh(found):
    assert found["output"] <= 1e-5
    worst = max(found["gradients"], key=found["gradients"].get)
    assert found["gradients"][worst] <= 2e-5, worst


def test_heads_and_hidden_channels_are_split_over_tensor(found):
    joint = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
             "to_add_out"]  # fmt: skip
    double = [f"attn.{name}" for name in joint]
    double += [f"{ff}.{name}" for ff in ("ff", "ff_context") for name in ("net.0.proj", "net.2")]
    double += ["norm1.linear", "norm1_context.linear"]
    single = ["norm.linear", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"]
    expected = [f"transformer_blocks.0-1.{name}.kernel" for name in double]
    expected += [f"single_transformer_blocks.0-1.{name}.kernel" for name in single]
    assert found["split"] == sorted(expected)


def test_no_hidden_activation_moves_between_devices(found):
    """11 tokens of text and picture; 5 and 6 of each; 4 x 32 hidden channels, 2 devices hold 64."""
    moved = [shape.split(",") for shape in found["exchanged"]]
    assert ["1", "11", "32"] in moved  # the sum over `tensor` after the last product of a block
    hidden = [shape for shape in moved if shape[-1] in ("64", "128", "80", "160")]
    assert not [shape for shape in hidden if shape[-2:-1] in (["5"], ["6"], ["11"])]
