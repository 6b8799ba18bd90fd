"""Checkpoints: exact round trips, partial reading, damage, full disks, killed saves, shardings."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.serialization import ocdbt_utils

from sdjax.checkpoints import checkpoint, saved_state
from sdjax.checkpoints.checkpoint import CheckpointError, Checkpoints
from sdjax.optim import ema, optimizers
from tests.odd_names import NAMES

DATA = {"position": 12345678901234, "nested": {"done": [1, 2], "mean": 0.1}}
CONFIG = {"optim": {"name": "adamw", "groups": (("a", 0.5),)}, "seed": 3}


def make_state(seed: int = 0, name: str = "adamw") -> dict:
    rng = np.random.default_rng(seed)
    shapes = {
        "unet.conv.kernel": (3, 3, 2, 8),
        "unet.norm.scale": (8,),
        "te.emb.embedding": (16, 4),
    }
    params = {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in shapes.items()}
    tx = optimizers.make_optimizer(optimizers.OptimConfig(name=name), 10, params)
    opt_state = jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(size=x.shape)).astype(x.dtype), tx.init(params)
    )
    averages = ema.init(ema.EMAConfig(("0.999", "power-0.05")), params)
    averages = jax.tree.map(lambda x: x * 0.7, averages)
    return {
        "params": params,
        "opt_state": opt_state,
        "ema": averages,
        "step": jnp.int32(7),
        "health": {"skipped": jnp.int32(2), "in_a_row": jnp.int32(0)},
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
    }


def abstract(state: dict) -> dict:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with steps 1 and 2, and their states. Not to be changed."""
    workdir = tmp_path_factory.mktemp("run")
    states = {1: make_state(1), 2: make_state(2)}
    with Checkpoints(workdir) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, DATA | {"at": step}, CONFIG)
    return workdir, states


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "schedule_free", "sgd"])
def test_round_trip_is_bit_exact_and_keeps_the_structure(tmp_path, name):
    state = make_state(name=name)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(7, state, DATA, CONFIG)
        checkpoints.wait()
        step, restored, data, config = checkpoints.restore(abstract(state))
    assert step == 7
    assert_same(restored, state)
    assert data == DATA
    assert config == {"optim": {"name": "adamw", "groups": [["a", 0.5]]}, "seed": 3}


@pytest.mark.parametrize("name", NAMES)
def test_a_workdir_of_any_name_is_written_read_and_resumed(tmp_path, name):
    (tmp_path / "x v" / "checkpoints").mkdir(parents=True)  # what "x [v2]" is as a pattern
    workdir = tmp_path / name
    states = {step: {"params": {"a": jnp.arange(3.0) * step}} for step in (1, 2)}
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, states[1], DATA, CONFIG)
    np.testing.assert_array_equal(checkpoint.restore_params(workdir)["a"], np.arange(3.0))
    with Checkpoints(workdir) as checkpoints:
        assert_same(checkpoints.restore(abstract(states[1]))[1], states[1])
        checkpoints.save(2, states[2], DATA, CONFIG)
    assert checkpoint.all_steps(workdir) == [1, 2] and checkpoint.read_config(workdir)["seed"] == 3
    np.testing.assert_array_equal(checkpoint.restore_params(workdir)["a"], 2 * np.arange(3.0))


def test_a_backslash_in_the_name_of_a_workdir_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="backslash"):
        Checkpoints(tmp_path / "a\\b")
    assert not list(tmp_path.iterdir())


def test_the_newest_is_the_default(run):
    workdir, states = run
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.all_steps() == [1, 2] and checkpoints.latest_step() == 2
        assert checkpoints.read_config() == checkpoint.read_config(workdir, 1)
        step, state, data, _ = checkpoints.restore(abstract(states[2]))
        assert (step, data["at"]) == (2, 2)
        assert_same(state, states[2])
        step, state, data, _ = checkpoints.restore(abstract(states[1]), 1)
        assert (step, data["at"]) == (1, 1)
        assert_same(state, states[1])


def test_saving_does_not_hold_on_to_donated_buffers(tmp_path):
    state = make_state()
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, {})
        bumped = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
        jax.block_until_ready(bumped)
        checkpoints.wait()
        assert_same(checkpoints.restore(abstract(bumped))[1], expected)


def test_keeps_the_last_ones_and_every_mth(tmp_path):
    state = {"params": {"a": jnp.ones(2)}}
    with Checkpoints(tmp_path, keep_last=2, keep_every=4) as checkpoints:
        for step in range(1, 8):
            assert checkpoints.save(step, state, {}, {})
            assert not checkpoints.save(step, state, {}, {})  # already there
    assert checkpoint.all_steps(tmp_path) == [4, 6, 7]


