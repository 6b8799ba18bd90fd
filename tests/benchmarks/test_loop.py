"""benchmarks/loop.py: which steps it takes together, and what it makes of their times."""

import json
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def test_blocks_and_shares(monkeypatch):
    """By a clock that a step moves by 1, the rest of an iteration by 0.5 and a checkpoint by 6."""
    import loop as bench

    now = 0.0
    monkeypatch.setattr(
        bench, "time", types.SimpleNamespace(perf_counter=lambda: now, process_time=lambda: 2 * now)
    )

    class Steps:
        def __call__(self, state, frozen, batch):
            nonlocal now
            now += 1
            return state, {}

    monkeypatch.setattr(bench, "Steps", Steps)
    steps, pairs, interval = 4, 2, 1000
    clock, waits = bench.Clock(steps, pairs), []

    def wait():
        nonlocal now
        now += 100  # off the clock
        waits.append(now)

    clock.checkpoints = types.SimpleNamespace(wait=wait)
    step, state, done = Steps(), {"x": jnp.zeros(2)}, 0
    with pytest.raises(bench.Enough):
        while True:
            clock.before(step, state, {}, {})
            state, _ = step(state, {}, {})
            now += 0.5
            done += 1
            now += 6 * (done % (2 * steps) == 0)
    assert done == steps // 2 + 2 * pairs * steps and len(waits) == 2 * pairs
    assert clock.bare == [(1.0, 2.0)] * 4
    assert clock.loop == [(1.5, 3.0), (3.0, 6.0)] * 2
    assert clock.late == 400
    for which in (0, 1):
        found = bench.overhead(clock, which, interval=interval, steps=steps)
        assert found["each_step"]["blocks"] == [0.5, 0.5]
        assert found["checkpoints"]["median"] == pytest.approx(6 / interval)
        assert found["overhead"] == pytest.approx(0.506)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps=3"], "--steps=3: expected an even number"),
        (["--set", "data.no_such=1"], "--set data.no_such=1"),
        (["--config=nowhere.py"], "--config=nowhere.py is no recipe"),
    ],
)
def test_wrong_options_are_explained(arguments, words, capsys):
    import loop as bench

    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_loop(tiny_config, capsys, tmp_path):
    import loop as bench

    tiny_config.train.log_every = 2
    result = bench.measure(tiny_config, steps=4, pairs=1)
    assert (result["log_every"], result["checkpoint_every"]) == (2, 3)
    for kind in (result["elapsed"], result["processor"]):
        assert len(kind["loop_seconds"]["blocks"]) == len(kind["bare_seconds"]["blocks"]) == 2
        assert all(value > 0 for value in kind["bare_seconds"]["blocks"])
    out = capsys.readouterr().out
    assert "step 8/" in out and "step 12/" not in out  # the log is two steps late
    table = bench.show(json.loads(json.dumps(result)))
    assert f"{result['elapsed']['overhead']:.2%}" in table
