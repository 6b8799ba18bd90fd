"""Going back after a spike: without the batch that made it, reproducibly."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import resolve
from sdjax.data.pipeline import make_iterator
from sdjax.errors import UserError
from sdjax.train import loop, rollback
from sdjax.train.monitoring import monitor
from sdjax.train.monitoring.health import SpikeDetector
from tests.conftest import small_autoencoder
from tests.train.test_loop import rows

WARMUP = 5


@pytest.fixture
def spiking(tiny_config, monkeypatch):
    """Batch 7 (of step 8) has a loss that stands out: its pictures are marked, and weigh more."""
    make, make_method = loop.make_iterator, loop.method_of_run

    def marked(*args):
        method = make_method(*args)
        (phase,) = method.phases

        def loss(trained, frozen, averages, batch, draw):
            per_example, aux = phase.loss(trained, frozen, averages, batch, draw)
            return per_example * jnp.where(jnp.max(batch["image"]) > 2, 100.0, 1.0), aux

        return dataclasses.replace(method, phases=(dataclasses.replace(phase, loss=loss),))

    monkeypatch.setattr(loop, "method_of_run", marked)

    def spoiled(*args, **kwargs):
        data = make(*args, **kwargs)
        inner = type(data).__next__

        class Spoiled(type(data)):
            def __next__(self):
                number = self.step
                batch = inner(self)
                if number == 7:
                    batch = {**batch, "image": batch["image"] * 60}
                return batch

        data.__class__ = Spoiled
        return data

    monkeypatch.setattr(loop, "make_iterator", spoiled)
    monkeypatch.setattr(monitor, "SpikeDetector", lambda f: SpikeDetector(f, warmup=WARMUP))
    small_autoencoder(tiny_config)
    tiny_config.train.update(steps=10, checkpoint_every=3, rollbacks=2, spike_factor=8.0)
    tiny_config.optim.learning_rate = 1e-4
    return resolve(tiny_config)


def test_batch_of():
    assert [rollback.batch_of(step, set()) for step in (1, 5)] == [0, 4]
    assert [rollback.batch_of(step, {2, 3, 6}) for step in (2, 3, 4, 5)] == [1, 4, 5, 7]


def test_the_stream_goes_on_without_the_batches(tiny_config):
    config = resolve(tiny_config).data
    make = lambda: make_iterator(config, {}, split="train", seed=0)  # noqa: E731
    plain, without = make(), make()
    numbers = [next(plain) for _ in range(6)]
    without.pass_over({0, 2, 3})
    for i in (1, 4):
        np.testing.assert_array_equal(next(without)["image"], numbers[i]["image"])
    state = without.get_state()
    resumed = make()
    resumed.pass_over({0, 2, 3})
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed)["image"], numbers[5]["image"])
    for data in (plain, without, resumed):
        data.close()


def test_a_spike_sends_the_run_back_without_its_batch(spiking, tmp_path, capsys, monkeypatch):
    assert loop.run(spiking, str(tmp_path / "a")) == loop.DONE
    (event,) = json.loads((tmp_path / "a" / "rollbacks.json").read_text())
    assert (event["step"], event["batch"]) == (8, 7) and event["value"] > event["mean"]
    assert "without batch 7" in capsys.readouterr().out
    found = rows(tmp_path / "a")
    assert sorted(found) == list(range(1, 11))
    assert found[10]["train/rollbacks"] == 1 and found[1]["train/rollbacks"] == 0

    # The same bits as a run that never sees that batch ...
    monkeypatch.setattr(rollback, "read", lambda folder: [event])
    assert loop.run(spiking, str(tmp_path / "b")) == loop.DONE
    other = {step: {**row, "train/rollbacks": 0} for step, row in rows(tmp_path / "b").items()}
    assert other == {step: {**row, "train/rollbacks": 0} for step, row in found.items()}


def test_without_rollbacks_left_a_spike_is_only_told(spiking, tmp_path, capsys):
    config = dataclasses.replace(spiking, train=dataclasses.replace(spiking.train, rollbacks=0))
    assert loop.run(config, str(tmp_path)) == loop.DONE
    assert "stands out of its running mean" in capsys.readouterr().out
    assert not (tmp_path / "rollbacks.json").exists()
    assert rows(tmp_path)[8]["train/spikes"] >= 1


def test_a_list_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "rollbacks.json").write_text("[{")
    with pytest.raises(UserError, match="rollbacks.json cannot be read"):
        rollback.read(tmp_path)