# ---- reading a part --------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["params", "ema:0.999", "ema:power-0.05"])
def test_one_set_of_parameters_without_knowing_the_model(run, which, monkeypatch):
    workdir, states = run
    read = []
    deserialize = ocp.type_handlers.NumpyHandler.deserialize

    async def counted(self, infos, args=None):
        read.extend(info.name for info in infos)
        return await deserialize(self, infos, args)

    monkeypatch.setattr(ocp.type_handlers.NumpyHandler, "deserialize", counted)
    kind, _, profile = which.partition(":")
    expected = states[2][kind][profile] if profile else states[2][kind]
    actual = checkpoint.restore_params(workdir, which)
    assert actual.keys() == expected.keys()
    for path in expected:
        assert type(actual[path]) is np.ndarray
        np.testing.assert_array_equal(actual[path], expected[path])
    assert read and not any("opt_state" in name for name in read)
    np.testing.assert_array_equal(
        checkpoint.restore_params(workdir, "params", 1)["unet.norm.scale"],
        states[1]["params"]["unet.norm.scale"],
    )


def test_unknown_parts_and_steps_are_named(run, tmp_path):
    workdir, states = run
    with pytest.raises(CheckpointError, match="has params, ema:0.999, ema:power-0.05"):
        checkpoint.restore_params(workdir, "ema:0.9")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; it has \[1, 2\]"):
        checkpoint.read_config(workdir, 5)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        checkpoint.restore_params(tmp_path)
    assert checkpoint.latest_step(tmp_path) is None
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="no checkpoint"),
    ):
        checkpoints.restore(abstract(states[1]))


# ---- damage ----------------------------------------------------------------------------------


def damaged(tmp_path: Path, what: str) -> dict:
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        for step in (3, 5):
            checkpoints.save(step, state, DATA, CONFIG)
    folder = tmp_path / "checkpoints" / "5"
    if what == "arrays":
        for file in (folder / "state").rglob("*"):
            if file.is_file() and "/d/" in str(file):
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif what == "state":
        for file in sorted((folder / "state").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    elif what == "data":
        (folder / "data" / "metadata").write_text('{"position": 12')
    return state


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
@pytest.mark.parametrize("what", ["arrays", "state", "data"])
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path, what):
    state = damaged(tmp_path, what)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(abstract(state))
        message = str(error.value)
        assert str(tmp_path / "checkpoints" / "5") in message
        assert "delete that folder to fall back to step 3" in message
        assert_same(checkpoints.restore(abstract(state), 3)[1], state)
    if what != "data":
        with pytest.raises(CheckpointError, match="step 5 cannot be read"):
            checkpoint.restore_params(tmp_path)


def test_an_empty_folder_is_not_silently_skipped(tmp_path):
    (tmp_path / "checkpoints" / "9").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 9
        with pytest.raises(CheckpointError, match="delete that folder to start the run from"):
            checkpoints.restore(abstract(make_state()))


def test_folders_with_other_names_are_no_checkpoints(run, tmp_path):
    (tmp_path / "checkpoints" / "old_8").mkdir(parents=True)
    assert checkpoint.all_steps(tmp_path) == []


def test_another_structure_names_what_differs(run):
    workdir, states = run
    wanted = abstract(states[2])
    wanted["params"] = dict(wanted["params"])
    del wanted["params"]["unet.norm.scale"]
    wanted["params"]["unet.new.bias"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    wanted["params"]["te.emb.embedding"] = jax.ShapeDtypeStruct((17, 4), jnp.float32)
    wanted["half"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    with Checkpoints(workdir) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(wanted)
    for line in (
        "only in the checkpoint: params/unet.norm.scale float32[8]",
        "not in the checkpoint: params/unet.new.bias float32[4]",
        "params/te.emb.embedding: float32[16, 4] in the checkpoint, float32[17, 4] now",
        "half: bfloat16[5] in the checkpoint, float32[5] now",
    ):
        assert line in str(error.value)
    assert "delete" not in str(error.value)


# ---- saves that fail -------------------------------------------------------------------------


async def not_merged(*args, **kwargs):
    """Orbax's own answer where its search for what to merge finds nothing."""


@pytest.mark.parametrize("how", ["wait", "check", "save", "close"])
def test_a_first_save_that_cannot_be_opened_is_an_error(tmp_path, monkeypatch, how):
    monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", not_merged)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), {}, {})
    with pytest.raises(CheckpointError) as error:
        while how == "check":
            checkpoints.check()
        if how == "save":
            checkpoints.save(2, make_state(), {}, {})
        getattr(checkpoints, how)()
    message = str(error.value)
    assert str(tmp_path / "checkpoints" / "1") in message and "cannot be opened again" in message
    assert "--workdir" in message and checkpoint.all_steps(tmp_path) == [1]


def test_a_save_that_lost_arrays_is_an_error_that_counts(tmp_path, monkeypatch):
    real = saved_state.stored
    monkeypatch.setattr(saved_state, "stored", lambda folder: set(sorted(real(folder))[2:]))
    count = len(saved_state.leaves(make_state()))
    assert count > 20
    with pytest.raises(CheckpointError, match=f"it has {count - 2} of {count} arrays"):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, make_state(), {}, {})


def test_only_the_first_save_of_a_process_is_opened_again(tmp_path, monkeypatch):
    opened = []
    real = saved_state.stored
    monkeypatch.setattr(saved_state, "stored", lambda path: opened.append(path.name) or real(path))
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(), {}, {})
            checkpoints.check()
    assert opened == ["1"]


