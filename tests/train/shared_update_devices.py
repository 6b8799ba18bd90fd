"""Run by test_shared_update.py in a process with 8 virtual devices: a tiny step on several meshes.

python shared_update_devices.py FOLDER OUT.json

Everything is the real thing but for the network: shardings, step, optimizer, averages, checkpoints.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.checkpoints.checkpoint import Checkpoints
from sdjax.methods.method import Phase
from sdjax.optim import moments
from sdjax.optim.ema import EMAConfig
from sdjax.optim.optimizers import OptimConfig, make_optimizer
from sdjax.parallel import batches, sharding
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.train.state import Optimization, init_state
from sdjax.train.step import make_train_step
from sdjax.train.weight_sets import weight_sets

STEPS = 5
sharding.MIN_FSDP_SIZE = moments.MIN_SIZE = 64
SHAPES = {"m.a.kernel": (16, 64), "m.to_q.kernel": (64, 32), "m.b.bias": (32,)}
EMA = EMAConfig(profiles=("0.9",))
RUNS = {
    "one": MeshConfig(1),
    "shared": MeshConfig(8, shard_optimizer=True),
    "apart": MeshConfig(8),
    "all": MeshConfig(2, 2, 2, shard_optimizer=True),
    "slices": MeshConfig(4, 2, slices=2, shard_optimizer=True),
    "one 8bit": MeshConfig(1),
    "shared 8bit": MeshConfig(8, shard_optimizer=True),
    "all 8bit": MeshConfig(2, 2, 2, shard_optimizer=True),
}
RESTORED = {"shared": ("one", "apart", "all", "slices"), "shared 8bit": ("one 8bit", "all 8bit")}


def loss(params, frozen, averages, batch, draw):
    hidden = jnp.tanh(batch["x"] @ params["m.a.kernel"])
    out = hidden @ params["m.to_q.kernel"] + params["m.b.bias"]
    per_example = jnp.sum(jnp.square(out - 1), -1)
    return per_example, {"loss": per_example}


def build(name):
    """The mesh of a run, its abstract state with shardings, its first state and its step."""
    config = RUNS[name]
    size = 1 if config.data == 1 and config.fsdp == 1 else 8
    mesh = make_mesh(config, jax.devices()[:size])
    abstract = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in SHAPES.items()}
    kept = "8bit" if name.endswith("8bit") else "float32"
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-3, moments=kept), 100, abstract)
    phase = Phase("main", loss, lambda path: True)
    optimizations = (Optimization(phase, optimizer, frozenset(SHAPES)),)
    fresh = functools.partial(init_state, optimizations=optimizations, ema=EMA)
    shapes = jax.eval_shape(fresh, abstract)
    where, update = sharding.train_shardings(shapes, abstract, mesh, config)
    step = make_train_step(
        optimizations, positions=np.arange(32, dtype=np.int32), seed=0, accumulation=2,
        buckets=1, num_timesteps=10,
        spread=update and functools.partial(jax.lax.with_sharding_constraint, shardings=update),
    )  # fmt: skip
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(step, donate_argnums=0, out_shardings=(where, whole))
    rng = np.random.default_rng(0)
    drawn = {p: rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}
    state = jax.jit(fresh, out_shardings=where)(drawn)
    return mesh, sharding.placed(shapes, where), state, step


def train(name, folder):
    mesh, abstract, state, step = build(name)
    losses = []
    for k in range(STEPS):
        x = np.random.default_rng(k).normal(size=(32, 16)).astype(np.float32)
        batch = batches.global_batch({"x": x}, mesh)
        if k == STEPS - 1:
            batch = {"x": batch["x"] * jnp.nan} if name == "shared" else batch
        kept = jax.tree.map(np.asarray, state) if k == STEPS - 1 else None
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    if name == "shared":  # a step that is not finite changes only counters; the last one is redone
        for part in ("params", "opt_state", "ema"):
            jax.tree.map(np.testing.assert_array_equal, state[part], kept[part])
        state["step"], state["health"] = kept["step"], jax.tree.map(jnp.zeros_like, state["health"])
        state = jax.device_put(state, jax.tree.map(lambda a: a.sharding, abstract))
        state, metrics = step(state, {}, batches.global_batch({"x": x}, mesh))
        losses[-1] = float(metrics["loss"])
    same = jax.tree.map(lambda x, y: x.sharding == y.sharding, state, abstract)
    assert all(jax.tree.leaves(same)), same
    average = weight_sets(state)["0.9"]()
    assert all(average[p].sharding == state["params"][p].sharding for p in SHAPES)
    for other in RESTORED.get(name, ()):
        with Checkpoints(folder / name) as checkpoints:
            checkpoints.save(STEPS, state, {}, {}) if other == RESTORED[name][0] else None
            checkpoints.wait()
            _, there, _, _ = checkpoints.restore(build(other)[1])
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(there), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    held = {
        part: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state[part]))
        for part in ("params", "opt_state", "ema")
    }
    return {
        "losses": losses,
        "held": held,
        "norms": [float(metrics["grad_norm"]), float(metrics["update_norm"])],
        "params": {p: np.asarray(v).tolist() for p, v in state["params"].items()},
        "average": {p: np.asarray(v).tolist() for p, v in average.items()},
    }


if __name__ == "__main__":
    from pathlib import Path

    results = {name: train(name, Path(sys.argv[1])) for name in RUNS}
    Path(sys.argv[2]).write_text(json.dumps(results))
