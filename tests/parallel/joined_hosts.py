"""Run by test_frozen_host.py, once for each process: join, take steps together, stop on SIGTERM.

python joined_hosts.py PROCESS PORT
"""

import sys

from sdjax.system.interrupts import install

if __name__ == "__main__":
    install("again", terminated=75)

import numpy as np
from jax.experimental import multihost_utils

from sdjax.parallel import distributed, hosts
from sdjax.train.preemption import StopSignal

HEARTBEAT_TIMEOUT = 6.0


def steps():
    with StopSignal() as stop:
        for step in range(1, 100_000):
            multihost_utils.process_allgather(np.ones(3))
            print(f"step {step}", flush=True)
            if stop.requested(step):
                return 75
    return 0


if __name__ == "__main__":
    process, port = sys.argv[1:]
    distributed.join(
        f"127.0.0.1:{port}", 2, int(process), timeout=120, heartbeat_timeout=HEARTBEAT_TIMEOUT
    )
    sys.exit(hosts.together(steps))
