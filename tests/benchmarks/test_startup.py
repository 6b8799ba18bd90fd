"""benchmarks/startup.py: what it makes of a run's output, and (slow) real runs."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
LINES = """
import sys, time
time.sleep(0.3)
print("text_to_image in DIR, from step 0")
print("step compiled in 0.2 s, 0.61 GFLOP per image", flush=True)
time.sleep(0.1)
print("data: captioned_shapes, 200 examples", flush=True)
time.sleep(0.2)
print("step 1/1  loss 1.0", flush=True)
time.sleep(60)
"""


def test_phases_of_a_run():
    import startup

    found = startup.first_step([sys.executable, "-c", LINES])
    before, compilation, data, step = (found[name] for name in startup.PHASES)
    assert compilation == 0.2
    # A busy machine reads a line late, and then the next phase is short: what is sure are the sums.
    assert before >= 0.1 and before + data >= 0.2 and before + data + step >= 0.4
    assert found["total"] == pytest.approx(before + compilation + data + step)
    assert found["total"] < 60  # it was ended
    assert 0 < found[startup.WORKED] < 5  # it slept


@pytest.mark.parametrize(("code", "words"), [
    ("import sys; print('step compiled in 1.0 s'); sys.exit('no data here')", "no data here"),
    ("import time; time.sleep(60)", "at most 1 s were given"),
])  # fmt: skip
def test_a_run_without_a_first_step(code, words):
    import startup

    with pytest.raises(SystemExit, match=words):
        startup.first_step([sys.executable, "-c", code], timeout=1.0 if "sleep" in code else 60.0)


@pytest.mark.slow
def test_real_runs(tmp_path):
    import startup

    file = tmp_path / "result.json"
    changes = ["data.shapes_train=40", "data.shapes_test=8", "data.batch_size=8"]
    startup.main([*(f"--set={c}" for c in changes), "--repeats=1", f"--json={file}"])
    result = json.loads(file.read_text())
    fresh, cold, warm = ({n: r["median"] for n, r in result[k].items()} for k in startup.KINDS)
    for run in (fresh, cold, warm):
        assert run["total"] == pytest.approx(sum(run[name] for name in startup.PHASES))
        assert run[startup.WORKED] > 1
    assert warm["compilation"] < cold["compilation"]  # from the cache
