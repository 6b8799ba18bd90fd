"""Where activations lie: examples over `data` and `fsdp`, heads inside a kernel over `tensor`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")
AMPERE = 8.0  # compute capability: the first NVIDIA GPUs that cuDNN's fused attention runs on


def kernels_of(device: jax.Device) -> str:
    """The platform whose kernels a device runs: "tpu", "cuda", or "" where there are none."""
    if device.platform == "tpu":
        return "tpu"
    # "cuda A.B" is what a GPU of NVIDIA says of itself, AMD's says "rocm", and one that is only
    # compiled for its name.
    named = ("cuda", "NVIDIA")
    is_cuda = device.platform == "gpu" and any(n in device.client.platform_version for n in named)
    return "cuda" if is_cuda and float(device.compute_capability) >= AMPERE else ""


@dataclasses.dataclass(frozen=True)
class Activations:
    """The constraints and kernels that `sdjax.models.placement` asks for, on one mesh."""

    mesh: Mesh
    kernels: str  # the platform whose kernels may be used, see `kernels_of`
    attention: str = "auto"  # the kernel that is wanted, as `model.attention`

    def activation(self, x: jax.Array) -> jax.Array:
        """x [B, ...] -> the same array, split along its batch alone.

        A batch that is not to be split, as the one empty caption, is computed by every device: left
        to the partitioner it has its rows on one, and a sum over all for each reduction.
        """
        spec = P(BATCH) if self._divides(x) else P()
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def summed(
        self, product: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, dy: jax.Array
    ) -> jax.Array:
        """`product(x, dy)`, a sum over the examples of x and dy [B, ...], in float32.

        Left to the partitioner, a product in 16 bits is also added up over the devices in 16 bits.
        Here the devices' parts are rows of an array, so that it adds up those, in 32 bits, once
        after a loop over micro-batches.
        """

        def row(x: jax.Array, dy: jax.Array) -> jax.Array:
            return product(x, dy).astype(jnp.float32)[None]

        if not self._divides(x):
            return row(x, dy)[0]
        rows = jax.shard_map(
            row, mesh=self.mesh, in_specs=(P(BATCH), P(BATCH)), out_specs=P(BATCH), check_vma=False
        )(x, dy)
        return rows.sum(0)

    def _divides(self, x: jax.Array) -> bool:
        return x.shape[0] % math.prod(self.mesh.shape[axis] for axis in BATCH) == 0

    def per_device(self, kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        """`kernel(*arrays)` of arrays [B, L, heads, D], on each device's examples and heads."""
        tensor = self.mesh.shape["tensor"]
        heads = "tensor" if all(x.shape[2] % tensor == 0 for x in arrays) else None
        spec = P(BATCH, None, heads, None)
        return jax.shard_map(
            kernel, mesh=self.mesh, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False
        )(*arrays)
