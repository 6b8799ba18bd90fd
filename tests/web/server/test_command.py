"""The verb as a process: it listens, answers, and ends as it is told."""

import os
import signal
import subprocess
import sys

import httpx
import pytest


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_serves_until_a_signal_comes(pipeline_folder, number, code):
    command = [sys.executable, "-m", "sdjax.serve", f"--model={pipeline_folder}", "--port=0"]
    process = subprocess.Popen(
        [*command, "--no-warm_up"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "is served at" in line:
            break
    address = line.split(" at ")[1].split()[0]
    assert httpx.get(f"{address}/healthz").text == "ok\n", lines
    process.send_signal(number)
    assert "the same command serves again" in process.communicate(timeout=60)[0]
    assert process.returncode == code
