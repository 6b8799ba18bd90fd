"""benchmarks/muon.py: both libraries make the same update, and a difference ends it."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def test_both_are_timed_where_they_agree(tmp_path, monkeypatch, capsys):
    import muon

    shapes = {"a.kernel": (3, 3, 4, 8), "b.kernel": (8, 8)}
    rng = np.random.default_rng(0)
    grads = {p: jnp.asarray(rng.standard_normal(s, np.float32)) for p, s in shapes.items()}
    monkeypatch.setattr(muon, "matrices", lambda config: grads)
    file = tmp_path / "result.json"
    recipe = Path(__file__).parents[2] / "configs/base.py"
    arguments = [f"--config={recipe}", "--blocks=2", "--seconds=0.01", f"--json={file}"]
    muon.main(arguments)
    found = json.loads(file.read_text())
    assert found["matrices"] == 2 and found["parameters"] == 9 * 4 * 8 + 64
    assert min(one["median"] for one in found["update"].values()) > 0
    assert "ours over optax's" in capsys.readouterr().out
    monkeypatch.setattr(muon, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="the updates differ by"):
        muon.main(arguments)
