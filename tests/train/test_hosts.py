"""Real processes on loopback: the same losses, errors that all hear of, stopping, going on.

The runs are of a VAE alone, whose step compiles fastest, but for one that goes the whole way.
"""

import re
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.conftest import make_tiny_config, small_autoencoder
from tests.hosts import free_port, losses, run_hosts, start_host, start_hosts, write_recipe
from tests.odd_names import ODD

STEPS = 36  # of milliseconds each


@pytest.fixture(scope="module")
def recipe(tiny_vae, shapes_dir, tmp_path_factory):
    """Long enough to be interrupted."""
    config = make_tiny_config(tiny_vae, shapes_dir)
    small_autoencoder(config)
    config.mesh.update(data=2, fsdp=1, tensor=2)  # on four hosts parameters lie across two
    config.train.update(steps=STEPS, checkpoint_every=6, keep_last=2, export=True)
    return write_recipe(tmp_path_factory.mktemp("recipe") / "vae.py", config)


@pytest.fixture(scope="module")
def unbroken(recipe, tmp_path_factory):
    """The workdir of two hosts that nothing happens to."""
    workdir = tmp_path_factory.mktemp("unbroken") / ODD
    codes, hosts = run_hosts(recipe, workdir, 2)
    assert codes == [0, 0], hosts[0].err
    return workdir


def assert_same_results(workdir, other):
    """The same files at the end of a run, the same weights and pictures.

    But for data_profile.json: a start that sees too few examples writes none.
    """
    files, others = (
        {str(f.relative_to(w)): f for f in w.rglob("*")
         if f.is_file() and not {"checkpoints", "tensorboard", "data_profile.json"} & set(f.parts)}
        for w in (workdir, other)
    )  # fmt: skip
    assert files.keys() == others.keys()
    for name, file in files.items():
        if name.startswith("samples"):
            one, two = (np.asarray(Image.open(f), int) for f in (file, others[name]))
            assert np.abs(one - two).max() <= 1
        if name.startswith("diffusers") and name.endswith(".safetensors"):
            one, two = load_file(file), load_file(others[name])
            assert one.keys() == two.keys() and one
            for path, value in one.items():
                np.testing.assert_allclose(value, two[path], rtol=1e-3, atol=1e-5, err_msg=path)
    assert any(name.startswith("samples") for name in files)
    assert any(name.startswith("diffusers") for name in files)


def test_one_host_has_the_losses_of_two(recipe, unbroken, tmp_path):
    """And four have: they go on in the test below."""
    short = ("--config.train.steps=5", "--config.train.export=False")
    codes, hosts = run_hosts(recipe, tmp_path / "run", 1, *short)
    assert codes == [0], hosts[0].err
    assert "data 2 x fsdp 1 x tensor 2: 4 x cpu, 1 host(s)" in hosts[0].out
    assert "batch 8 (8 per host" in hosts[0].out
    found = losses(tmp_path / "run")
    assert sorted(found) == list(range(1, 6))
    np.testing.assert_allclose(
        list(found.values()), [losses(unbroken)[s] for s in found], rtol=1e-5
    )


def kill_one(recipe, workdir, victim, step):
    """Two hosts, of which one is killed after a step; how the other ends."""
    hosts = start_hosts(recipe, workdir, 2)
    hosts[0].wait_for(rf"step {step}/")
    hosts[victim].send("KILL")
    begin = time.monotonic()
    survivor = hosts[1 - victim]
    assert survivor.wait(timeout=60) == 76, survivor.err
    assert time.monotonic() - begin < 40  # the timeout is 10 s, and the machine may be busy
    told = [line for line in survivor.err.splitlines() if "is lost" in line]
    assert len(told) == 1 and told[0].startswith(f"[host {1 - victim}] "), survivor.err
    assert f"host {victim}" in told[0] and "same command again" in told[0]
    assert survivor.err.splitlines()[-1] == told[0]


