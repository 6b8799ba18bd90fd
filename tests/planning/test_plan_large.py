"""Plans of the largest models, which a small machine can make."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--quick", "--topology=v5p:2x2x2", "--config.mesh.fsdp=8", "--config.data.batch_size=8",
    "--config.data.name=encoded", "--config.data.text_embeddings=True",
)  # fmt: skip


@pytest.mark.slow  # 20 s of a core
def test_flux_is_planned_by_two_cores_in_minutes(tmp_path):
    pytest.importorskip("libtpu")
    config = f"--config={ROOT / 'configs' / 'flux_dev_finetune.py'}"
    out = [f"--cache={tmp_path}", f"--output={tmp_path / 'plan.json'}"]
    command = [sys.executable, "-m", "sdjax.plan", config, *FLAGS, *out]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, (tmp_path / "log").read_text()[-2000:]
    assert usage.ru_utime + usage.ru_stime < 2 * 15 * 60 and usage.ru_maxrss < 20 * 10**6  # kB
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["batch"]["per_chip"] == 1
    # 11.9 billion float32 parameters by eight; flash attention of one image a chip counts.
    assert plan["memory"]["classes"]["parameters"] == pytest.approx(
        4 * 11_901_408_320 / 8, rel=0.01
    )
    assert {"splash_mha_fwd_residuals", "splash_mha_dkv_no_residuals"} <= {
        kernel["name"] for kernel in plan["kernels"] if kernel["flops"]
    }
