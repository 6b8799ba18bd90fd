"""Whole runs of a tiny model: train, resume, be killed, diverge."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from sdjax.checkpoints import checkpoint
from sdjax.checkpoints.checkpoint import CheckpointError
from sdjax.config import resolve, to_dict
from sdjax.errors import UserError
from sdjax.methods import autoencoder
from sdjax.models.config import ConfigError
from sdjax.train import loop
from tests.conftest import small_autoencoder
from tests.odd_names import ODD


def run(config, workdir, **changes):
    config.update_from_flattened_dict(changes)
    return loop.run(resolve(config), str(workdir))


def rows(workdir):
    """{step: row} of metrics.jsonl, without what depends on the clock or the process."""
    timed = ("images_per_second", "data_wait", "device/", "mfu", "truncated_captions")
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "train/loss" in row:
            assert row["step"] not in found
            found[row["step"]] = {k: v for k, v in row.items() if not any(t in k for t in timed)}
    return found


def final_state(workdir):
    """Everything in the newest checkpoint, as {name: array}, and the position in the data."""
    step = checkpoint.latest_step(workdir)
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        state = checkpointer.restore(folder / "state")
    leaves = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(state)}
    return step, leaves, json.loads((folder / "data" / "metadata").read_text())


def assert_same_run(a, b):
    assert rows(a) == rows(b)
    (step_a, state_a, data_a), (step_b, state_b, data_b) = final_state(a), final_state(b)
    assert step_a == step_b and data_a == data_b and state_a.keys() == state_b.keys()
    for name, value in state_a.items():
        np.testing.assert_array_equal(value, state_b[name], err_msg=name)


def start(config, workdir):
    """The same run in a process of its own, to be sent signals."""
    code = textwrap.dedent("""
        import json, sys
        from sdjax.config import resolve
        from sdjax.train import loop
        sys.exit(loop.run(resolve(json.loads(sys.argv[1])), sys.argv[2]))
    """)
    values = json.dumps(to_dict(resolve(config)))
    return subprocess.Popen(
        [sys.executable, "-c", code, values, str(workdir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, workdir, step, seconds=180):
    file = workdir / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.stdout.read())
        if file.exists() and any(f'"step": {step}, "train/loss"' in x for x in open(file)):
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"no step {step} in {seconds} s")


@pytest.fixture
def tiny_config(tiny_config):
    """With averages of both kinds, which a resumed run must go on with to the bit."""
    tiny_config.ema.profiles = ("warmup-0.9", "power-0.05")
    return tiny_config


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The workdir of a run that nothing happened to; made by the first test that has a config."""
    return tmp_path_factory.mktemp("unbroken") / ODD


@pytest.fixture
def reference(unbroken, tiny_config):
    if not unbroken.exists():
        config = tiny_config.copy_and_resolve_references()
        assert run(config, unbroken, **{"train.export": True}) == loop.DONE
    return unbroken


def test_a_run_leaves_what_it_promises(reference, capsys):
    found = rows(reference)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    last = found[6]
    assert not any("validation" in name for name in last)  # of no examples
    for name in ("loss", "loss_unweighted", "grad_norm", "learning_rate", "images_seen", "epoch",
                 "skipped_steps", "grad_norms/unet.conv_in", "param_norms/unet.mid_block",
                 "update_ratios/unet.mid_block",
                 "grad_norms/text_encoder.encoder"):  # fmt: skip
        assert np.isfinite(last[f"train/{name}"]), name
    assert any(name.startswith("train/loss_at/t") for name in last)
    assert last["train/images_seen"] == 48 and last["train/epoch"] == 1.2
    config = json.loads((reference / "config.json").read_text())
    assert resolve(config).model.text_encoder.vocab_size <= 560
    assert (reference / "tokenizer" / "vocab.json").exists()
    assert (reference / "samples" / "00000006.png").exists()
    assert list((reference / "tensorboard").iterdir())
    assert checkpoint.all_steps(reference) == [3, 6]


