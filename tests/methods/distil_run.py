"""A run of a recipe on virtual devices, as many as the mesh has.

    python tests/methods/distil_run.py CONFIG.json WORKDIR KILL DATA,FSDP

KILL: the process kills itself when it is about to take this step; 0 for never.
"""

import json
import math
import os
import signal
import sys

DEVICES = math.prod(int(size) for size in sys.argv[4].split(","))
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
)


def main(file: str, workdir: str, kill: int, mesh: tuple[int, ...]) -> int:
    from sdjax.config import resolve
    from sdjax.parallel import sharding
    from sdjax.train import loop, program

    sharding.MIN_FSDP_SIZE = 64  # the model is tiny
    c = json.loads(open(file).read())
    c["mesh"].update(data=mesh[0], fsdp=mesh[1])
    step = program.Steps.__call__

    def killed(self, state, frozen, batch):
        if int(state["step"]) + 1 == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, state, frozen, batch)

    program.Steps.__call__ = killed
    return loop.run(resolve(c), workdir)


if __name__ == "__main__":
    sizes = tuple(int(size) for size in sys.argv[4].split(","))
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sizes))
