"""Two real processes, of which one stands still, as a machine that its cloud has taken away."""

import os
import subprocess
import sys
from pathlib import Path

from tests.hosts import Host, free_port

SCRIPT = Path(__file__).parent / "joined_hosts.py"


def start(folder, port, process):
    log = folder / f"{process}.log"
    with log.open("wb") as out, log.with_suffix(".err").open("wb") as err:
        started = subprocess.Popen(
            [sys.executable, SCRIPT, str(process), str(port)],
            stdout=out, stderr=err, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
    return Host(started, log)


def test_host_told_to_stop_while_another_is_frozen_ends_and_names_it(tmp_path):
    """JAX's own preemption service would stop Python's threads, and the heartbeats with them."""
    port = free_port()
    hosts = [start(tmp_path, port, process) for process in range(2)]
    try:
        hosts[0].wait_for("step 3\n")
        hosts[1].send("STOP")
        hosts[0].send("TERM")
        assert hosts[0].wait(120) == 76, hosts[0].err
        (line,) = [line for line in hosts[0].err.splitlines() if "is lost" in line]
        assert line.startswith("[host 0] stopped: host 1 of 2 is lost: it fell silent")
    finally:
        for host in hosts:
            host.process.kill()
            host.process.wait()
