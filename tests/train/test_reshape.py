"""Checkpoints written on one mesh and read on another, on virtual devices and by two hosts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints import checkpoint
from sdjax.config import resolve, to_dict
from tests.conftest import XLA_FLAGS
from tests.hosts import free_port

SCRIPT = Path(__file__).with_name("reshape_devices.py")


def start(devices, *arguments):
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, err[-4000:]
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reshape")


@pytest.fixture
def runs(folder, tiny_config):
    if not (folder / "moved.npz").exists():
        tiny_config.train.update(steps=4, checkpoint_every=2, bundle_frozen=True)
        tiny_config.sample.count = 1
        (folder / "config.json").write_text(json.dumps(to_dict(resolve(tiny_config))))
        finish(start(8, "run", folder / "config.json", folder))
    return folder


def test_a_run_goes_on_on_another_mesh(runs):
    """Its script also restores both runs on every mesh, and compares bytes and shards."""
    with np.load(runs / "whole.npz") as whole, np.load(runs / "moved.npz") as moved:
        assert whole.keys() == moved.keys() and len(whole.keys()) > 100
        for name in whole:
            np.testing.assert_allclose(moved[name], whole[name], rtol=1e-5, atol=1e-5, err_msg=name)
    whole, moved = (json.loads((runs / f"{name}.json").read_text()) for name in ("whole", "moved"))
    assert whole["iterator"] == moved["iterator"]


def test_a_host_reads_its_part_of_a_checkpoint(tmp_path, monkeypatch):
    """Half of what one device wrote, not all of it to throw half away."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2**20)
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(2048, 1024)).astype(np.float32) for name in "ab"}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": jax.tree.map(jnp.asarray, params)}, {}, {})
    port = free_port()
    hosts = [start(1, "host", tmp_path, process, port) for process in range(2)]
    found = [json.loads(finish(process).splitlines()[-1]) for process in hosts]
    total = sum(value.nbytes for value in params.values())
    for host in found:
        assert host["held"] == total / 2
        assert host["read"] < 0.55 * total, host
    expected = sum(value.sum(dtype=np.float64) for value in params.values())
    assert np.isclose(sum(host["sum"] for host in found), expected)