def test_killed_stopped_and_taken_over_by_four(recipe, unbroken, tmp_path):
    """A killed host ends the other; SIGTERM to one saves on both; each time the rerun goes on."""
    workdir, expected, kept = tmp_path / "run", losses(unbroken), {}
    for victim, step in ((1, 8), (0, 14)):
        kill_one(recipe, workdir, victim, step)
        kept |= losses(workdir)
    hosts = start_hosts(recipe, workdir, 2)
    hosts[0].wait_for(r"step 16/")
    hosts[1].send("TERM")
    assert [host.wait() for host in hosts] == [75, 75], hosts[0].err
    resumed = int(re.search(r"resumed at step (\d+)", hosts[0].out)[1])
    stopped = int(re.search(r"stopped by a signal after step (\d+)", hosts[0].out)[1])
    assert 6 <= resumed < stopped < STEPS
    found = losses(workdir)
    assert sorted(found) == list(range(1, stopped + 1))
    assert found == {s: expected[s] for s in found}  # to the bit
    assert kept == {s: expected[s] for s in kept}
    assert (workdir / "checkpoints" / str(stopped)).is_dir()

    codes, hosts = run_hosts(recipe, workdir, 4)
    assert codes == [0] * 4, hosts[0].err
    assert f"resumed at step {stopped}" in hosts[0].out
    assert "data 2 x fsdp 1 x tensor 2: 4 x cpu, 4 host(s)" in hosts[0].out
    assert "batch 8 (4 per host" in hosts[0].out
    found = losses(workdir)
    assert sorted(found) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)
    for step in range(stopped + 1, min(stopped + 6, STEPS + 1)):  # from the very state of two
        np.testing.assert_allclose(found[step], expected[step], rtol=1e-5)
    assert_same_results(workdir, unbroken)


def test_an_error_of_one_host_ends_all_with_its_words(recipe, tmp_path):
    common = ["--num_processes=2", "--join_timeout=60", "--heartbeat_timeout=10"]
    for name, options, words in (
        ("seed", {1: ["--config.seed=5"]}, "seed: 0 there, 5 here"),
        ("workdir", {}, "must be one folder for all hosts"),
    ):
        address = f"--coordinator=127.0.0.1:{free_port()}"
        folders = [tmp_path / name / (str(i) if name == "workdir" else "run") for i in range(2)]
        hosts = [
            start_host(recipe, folders[i], address, *common, f"--process_id={i}",
                       *options.get(i, []), devices=2)
            for i in range(2)
        ]  # fmt: skip
        assert [host.wait(120) for host in hosts] == [2, 2], hosts[0].err + hosts[1].err
        assert words in hosts[1].err and "[host 1] error: " in hosts[1].err
        assert words in hosts[0].err and "[host 0] stopped, because host 1 did: " in hosts[0].err
        assert "Traceback" not in hosts[0].err + hosts[1].err


@pytest.mark.parametrize("index", [0, 1])
def test_a_host_that_does_not_come_is_an_error(recipe, tmp_path, index):

    begin = time.monotonic()
    host = start_host(
        recipe, tmp_path / "run", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2",
        f"--process_id={index}", "--join_timeout=4",
    )  # fmt: skip
    assert host.wait(60) == 2, host.err
    assert 4 < time.monotonic() - begin < 30
    assert f"error: process {index} of 2 (from flags) could not join" in host.err
    assert "within 4 s" in host.err and "firewall" in host.err and "Traceback" not in host.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_hosts_leave_what_one_does(tiny_config, tmp_path):
    """Text to image, to the last file: pictures, score, diffusers folder, EMA snapshots."""
    tiny_config.mesh.update(data=1, fsdp=1, tensor=4)  # so that parameters lie across hosts
    tiny_config.train.update(steps=3, sample_every=2, checkpoint_every=2, export=True)
    tiny_config.sample.update(count=3, fidelity=4)
    tiny_config.ema.update(profiles=("warmup-0.9", "power-0.05"), snapshot_every=3)
    recipe = write_recipe(tmp_path / "recipe.py", tiny_config)
    for count in (1, 2):
        codes, hosts = run_hosts(recipe, tmp_path / str(count), count)
        assert codes == [0] * count, hosts[0].err
        assert "trained to step 3" in hosts[0].out and "batch 8 (8 per host" in hosts[0].out
        assert not any("trained to" in host.out for host in hosts[1:])
    np.testing.assert_allclose(
        list(losses(tmp_path / "2").values()), list(losses(tmp_path / "1").values()), rtol=1e-5
    )
    assert_same_results(tmp_path / "2", tmp_path / "1")
    drawn = {file.name for file in (tmp_path / "2" / "samples").iterdir()}
    assert drawn == {"00000002.png", "00000003.png", "strip.png"}
    assert list((tmp_path / "2" / "ema_snapshots").iterdir())


def test_processes_that_were_told_different_numbers_do_not_start(recipe, tmp_path):
    address = f"--coordinator=127.0.0.1:{free_port()}"
    hosts = [
        start_host(recipe, tmp_path / "run", address, f"--num_processes={count}",
                   f"--process_id={i}", "--join_timeout=6")
        for i, count in enumerate((2, 3))
    ]  # fmt: skip
    assert [host.wait(60) for host in hosts] == [2, 2], hosts[0].err + hosts[1].err
    assert "was told of 3 processes, process 0 of 2" in hosts[1].err
    assert not (tmp_path / "run").exists()
