"""Run by test_mesh.py in a process with 8 virtual devices: 5 steps on each mesh, as JSON.

    python eight_devices.py FOLDER

FOLDER has runs.json, {name: {"config": ..., "meshes": ...}}, and is given NAME.npz and NAME.json of
each: one process for all. That called "whole" is validated, and what else has to hold is tried.

What is compared is the step as the loop runs it: compiled ahead of time from abstract arrays, with
batches from the pipeline, and the state placed by the rules.
"""

import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.checkpoints.assemble import assemble
from sdjax.config import resolve
from sdjax.config_model import method_of_run
from sdjax.data.pipeline import make_iterator
from sdjax.families.conditioning import make_conditioner
from sdjax.families.registry import model_of
from sdjax.models.attention import attention
from sdjax.models.kernels.flash import flash_attention
from sdjax.models.kernels.short_keys import short_attention
from sdjax.models.placement import placed
from sdjax.parallel import batches, sharding
from sdjax.parallel.activations import Activations
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.planning import hlo
from sdjax.train import program
from sdjax.train.validation import Validator

STEPS = 5
VALIDATED = [(1, 1, 1), (8, 1, 1), (2, 2, 2)]
sharding.MIN_FSDP_SIZE = 64  # the model is tiny

compiled_modules = 0


def count_compilations(event: str, *args, **kwargs) -> None:
    global compiled_modules
    compiled_modules += event == "/jax/core/compile/backend_compile_duration"


def bytes_per_device(tree) -> list[int]:
    totals = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            totals[shard.device] += shard.data.nbytes
    return [size for size in totals.values() if size]


def left_whole(tree, ways: int) -> list[str]:
    """Arrays worth splitting of which every device has all, or more than its part of `fsdp`."""
    return [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf.size >= sharding.MIN_FSDP_SIZE
        and leaf.addressable_shards[0].data.size * ways > leaf.size
    ]


def run(config, assembled, sizes, validated):
    count = int(np.prod(sizes))
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:count])
    method = method_of_run(config, assembled.tokenizers)
    built = program.build(config, method, mesh)
    step = program.compile_step(built, config).step
    place = lambda host, abstract: jax.device_put(host, abstract.sharding)  # noqa: E731
    key = jax.random.key(config.seed)
    # Drawn once, on one device: what is compared is the step. (The draw is compared below.)
    drawn = {p: v for p, v in run.drawn.items() if p in built.split.trained}
    every = {**run.drawn, **assembled.params}
    state = jax.jit(built.fresh, out_shardings=built.state_shardings)(
        {p: place(v, built.state["params"][p]) for p, v in drawn.items()}
    )
    frozen = {p: place(np.asarray(every[p], np.float32), built.frozen[p]) for p in built.frozen}
    valid = None
    if sizes in validated:
        params = {**state["params"], **frozen}
        validator = Validator(config, method, assembled.tokenizers, mesh, split="train", count=7)
        valid = validator.losses(params).tolist()
    sizes_of = {name: bytes_per_device(state[name]) for name in ("params", "opt_state", "ema")}
    whole = left_whole([state["params"], state["opt_state"], state["ema"]], sizes[1])
    redrawn = jax.jit(
        lambda k: {p: v for p, v in method.init(k).items() if p in drawn},
        out_shardings={p: built.state["params"][p].sharding for p in drawn},
    )(key) if sizes == (2, 2, 2) else drawn  # fmt: skip
    data = make_iterator(config.data, assembled.tokenizers, split="train", seed=config.seed)
    losses, after_first = [], None
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batches.global_batch(next(data), mesh))
        losses.append(float(metrics["loss"]))
        after_first = compiled_modules if after_first is None else after_first
    data.close()
    flat = {p: np.asarray(v) for p, v in state["params"].items()}
    return {
        "losses": losses,
        "grad_norm": float(metrics["grad_norm"]),
        "buckets": np.asarray(metrics["buckets"]["count"]).tolist(),
        "bytes": sizes_of,
        "whole": whole,
        "validation": valid,
        "recompiled": compiled_modules - after_first,
        "redrawn": all(
            np.allclose(np.asarray(redrawn[p]), drawn[p], rtol=1e-6, atol=1e-7) for p in drawn
        ),
    }, flat


