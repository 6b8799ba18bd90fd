"""NVIDIA GPUs that this machine lacks, as XLA's compiler needs them described.

The compiler comes with JAX's plugin for CUDA. It needs no GPU, driver or CUDA library, only a
`GpuTargetConfigProto` (xla/stream_executor/device_description.proto), which a GPU would otherwise
fill in itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

from sdjax.errors import UserError
from sdjax.parallel.chips import Chip

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
CUDNN = (9, 10)  # version that programs are compiled for
CUDA = (12, 8)  # version that programs are compiled for


@dataclasses.dataclass(frozen=True)
class Target:
    """One GPU, as its driver describes it. Sizes are bytes of a multiprocessor unless noted.

    accelerated: whether it has instructions of its architecture alone (`sm_90a`).
    """

    kind: str  # `jax.Device.device_kind`
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    fpus: int
    clock: float  # GHz
    l2: int  # of the GPU
    threads: int = 2048
    shared: int = 228 * 2**10
    accelerated: bool = True


# As in xla/backends/gpu/target_config/specs; GH200, L40S and L4 by NVIDIA's data sheets and the
# CUDA C++ programming guide (technical specifications per compute capability).
_MIB = 2**20
_AMPERE: dict[str, Any] = {"fpus": 64, "shared": 164 * 2**10, "accelerated": False}
_ADA: dict[str, Any] = {
    "fpus": 128, "threads": 1536, "shared": 100 * 2**10, "accelerated": False
}  # fmt: skip
TARGETS = {
    "b200": Target("NVIDIA B200", (10, 0), 148, 128, 1.965, 132644864),
    "gh200": Target("NVIDIA GH200 480GB", (9, 0), 132, 128, 1.98, 60 * _MIB),
    "h200": Target("NVIDIA H200", (9, 0), 132, 128, 1.98, 50 * _MIB),
    "h100-pcie": Target("NVIDIA H100 PCIe", (9, 0), 114, 128, 1.755, 50 * _MIB),
    "h100": Target("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 50 * _MIB),
    "a100-80": Target("NVIDIA A100-SXM4-80GB", (8, 0), 108, clock=1.41, l2=40 * _MIB, **_AMPERE),
    "a100-40": Target("NVIDIA A100-SXM4-40GB", (8, 0), 108, clock=1.41, l2=40 * _MIB, **_AMPERE),
    "l40s": Target("NVIDIA L40S", (8, 9), 142, clock=2.52, l2=96 * _MIB, **_ADA),
    "l4": Target("NVIDIA L4", (8, 9), 58, clock=2.04, l2=48 * _MIB, **_ADA),
}


def compiler() -> str:
    """The name of the installed plugin with a compiler, "" for none."""
    for name in PLUGINS:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(name):
                return name
    return ""


def target_config(chip: Chip) -> str:
    """The `GpuTargetConfigProto` of a chip, as text."""
    gpu = TARGETS[chip.name]
    major, minor = gpu.capability
    extension = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{
            major: {major} minor: {minor} feature_extension: {extension}
          }}
          core_count: {gpu.cores} fpus_per_core: {gpu.fpus} clock_rate_ghz: {gpu.clock}
          device_memory_size: {int(chip.hbm)} memory_bandwidth: {int(chip.hbm_bandwidth)}
          l2_cache_size: {gpu.l2}
          shared_memory_per_core: {gpu.shared} shared_memory_per_block: {48 * 2**10}
          shared_memory_per_block_optin: {gpu.shared - 2**10}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          threads_per_core_limit: {gpu.threads} threads_per_block_limit: 1024 threads_per_warp: 32
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
        runtime_version {{ major: {CUDA[0]} minor: {CUDA[1]} }}
        device_description_str: "{gpu.kind}"
    """


def devices(chip: Chip, hosts: int, each: int) -> list[Any]:
    """The devices to compile for: `hosts` with `each` GPUs, which NVLink joins.

    Raises:
        UserError: the compiler refuses; the message quotes it.
    """
    from jax.experimental import topologies

    try:
        # partitions (GPUs that NVLink joins) x hosts of each x GPUs of each
        found = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(chip), topology=f"{hosts}x1x{each}"
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{compiler()} describes no GPU to compile for: {error}. It has to be of the "
            "version of jax, as pip install -e '.[cuda12]' has it"
        ) from error
    return list(found.devices)


@contextlib.contextmanager
def lowering(chip: Chip) -> Iterator[None]:
    """A context in which JAX lowers cuDNN's attention for `chip`, not for this machine's GPUs.

    Raises:
        UserError: this version of JAX asks in another way.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as asking

        capability = TARGETS[chip.name].capability
        answers = mock.patch.multiple(
            asking,
            check_cudnn_version=lambda: 10_000 * CUDNN[0] + 100 * CUDNN[1],
            check_compute_capability=lambda least: _version(least) <= capability,
            is_cuda_compute_capability_equal=lambda other: _version(other) == capability,
        )
        answers.start()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"this version of JAX lowers cuDNN's attention only where there is a GPU ({error}); "
            "plan with --config.model.attention=dense, which keeps more in memory"
        ) from error
    try:
        yield
    finally:
        answers.stop()


def _version(text: str) -> tuple[int, ...]:
    """The numbers of a version."""
    return tuple(int(part) for part in text.split("."))