def test_a_disk_that_fills_up_is_reported_with_its_path(tmp_path, monkeypatch):
    state = make_state()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {}, {})
    checkpoints.wait()

    async def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "serialize", full)
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(2, state, {}, {})
        checkpoints.wait()
    message = str(error.value)
    assert "No space left on device" in message and str(tmp_path / "checkpoints") in message
    assert "step 1 is the last complete one" in message
    monkeypatch.undo()
    assert checkpoint.all_steps(tmp_path) == [1]
    assert_same(Checkpoints(tmp_path).restore(abstract(state))[1], state)


def mounted(folder: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def test_a_small_disk_in_earnest(tmp_path):
    if not mounted(tmp_path, "size=2m"):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        state = {"params": {"a": jax.random.normal(jax.random.key(0), (300_000,))}}
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, state, {}, {})
        checkpoints.wait()
        with pytest.raises(CheckpointError, match="No space left on device"):
            checkpoints.save(2, state, {}, {})
            while True:  # the error surfaces without waiting for the save
                checkpoints.check()
        assert checkpoints.all_steps() == [1]
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            checkpoints = Checkpoints(tmp_path)
            checkpoints.save(2, state, {}, {})
            checkpoints.wait()
        assert_same(checkpoint.restore_params(tmp_path), jax.tree.map(np.asarray, state["params"]))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Not a directory"):
        Checkpoints(tmp_path / "file")


def test_an_error_under_way_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch, capsys):
    async def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "serialize", full)
    with pytest.raises(KeyError), Checkpoints(tmp_path) as checkpoints:
        try:
            checkpoints.save(1, make_state(), {}, {})
        except CheckpointError:
            pass
        raise KeyError("the first error")


# ---- other processes -------------------------------------------------------------------------

KILLED = """
import sys, time
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import atomicity
from sdjax.checkpoints.checkpoint import Checkpoints

state = {"params": {"a": jnp.arange(5.0)}}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, state, {"at": 1}, {})
checkpoints.wait()

async def hang(self, *args, **kwargs):
    print("saving", flush=True)
    time.sleep(100)

atomicity.AtomicRenameTemporaryPath.finalize = hang
checkpoints.save(2, {"params": {"a": jnp.zeros(5)}}, {"at": 2}, {})
checkpoints.wait()
"""


def test_a_killed_save_leaves_the_last_complete_one(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    guard = threading.Timer(60, process.kill)
    guard.start()
    assert process.stdout.readline() == b"saving\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    guard.cancel()
    left = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert len(left) == 2 and any("tmp" in name for name in left)
    assert checkpoint.all_steps(tmp_path) == [1]
    np.testing.assert_array_equal(checkpoint.restore_params(tmp_path)["a"], np.arange(5.0))
    state = {"params": {"a": jnp.zeros(5)}}
    with Checkpoints(tmp_path) as checkpoints:
        step, restored, data, _ = checkpoints.restore(abstract(state))
        assert (step, data) == (1, {"at": 1})
        np.testing.assert_array_equal(restored["params"]["a"], np.arange(5.0))
        checkpoints.save(2, state, {}, {})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


EIGHT = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sdjax.checkpoints.checkpoint import Checkpoints

assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
specs = {"a": P("fsdp"), "b": P(None, ("data", "fsdp")), "c": P()}
shapes = {"a": (16, 3), "b": (2, 8), "c": (5,)}
state = {"params": {k: jax.ShapeDtypeStruct(shapes[k], np.float32, sharding=NamedSharding(mesh, s))
                    for k, s in specs.items()}}
with Checkpoints(sys.argv[1]) as checkpoints:
    _, restored, _, _ = checkpoints.restore(state)
for k, s in specs.items():
    assert restored["params"][k].sharding.spec == s, restored["params"][k].sharding
doubled = jax.tree.map(lambda x: x * 2, restored)
with Checkpoints(sys.argv[2]) as checkpoints:
    checkpoints.save(1, doubled, {}, {})
"""


def test_one_device_to_eight_and_back(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"a": (16, 3), "b": (2, 8), "c": (5,)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    with Checkpoints(tmp_path / "one") as checkpoints:
        checkpoints.save(1, {"params": params}, {}, {})
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-c", EIGHT, str(tmp_path / "one"), str(tmp_path / "eight")]
    subprocess.run(command, check=True, env=environment, timeout=100)
    with Checkpoints(tmp_path / "eight") as checkpoints:
        _, restored, _, _ = checkpoints.restore(abstract({"params": params}))
    assert_same(restored, {"params": {k: 2 * v for k, v in params.items()}})
    assert_same(checkpoint.restore_params(tmp_path / "eight"),
                {k: 2 * np.asarray(v) for k, v in params.items()})  # fmt: skip
