"""Run by test_frozen_int8.py, on 8 virtual devices: steps beside an int8 base on meshes.

python int8_devices.py OUT.json
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from sdjax.config import resolve
from sdjax.config_model import blank_method
from sdjax.parallel import sharding
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.train import program
from sdjax.train.frozen import placed
from tests.methods.test_frozen_int8 import as_loaded, of_adapters, random

sharding.MIN_FSDP_SIZE = 64
MESHES = {"8 x 1 x 1": (8, 1, 1), "2 x 4 x 1": (2, 4, 1), "2 x 2 x 2": (2, 2, 2)}


def run(config, mesh):
    """The losses of two steps, and how many of the int8 kernels are split over devices."""
    method = blank_method(config)
    built = program.build(config, method, make_mesh(mesh))
    rng = np.random.default_rng(0)
    trained = random(built.split.trained, rng)
    frozen = placed(as_loaded(built.split.frozen, rng), built.frozen)
    batch = {
        name: jax.device_put(value, built.batch[name].sharding)
        for name, value in random(built.batch, rng).items()
    }
    state = jax.device_put(built.fresh(trained), built.state_shardings)
    losses = []
    for _ in range(2):
        state, metrics = built.step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    codes = [v for v in frozen.values() if v.dtype == np.int8]
    return losses, sum(not v.sharding.is_fully_replicated for v in codes), len(codes)


if __name__ == "__main__":
    config = of_adapters("flux")
    config.data.batch_size = 8
    # Adam would turn a gradient of rounding into a whole step.
    config.optim.update(name="sgd", momentum=0.0, learning_rate=1e-2)
    resolved = resolve(config)
    found = {
        name: run(dataclasses.replace(resolved, mesh=MeshConfig(*axes)), MeshConfig(*axes))
        for name, axes in MESHES.items()
    }
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
