"""Runs of the toy GAN on virtual devices, as many as the mesh has.

    python tests/methods/toy_gan_run.py FOLDER NAME STEPS KILL DATA,FSDP ACCUMULATION

KILL: the process kills itself when it is about to take this step; 0 for never.
"""

import importlib.util
import math
import os
import signal
import sys
from pathlib import Path

DEVICES = math.prod(int(size) for size in sys.argv[5].split(","))
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
)

LINE = '"autoencoder": AUTOENCODER'


def with_one_line_more() -> None:
    """Load sdjax.methods.registry as it would be with the toy in it."""
    spec = importlib.util.find_spec("sdjax.methods.registry")
    source = Path(spec.origin).read_text()
    assert source.count(LINE) == 1
    source = source.replace(LINE, f'{LINE}, "toy_gan": TOY_GAN')
    source = source.replace(
        "from sdjax.methods.denoise",
        "from tests.methods.toy_gan import TOY_GAN\nfrom sdjax.methods.denoise",
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["sdjax.methods.registry"] = module
    exec(compile(source, spec.origin, "exec"), module.__dict__)


def main(folder: Path, name: str, steps: int, kill: int, mesh: tuple, accumulation: int) -> int:
    with_one_line_more()
    from sdjax.config import default, resolve
    from sdjax.train import loop, program

    c = default(method="toy_gan")
    c.data.update(data_dir=str(folder / "data"), resolution=16, batch_size=16, shapes_train=48,
                  shapes_test=8, threads=1)  # fmt: skip
    c.optim.learning_rate = 1e-2
    c.ema.profiles = ("0.9",)
    c.train.update(steps=6, log_every=1, checkpoint_every=1, sample_every=0, export=False,
                   report=False, accumulation=accumulation)  # fmt: skip
    c.validation.examples = 0
    c.sample.count = 2
    c.mesh.update(data=mesh[0], fsdp=mesh[1])
    taken, step = [], program.Steps.__call__

    def counted(self, state, frozen, batch):
        taken.append(1)
        if int(state["step"]) + 1 == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, state, frozen, batch)

    program.Steps.__call__ = counted
    return loop.run(resolve(c), str(folder / name))


if __name__ == "__main__":
    folder, name, steps, kill, mesh, accumulation = sys.argv[1:]
    sizes = tuple(int(size) for size in mesh.split(","))
    sys.exit(main(Path(folder), name, int(steps), int(kill), sizes, int(accumulation)))