def kernel_error() -> float:
    """Of attention by the kernels on each device's examples and heads, gradients included."""
    placement = Activations(make_mesh(MeshConfig(2, 2, 2)), kernels="tpu")
    kernels = [functools.partial(f, interpret=True) for f in (flash_attention, short_attention)]
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (jax.random.normal(key, (4, 128, 2, 8)) for key in keys)

    def both(function):
        out, pullback = jax.vjp(function, q, k, v)
        return out, *pullback(cotangent)

    exact = both(attention)
    ours = jax.jit(lambda: [both(lambda *x, f=f: placement.per_device(f, *x)) for f in kernels])()
    return max(float(abs(a - b).max()) for one in ours for a, b in zip(one, exact, strict=True))


def summed_error() -> float:
    """Of a sum over 8 devices' examples in 32 bits, of parts that are rounded to 16.

    8 + 9/128 is not to be had in bfloat16, whose steps from 8 on are 1/16.
    """
    placement = Activations(make_mesh(MeshConfig(4, 2, 1)), kernels="")
    x = jnp.full((8, 1), 1 + 2**-7, jnp.bfloat16).at[0].add(2**-7)
    found = jax.jit(lambda x: placement.summed(lambda x, y: x.T @ y, x, jnp.ones_like(x)))(x)
    assert found.dtype == jnp.float32
    return abs(float(found[0, 0]) - (8 + 9 / 128))


def exchanges_for_one_caption(config, tokenizers) -> list[str]:
    """Collectives of the text encoder on a single caption, which 8 devices cannot share."""
    mesh = make_mesh(MeshConfig(8, 1, 1))
    everywhere = NamedSharding(mesh, P())
    conditioner = make_conditioner(model_of(config.model), tokenizers)
    tokens = {name: null[None] for name, null in conditioner.null.items()}

    def embed(params):
        with placed(Activations(mesh, kernels="")):
            return conditioner.embed(params, tokens)

    compiled = (
        jax.jit(embed, in_shardings=everywhere).lower(conditioner.networks.abstract).compile()
    )
    return [one.kind for one in hlo.read(compiled.as_text(), 8).collectives]


def compare(folder, name, config, meshes):
    """Run a configuration on each mesh, and write what came of it."""
    assembled = assemble(resolve(config))
    config = assembled.config
    method = method_of_run(config, assembled.tokenizers)
    run.drawn = {p: np.asarray(v) for p, v in jax.jit(method.init)(jax.random.key(0)).items()}
    results, params = [], {}
    for sizes in map(tuple, meshes):
        begin = time.monotonic()
        result, flat = run(config, assembled, sizes, VALIDATED if name == "whole" else ())
        results.append({"mesh": sizes, **result})
        params |= {f"{sizes}:{path}": value for path, value in flat.items()}
        print(f"{name} {sizes}: {time.monotonic() - begin:.1f} s", file=sys.stderr)
    np.savez(folder / f"{name}.npz", **params)
    output = {"runs": results}
    if name == "whole":
        output |= {
            "kernel_error": kernel_error(),
            "summed_error": summed_error(),
            "exchanges": exchanges_for_one_caption(config, assembled.tokenizers),
        }
    (folder / f"{name}.json").write_text(json.dumps(output))


def main():
    jax.monitoring.register_event_duration_secs_listener(count_compilations)
    folder = Path(sys.argv[1])
    for name, given in json.loads((folder / "runs.json").read_text()).items():
        compare(folder, name, **given)


if __name__ == "__main__":
    main()
