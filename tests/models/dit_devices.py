"""Run by test_dit_mesh.py in a process with 8 virtual devices: losses and gradients, as JSON.

Prints {network: {mesh: {loss, error, held}}}: the largest error of a gradient in units of the
gradient's scale, against one device; and the share of the parameters on the fullest device.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.models import weights
from sdjax.models.mmdit.network import MMDiT, MMDiTConfig
from sdjax.models.placement import placed
from sdjax.models.t5 import T5Config, T5Encoder
from sdjax.parallel import sharding
from sdjax.parallel.activations import BATCH, Activations
from sdjax.parallel.mesh import MeshConfig, make_mesh

MESHES = [(1, 1, 1), (2, 2, 2)]
sharding.MIN_FSDP_SIZE = 64  # the networks are tiny
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


MMDIT = MMDiTConfig(
    sample_size=16, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
    num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32,
    pooled_projection_dim=20, pos_embed_max_size=12, dual_attention_layers=(0, 1),
    qk_norm="rms_norm",
)  # fmt: skip
T5 = T5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=4)
# Name in a model, class, config, arguments of a call; the first axis of each array is the batch.
NETWORKS = [
    (
        "transformer", MMDiT, MMDIT,
        (normal(8, 8, 12, 4), 100 * rng.random(8).astype(np.float32),
         {"context": normal(8, 5, 24), "pooled": normal(8, 20)}),
    ),
    ("text_encoder_3", T5Encoder, T5, (rng.integers(0, 64, (8, 11)).astype(np.int32),)),
]  # fmt: skip


def run(name, network, config, arrays, sizes):
    """(loss, gradients, share of the parameters on the fullest device) on one mesh."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    graph, shapes = weights.abstract(network, config)
    # New parameters of an MMDiT are zero where it matters.
    draw = np.random.default_rng(1)
    params = {
        path: jax.device_put(
            draw.normal(size=shape.shape).astype(np.float32) * 0.2,
            NamedSharding(mesh, sharding.param_spec(f"{name}.{path}", shape.shape, mesh)),
        )
        for path, shape in shapes.items()
    }
    arrays = jax.device_put(arrays, NamedSharding(mesh, P(BATCH)))

    def loss(params, arrays):
        with placed(Activations(mesh, kernels="")):
            out = weights.merge(graph, params)(*arrays)
        return jnp.mean(jnp.square(out))

    where = {path: value.sharding for path, value in params.items()}
    both = jax.jit(jax.value_and_grad(loss), out_shardings=(NamedSharding(mesh, P()), where))
    value, slopes = both(params, arrays)
    held = sum(value.addressable_shards[0].data.size for value in params.values())
    total = sum(value.size for value in params.values())
    return float(value), {path: np.asarray(slope) for path, slope in slopes.items()}, held / total


def main():
    results = {}
    for name, network, config, arrays in NETWORKS:
        with jax.default_matmul_precision("highest"):
            (_, exact, _), *_ = runs = [run(name, network, config, arrays, m) for m in MESHES]
        results[name] = {
            str(sizes): {
                "loss": value,
                "held": held,
                "error": max(
                    float(
                        abs(slopes[path] - exact[path]).max() / max(abs(exact[path]).max(), 1e-30)
                    )
                    for path in exact
                ),
            }
            for sizes, (value, slopes, held) in zip(MESHES, runs, strict=True)
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
