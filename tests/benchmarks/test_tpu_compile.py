"""The committed plans and what benchmarks/tpu_compile.py prints of them; nothing is compiled."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import tpu_compile  # noqa: E402


def test_every_committed_plan_is_of_a_case_and_says_how_it_was_made():
    cases = {case.name: case for case in tpu_compile.CASES}
    files = list(tpu_compile.PLANS.glob("*.json"))
    assert files
    for file in files:
        plan, case = json.loads(file.read_text()), cases[file.stem]
        assert plan["flags"][:2] == case.flags[:2]
        assert plan["chips"] == math.prod(plan["mesh"].values()) == case.chips
        assert plan["batch"]["global"] == case.rows * case.chips
        assert " ".join(plan["flags"][2:]) in tpu_compile.row(plan, case)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_new_plan_is_kept_with_its_flags_beside_the_last(code, tmp_path, monkeypatch, capsys):
    case = tpu_compile.CASES[0]
    before = json.loads(next(tpu_compile.PLANS.glob("*v5p-8.json")).read_text())
    after = before | {"time": before["time"] | {"step": before["time"]["step"] / 2}, "flags": None}
    file = tmp_path / f"{case.name}.json"
    file.write_text(json.dumps(before))

    def plan(command, check):
        assert command[-1] == f"--output={file}" and set(case.flags) < set(command)
        assert "--quick" in command
        if code != 2:  # 0 and 1 are answers: it fits, or it does not
            file.write_text(json.dumps(after))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(tpu_compile, "PLANS", tmp_path)
    monkeypatch.setattr(subprocess, "run", plan)
    words = [case.recipe, f"{case.chip}-{case.chips}", "--quick"]
    assert tpu_compile.main(words) == (code == 2)
    printed = capsys.readouterr().out
    if code == 2:
        assert json.loads(file.read_text()) == before
    else:
        assert json.loads(file.read_text()) == after | {"flags": case.flags}
        assert "| step, ms |" in printed and "| 0.500 |" in printed


@pytest.mark.parametrize("option, code", [("--help", 0), ("-h", 0), ("--quik", 2)])
def test_help_and_a_misspelt_option_compile_nothing(option, code, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", None)
    assert tpu_compile.main(["sd15", option]) == code
    assert "--quick" in capsys.readouterr().out
