"""The update split over `data`: the same run in less memory, on virtual devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from sdjax.parallel import sharding
from sdjax.parallel.mesh import AXES
from tests.conftest import XLA_FLAGS

SCRIPT = Path(__file__).with_name("shared_update_devices.py")
A, Q, BIAS = 16 * 64, 64 * 32, 32


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(folder / "out.json")],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / "out.json").read_text())


def test_the_run_is_that_of_one_device(runs):
    """Its script also restores each checkpoint on the other meshes, to the bit."""
    for name, result in runs.items():
        one = runs["one 8bit" if name.endswith("8bit") else "one"]
        # In 8 bits a rounding that falls the other way is a step of another size.
        rtol, atol = (1e-4, 1e-4) if name.endswith("8bit") else (1e-5, 1e-5)
        for key in ("losses", "norms"):
            np.testing.assert_allclose(result[key], one[key], rtol=10 * rtol, err_msg=name)
        for kind in ("params", "average"):
            for path, want in one[kind].items():
                np.testing.assert_allclose(
                    result[kind][path], want, rtol=rtol, atol=atol, err_msg=f"{name} {path}"
                )


def test_bytes_on_a_device(runs):
    held = {name: run["held"] for name, run in runs.items()}
    everything = 4 * (A + Q + BIAS)
    counter = 4  # Adam's, and the schedule's
    assert held["one"] == held["apart"] == {
        "params": everything, "opt_state": 2 * everything + 2 * counter, "ema": everything
    }  # fmt: skip
    eighth = 4 * (A + Q) // 8 + 4 * BIAS
    assert held["shared"] == {
        "params": everything, "opt_state": 2 * eighth + 2 * counter, "ema": eighth
    }  # fmt: skip
    # fsdp 2 and tensor 2 (for to_q), and of data its two.
    assert held["all"]["ema"] == 4 * (A // 4 + Q // 8 + BIAS)
    # Four copies in two slices: shared by the two in a slice, fsdp 2 besides.
    assert held["slices"]["params"] == 4 * ((A + Q) // 2 + BIAS)
    assert held["slices"]["ema"] == 4 * ((A + Q) // 4 + BIAS)


@pytest.mark.parametrize(
    "sizes,path,shape,spec",
    [
        ((8, 1, 1), "u.conv.kernel", (3, 3, 320, 640), P(None, None, None, ("data",))),
        ((2, 4, 1), "u.conv.kernel", (3, 3, 320, 640), P(None, None, None, ("fsdp", "data"))),
        # 640 does not divide by 4 x 64: another dimension, or none.
        ((64, 4, 1), "u.conv.kernel", (3, 3, 320, 640), P(None, None, ("data",), "fsdp")),
        ((256, 1, 1), "u.conv.kernel", (3, 3, 320, 640), P(None, None, None, None)),
        ((2, 2, 2), "u.to_q.kernel", (320, 320), P(("fsdp", "data"), "tensor")),
        ((8, 1, 1), "u.conv.bias", (640,), P(None)),
        ((8, 1, 1), "t.token_embedding.embedding", (49408, 768), P(None, ("data",))),
    ],
)
def test_where_an_update_is_computed(sizes, path, shape, spec):
    mesh = AbstractMesh(sizes, AXES)
    assert sharding.update_spec(path, shape, mesh) == spec


def test_one_copy_has_nothing_to_share():
    mesh = AbstractMesh((1, 8, 1), AXES)
    shape = (3, 3, 320, 640)
    spec = sharding.param_spec("u.conv.kernel", shape, mesh)
    assert sharding.update_spec("u.conv.kernel", shape, mesh) == spec == P(None, None, None, "fsdp")
