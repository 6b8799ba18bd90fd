"""Runs of a small autoencoder and its critic on virtual devices, as many as the mesh has.

    python tests/methods/autoencoder_run.py FOLDER NAME KILL DATA,FSDP

KILL: the process kills itself when it is about to take this step; 0 for never.
"""

import math
import os
import signal
import sys
from pathlib import Path

DEVICES = math.prod(int(size) for size in sys.argv[4].split(","))
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
)


def main(folder: Path, name: str, kill: int, mesh: tuple[int, ...]) -> int:
    from sdjax.config import default, resolve
    from sdjax.train import loop, program
    from tests.conftest import small_autoencoder

    c = default(method="autoencoder")
    small_autoencoder(c)
    with c.unlocked():
        c.method.update(
            reduction="sum", critic_weight=0.5, critic_width=4, critic_layers=1, critic_start=1,
            critic_loss_start=2, learn_logvar=True,
        )  # fmt: skip
    c.data.update(data_dir=str(folder / "data"), resolution=16, batch_size=16, shapes_train=48,
                  shapes_test=8, threads=1)  # fmt: skip
    c.optim.learning_rate = 1e-3
    c.ema.profiles = ("0.9",)
    c.train.update(steps=6, log_every=1, checkpoint_every=1, keep_last=6, sample_every=0,
                   export=False, report=False)  # fmt: skip
    c.validation.examples = 0
    c.sample.count = 2
    c.mesh.update(data=mesh[0], fsdp=mesh[1])
    step = program.Steps.__call__

    def counted(self, state, frozen, batch):
        if int(state["step"]) + 1 == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, state, frozen, batch)

    program.Steps.__call__ = counted
    return loop.run(resolve(c), str(folder / name))


if __name__ == "__main__":
    folder, name, kill, mesh = sys.argv[1:]
    sys.exit(main(Path(folder), name, int(kill), tuple(int(size) for size in mesh.split(","))))
