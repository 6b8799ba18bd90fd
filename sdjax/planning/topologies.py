"""Hardware that this machine lacks, by name: `v5p:4x4x4`, `2*v5litepod-256`, `gpu:h100:4x8`."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from sdjax.errors import UserError
from sdjax.parallel.chips import GPUS, TPUS, Chip
from sdjax.planning import gpus

# The shapes of Cloud TPU's accelerator types, by chips:
# docs.cloud.google.com/tpu/docs/{v5e,v6e,v5p}.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and their connections. shape: that of one slice, or (hosts, GPUs a host)."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """The name, as `parse` takes it."""
        shape = "x".join(map(str, self.shape))
        if not self.chip.is_tpu:
            return f"gpu:{self.chip.name}:{shape}"
        return (f"{self.slices}*" if self.slices > 1 else "") + f"{self.chip.name}:{shape}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """The number of JAX devices."""
        return self.chips * self.chip.devices

    @property
    def island(self) -> int:
        """The number of devices that ICI or NVLink joins; others use the data-centre network."""
        if self.chip.is_tpu:
            return math.prod(self.shape) * self.chip.devices
        return self.shape[-1]


def parse(text: str) -> Topology:
    """The topology of a name: `v5p:4x4x4`, `v5litepod-256`, `2*v5e:16x16`, `gpu:h100:4x8`.

    `2*` means two slices; the numbers of GPUs are hosts and GPUs a host.

    Raises:
        UserError: the name or the shape is not known; the message lists the known ones.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(?:(gpu):)?([a-z0-9\-]+?)(?::([\dx]+)|-(\d+))", text.strip())
    if found is None:
        raise _unknown(text, "it is not of the form CHIP:SHAPE")
    slices, gpu, name, shape, count = found.groups()
    name = {"v5litepod": "v5e", "v7x": "tpu7x"}.get(name, name)
    if gpu and shape and not slices:
        return _gpus(text, name, shape)
    chip = next((c for c in TPUS if c.name == name), None)
    if gpu or chip is None:
        raise _unknown(text, f"no chip is called {name!r}")
    if count:
        shape = _shape_of_type(text, chip, int(count))
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise _unknown(text, f"{shape!r} is not a shape")
    sizes = tuple(int(size) for size in shape.split("x"))
    if len(sizes) != chip.dims:
        raise _unknown(text, f"a slice of {name} has {chip.dims} dimensions, not {len(sizes)}")
    if int(slices or 1) < 1:
        raise _unknown(text, "it has no slices")
    return Topology(chip, sizes, int(slices or 1))


def _gpus(text: str, name: str, shape: str) -> Topology:
    """The topology of GPU hosts."""
    chip = next((c for c in GPUS if c.name == name), None)
    if chip is None:
        raise _unknown(text, f"no GPU is called {name!r}")
    sizes = tuple(int(size) for size in shape.split("x") if size)
    if len(sizes) not in (1, 2) or 0 in sizes:
        raise _unknown(text, f"{shape!r} is neither GPUS nor HOSTSxGPUS")
    return Topology(chip, (1, *sizes)[-2:])


def _shape_of_type(text: str, chip: Chip, count: int) -> str:
    """The shape of an accelerator type: `v5litepod-8` counts chips, `v4-8` and `v5p-8` cores."""
    table, per_chip = (FLAT, 1) if chip.dims == 2 else (CUBES, 2)
    if chip.name not in ("v4", "v5e", "v5p", "v6e"):
        raise _unknown(text, f"give {chip.name} by its shape, as {chip.name}:2x2x1")
    shape = table.get(count // per_chip) if count % per_chip == 0 else None
    if shape is None:
        known = ", ".join(f"{chip.name}-{chips * per_chip}" for chips in table)
        raise _unknown(text, f"no such size; known are {known}; give others by their shape")
    return shape


def _unknown(text: str, reason: str) -> UserError:
    """The error for a name that is not known."""
    tpus, gpus = (", ".join(c.name for c in chips) for chips in (TPUS, GPUS))
    return UserError(
        f"--topology={text}: {reason}. A TPU slice is CHIP:SHAPE, as v5e:2x4 or v5p:4x4x4 (chips: "
        f"{tpus}), an accelerator type, as v5litepod-8, or several slices, as 2*v5e:16x16; GPUs "
        f"are gpu:NAME:GPUS or gpu:NAME:HOSTSxGPUS (names: {gpus})"
    )


def devices(topology: Topology) -> list[Any]:
    """The devices of a slice or of GPU hosts, to compile for.

    Without a compiler for GPUs they are as many virtual CPU devices. Call it before anything else
    touches a device.

    Raises:
        UserError: libtpu is not installed, or the compiler knows no such hardware.
    """
    jax.config.update("jax_platforms", "cpu")
    if not topology.chip.is_tpu:
        if gpus.compiler():
            return gpus.devices(topology.chip, *topology.shape)
        jax.config.update("jax_num_cpu_devices", topology.devices)
        return jax.devices("cpu")
    # libtpu locks the machine for one process, and asks the cloud's metadata server which hardware
    # it runs on. Neither makes sense for compiling alone, and here there is no such server.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError("the compiler for TPU, libtpu, is not installed: pip install -e '.[tpu]'")
    shape = "x".join(map(str, topology.shape))
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device
    if math.prod(topology.shape) < 4:
        options["chips_per_host_bounds"] = (*topology.shape, 1, 1)[:3]
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{topology.chip.name}:{shape}", **options
        ).devices
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--topology={topology.name}: the compiler says: {error}") from error
    if len(found) != topology.devices:
        raise UserError(
            f"--topology={topology.name}: the compiler sees {len(found)} devices in it, not "
            f"{topology.devices}; this version of libtpu divides the chip otherwise"
        )
    return list(found)
