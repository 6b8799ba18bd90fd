"""Where activations lie: examples over `data` and `fsdp`, heads inside a kernel over `tensor`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Activations:
    """What `sdjax.models.placement` asks for, on this mesh."""

    mesh: Mesh
    kernels: str  # the platform whose kernels may be used, as "tpu"; "" for none

    def activation(self, x: jax.Array) -> jax.Array:
        """x [B, ...] -> the same array, split along its batch alone."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(BATCH)))

    def per_device(self, kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        """`kernel(*arrays)` of arrays [B, L, heads, D], on each device's examples and heads."""
        tensor = self.mesh.shape["tensor"]
        heads = "tensor" if all(x.shape[2] % tensor == 0 for x in arrays) else None
        spec = P(BATCH, None, heads, None)
        return jax.shard_map(
            kernel, mesh=self.mesh, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False
        )(*arrays)