def test_stopping_and_going_on_gives_the_same_bits(reference, tiny_config, tmp_path):
    # A shorter run first: constant learning rate, so that its length changes nothing else.
    workdir = tmp_path / ODD
    assert run(tiny_config, workdir, **{"train.steps": 4}) == loop.DONE
    assert run(tiny_config, workdir, **{"train.steps": 6}) == loop.DONE
    assert_same_run(reference, workdir)


def test_a_killed_run_goes_on_to_the_same_bits(reference, tiny_config, tmp_path):
    process = start(tiny_config, tmp_path)
    wait_for_step(process, tmp_path, 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.latest_step(tmp_path) in (None, 3, 6)
    assert run(tiny_config, tmp_path) == loop.DONE
    assert_same_run(reference, tmp_path)


def test_sigterm_saves_and_exits_with_its_code(reference, tiny_config, tmp_path):
    tiny_config.train.update(steps=100_000, checkpoint_every=100_000)
    process = start(tiny_config, tmp_path)
    wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == loop.STOPPED == 75, output
    assert "run the same command again" in output
    stopped_at = checkpoint.latest_step(tmp_path)
    assert stopped_at >= 2 and stopped_at == max(rows(tmp_path))
    # Its first steps are those of any run with this configuration.
    assert rows(tmp_path)[2] == rows(reference)[2]


def test_another_configuration_is_refused_and_named(reference, tiny_config):
    tiny_config.model.unet.block_out_channels = (32,)
    tiny_config.seed = 5
    with pytest.raises(ConfigError) as caught:
        run(tiny_config, reference)
    message = str(caught.value)
    assert "model.unet.block_out_channels" in message and "seed: was 0, is 5" in message
    assert "another --workdir" in message


def test_harmless_changes_are_told(reference, tiny_config, capsys):
    tiny_config.train.log_every = 2
    assert run(tiny_config, reference) == loop.DONE
    assert "train.log_every: was 1, is 2" in capsys.readouterr().out


def test_an_unreadable_checkpoint_is_an_error_not_a_restart(reference, tiny_config, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "checkpoints" / "6" / "state"
    for file in state.rglob("*"):
        if file.is_file():
            os.truncate(file, 1)
    with pytest.raises(CheckpointError, match="checkpoints/6"):
        run(tiny_config, tmp_path, **{"train.steps": 9})
    assert rows(tmp_path) == rows(reference)
    assert checkpoint.all_steps(tmp_path) == [3, 6]


class Poison:
    """An iterator of batches with a NaN in those of some steps."""

    def __init__(self, data, bad):
        self.data, self.bad = data, bad

    def __getattr__(self, name):
        return getattr(self.data, name)

    def __next__(self):
        batch = next(self.data)
        if self.data.step in self.bad:
            batch = batch | {"image": np.full_like(batch["image"], np.nan)}
        return batch


def poison(monkeypatch, bad):
    make = loop.make_iterator
    monkeypatch.setattr(loop, "make_iterator", lambda *a, **kw: Poison(make(*a, **kw), bad))


def test_a_batch_with_nan_is_skipped_and_counted(tiny_config, tmp_path, monkeypatch):
    small_autoencoder(tiny_config)
    poison(monkeypatch, {2, 4})
    assert run(tiny_config, tmp_path) == loop.DONE
    found = rows(tmp_path)
    assert [found[s]["train/skipped_steps"] for s in range(1, 7)] == [0, 1, 1, 2, 2, 2]
    assert found[2]["train/loss"] == "NaN" and np.isfinite(found[6]["train/loss"])
    _, state, _ = final_state(tmp_path)
    assert all(np.isfinite(v).all() for v in state.values())


def test_too_many_in_a_row_stop_the_run_with_the_batch(tiny_config, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, set(range(2, 9)))
    assert run(tiny_config, tmp_path, **{"train.max_nonfinite": 3}) == loop.DIVERGED
    assert "3 steps in a row" in capsys.readouterr().out
    (dump,) = tmp_path.glob("bad_batch_*.npz")
    batch = np.load(dump)
    assert batch["image"].shape == (8, 16, 16, 3) and np.isnan(batch["image"]).all()
    assert batch["tokens"].shape == (8, 24)


def test_what_is_frozen_does_not_move_and_has_no_moments(reference, tiny_config, tmp_path):
    tiny_config.optim.groups = ((r"^unet\.mid_block\.", 0.0), (r"^text_encoder\.", 0.1))
    # The part that is frozen must come from somewhere: from nothing it is an error ...
    with pytest.raises(ConfigError, match="unet has no weights"):
        run(tiny_config, tmp_path / "nothing")
    # ... from another run it is fine.
    tiny_config.update(init_from=str(reference / "diffusers"), vae_from="")
    assert run(tiny_config, tmp_path / "second") == loop.DONE
    _, state, _ = final_state(tmp_path / "second")
    assert not any("unet.mid_block" in name for name in state)
    assert any("text_encoder" in name for name in state)


def test_dry_run_describes_and_trains_nothing(tiny_config, tmp_path, capsys):
    config = resolve(tiny_config)
    assert loop.run(config, str(tmp_path / "none"), dry_run=True) == loop.DONE
    output = capsys.readouterr().out
    for words in ('"batch_size": 8', "unet", "GiB per device", "shardings", "optimizer"):
        assert words in output
    assert not (tmp_path / "none").exists()


def test_a_batch_that_does_not_divide_is_refused(tiny_config, tmp_path):
    small_autoencoder(tiny_config)
    tiny_config.data.batch_size = 9
    tiny_config.train.accumulation = 3
    assert run(tiny_config, tmp_path, **{"train.steps": 1}) == loop.DONE
    tiny_config.mesh.data = 2
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        run(tiny_config, tmp_path / "other")


def test_a_workdir_that_cannot_be_made(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        run(tiny_config, tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("data.eval_split", "none", "split 'none'"),
        ("sample.sampler.name", "flow_euler", "flow_euler"),
        ("optim.groups", (("no_such", 0.5),), "no_such"),
    ],
)
def test_what_is_needed_late_is_checked_early(tiny_config, tmp_path, field, value, words):
    with pytest.raises(UserError, match=words):
        run(tiny_config, tmp_path, **{field: value})
    assert not (tmp_path / "metrics.jsonl").exists() or not rows(tmp_path)


def test_an_autoencoder_takes_the_same_road(tiny_config, tmp_path):
    small_autoencoder(tiny_config)
    tiny_config.train.export = True
    assert run(tiny_config, tmp_path) == loop.DONE
    found = rows(tmp_path)
    assert {"train/kl", "train/reconstruction"} <= found[6].keys()
    exported = json.loads((tmp_path / "diffusers" / "config.json").read_text())
    assert exported["_class_name"] == "AutoencoderKL"
    # Latents of unit variance: the factor is measured, here and in the workdir alike.
    assert exported["scaling_factor"] != 0.18215
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model"]["vae"]["scaling_factor"] == exported["scaling_factor"]
    assert run(tiny_config, tmp_path, **{"train.steps": 7}) == loop.DONE


def test_pictures_of_nan_end_in_exit_code_3_and_lose_nothing(
    tiny_config, tmp_path, monkeypatch, capsys
):
    small_autoencoder(tiny_config)
    monkeypatch.setattr(autoencoder, "to_host", lambda x: np.full(x.shape, np.nan))
    changes = {"train.steps": 2, "train.sample_every": 1, "train.export": True}
    assert run(tiny_config, tmp_path, **changes) == loop.DIVERGED
    words = capsys.readouterr().out
    assert "no pictures of step 1: " in words and "no pictures of step 2: " in words
    assert "trained to step 2" in words and "none: they have NaN pixels" in words
    assert checkpoint.latest_step(tmp_path) == 2 and sorted(rows(tmp_path)) == [1, 2]
    assert not list((tmp_path / "samples").glob("*.png")) and not (tmp_path / "diffusers").exists()
