"""benchmarks/convolutions.py: both libraries compute the same, and a difference ends it."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def test_both_are_timed_where_they_agree(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    import convolutions

    file = tmp_path / "result.json"
    monkeypatch.setattr(convolutions, "SHAPES", ((6, 4, 8),))
    arguments = ["--batch=1", "--blocks=2", "--seconds=0.01", f"--json={file}"]
    convolutions.main(arguments)
    rows = json.loads(file.read_text())["rows"]
    assert [row["part"] for row in rows] == list(convolutions.PARTS)
    assert all(row["difference"] < 1e-6 and min(row["gflops"].values()) > 0 for row in rows)
    assert "| 6 x 6, 4 to 8 | forward |" in capsys.readouterr().out
    monkeypatch.setattr(convolutions, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="forward: they differ by"):
        convolutions.main(arguments)
