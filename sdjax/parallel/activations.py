"""Where activations lie: examples over `data` and `fsdp`, heads inside a kernel over `tensor`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")
AMPERE = 8.0  # compute capability: the first NVIDIA GPUs that cuDNN's fused attention runs on


def kernels_of(device: jax.Device) -> str:
    """The platform whose kernels a device runs: "tpu", "cuda", or "" where there are none."""
    if device.platform == "tpu":
        return "tpu"
    # "cuda A.B" is what a GPU of NVIDIA says of itself; AMD's says "rocm".
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
    return "cuda" if is_cuda and float(device.compute_capability) >= AMPERE else ""


@dataclasses.dataclass(frozen=True)
class Activations:
    """What `sdjax.models.placement` asks for, on this mesh."""

    mesh: Mesh
    kernels: str  # the platform whose kernels may be used, see `kernels_of`
    attention: str = "auto"  # the kernel that is wanted, as `model.attention`

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
