"""benchmarks/sample.py: the pictures timed are those of torch's pipeline."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def test_draws_what_the_torch_pipeline_draws(pipeline_folder, tmp_path, monkeypatch, capsys):
    import sample as bench

    kept, whole = [], bench.our_drawer

    def once(*args):
        kept.append(kept[0] if kept else whole(*args))
        return kept[0]

    monkeypatch.setattr(bench, "our_drawer", once)
    monkeypatch.setattr(bench, "cores", lambda: 1)
    arguments = [f"--model={pipeline_folder}", "--torch", "--steps=3", "--batches=2"]
    arguments += ["--blocks=2", "--seconds=0.01"]
    bench.main([*arguments, f"--json={tmp_path / 'a.json'}"])
    result = json.loads((tmp_path / "a.json").read_text())
    (row,) = result["rows"]
    pictures = kept[0][0]()
    assert pictures.shape == (2, 16, 16, 3) and pictures.std() > 5  # not one colour
    assert result["side"] == 16 and row["batch"] == 2 and row["compile_seconds"] > 0
    assert row["difference"] < bench.TOLERANCE
    ratio = [t / o for t, o in zip(*(row["seconds"][n]["blocks"] for n in
                                     (bench.THEIRS, bench.OURS)), strict=True)]  # fmt: skip
    assert row["over_sdjax"]["blocks"] == pytest.approx(ratio)
    median = row["seconds"][bench.OURS]["median"]
    assert f"| {2 / median:.3g} |" in capsys.readouterr().out  # pictures a second

    monkeypatch.setattr(bench, "their_drawer", lambda *args: lambda: 1 - np.float32(pictures) / 255)
    with pytest.raises(SystemExit, match="pictures of a batch of 2 differ by"):
        bench.main([*arguments, f"--json={tmp_path / 'b.json'}"])
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--torch"], "--torch reads a diffusers folder"),
        (["--batches=1,x"], "expected numbers"),
        (["--batches=0,1"], "--batches=0"),
        (["--steps=0"], "--steps=0"),
    ],
)
def test_wrong_options_are_explained(arguments, words, capsys):
    import sample as bench

    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_draws_with_random_weights(tmp_path):
    import sample as bench

    file = tmp_path / "result.json"
    bench.main(["--size=tiny", "--steps=2", "--batches=1", "--blocks=1", f"--json={file}"])
    result = json.loads(file.read_text())
    assert result["side"] == 128 and [row["batch"] for row in result["rows"]] == [1]
