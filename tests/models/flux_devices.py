"""Run by test_flux_mesh.py in a process with 8 virtual devices: FLUX's gradients on two meshes.

    python flux_devices.py

Prints JSON: the largest difference of the output and of each gradient between the meshes, in units
of the array's largest value; which arrays `tensor` splits; and the shapes that devices exchange.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.models import weights
from sdjax.models.flux.network import Flux, FluxConfig
from sdjax.models.placement import placed
from sdjax.parallel import sharding
from sdjax.parallel.activations import BATCH, Activations
from sdjax.parallel.mesh import MeshConfig, make_mesh

MESHES = ((1, 1, 1), (2, 2, 2))
EXCHANGES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
sharding.MIN_FSDP_SIZE = 64  # the model is tiny
CONFIG = FluxConfig(
    in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
    axes_dims_rope=(4, 6, 6),
)  # fmt: skip


def drawn(graph_shapes):
    """Parameters with nothing at zero or one."""
    rng = np.random.default_rng(0)
    return {p: 0.2 * rng.normal(size=a.shape).astype(np.float32) for p, a in graph_shapes.items()}


def run(sizes, graph, params, batch):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    specs = {p: sharding.param_spec(f"transformer.{p}", v.shape, mesh) for p, v in params.items()}
    own = {p: NamedSharding(mesh, spec) for p, spec in specs.items()}

    def loss(params, xt, timesteps, context):
        with placed(Activations(mesh, "")):
            out = weights.merge(graph, params)(xt, timesteps, context)
        return jnp.square(out).mean(), out

    step = jax.jit(
        jax.grad(loss, has_aux=True),
        in_shardings=(own, *[NamedSharding(mesh, P(BATCH))] * 3),
        out_shardings=(own, None),
    )
    compiled = step.lower(params, *batch).compile()
    placed_batch = jax.device_put(batch, NamedSharding(mesh, P(BATCH)))
    gradients, out = compiled(jax.device_put(params, own), *placed_batch)
    kinds = re.findall(rf"= (\S+|\([^=]*\)) (?:{EXCHANGES})\(", compiled.as_text())
    shapes = sorted({shape for kind in kinds for shape in re.findall(r"\[([\d,]*)\]", kind)})
    split = sorted(path for path, spec in specs.items() if "tensor" in spec)
    return jax.device_get((gradients, out)), split, shapes


def main():
    graph, shapes = weights.abstract(Flux, CONFIG, remat="block")
    params, rng = drawn(shapes), np.random.default_rng(1)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    context = {"context": normal(4, 5, 24), "pooled": normal(4, 20), "guidance": normal(4)}
    batch = (normal(4, 4, 6, 4), 1000 * rng.uniform(size=4).astype(np.float32), context)
    (one, _, _), (many, split, shapes_moved) = (
        run(sizes, graph, params, batch) for sizes in MESHES
    )
    error = lambda a, b: float(np.abs(a - b).max() / np.abs(a).max())  # noqa: E731
    errors = {path: error(one[0][path], many[0][path]) for path in params}
    print(json.dumps({"output": error(one[1], many[1]), "gradients": errors, "split": split,
                      "exchanged": shapes_moved}))  # fmt: skip


if __name__ == "__main__":
    main()
