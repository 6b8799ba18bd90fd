"""The mesh: all devices of a run, laid out along three axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from sdjax.errors import UserError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left."""

    data: int = -1  # copies of the parameters, each with its part of the batch
    fsdp: int = 1  # parameters, optimizer state and EMA are split over this; so is the batch
    tensor: int = 1  # attention heads and feed-forward widths are split over this
    # Groups of devices with a slow network between them, which `data` alone crosses. 0 asks the
    # devices for their TPU slices; a number makes that many groups of neighbouring hosts.
    slices: int = 0
    # ZeRO-1: moments, EMA and the work of the update are split over `data` too (within a slice).
    shard_optimizer: bool = False

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes, strict=True):
            if size != -1 and size < 1:
                raise UserError(f"mesh.{axis} is {size}; expected a positive size, or -1")
        if sizes.count(-1) > 1:
            raise UserError(f"mesh is {dict(zip(AXES, sizes, strict=True))}; at most one -1")
        if self.slices < 0:
            raise UserError(f"mesh.slices is {self.slices}; expected 0 (ask the devices) or more")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay the devices out as (data, fsdp, tensor).

    Within a slice neighbours on the mesh are neighbours on the chips' network, as far as
    `mesh_utils.create_device_mesh` finds a way; slices lie one after the other along `data`.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or `data` does not cross the
            slices evenly.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes(config, len(devices))
    found, slices = _found(devices), count_slices(config, devices)
    if slices > 1 and (len(devices) % slices or sizes[0] % slices):
        raise UserError(
            f"{len(devices)} devices in {slices} slices with mesh.data = {sizes[0]}: `data` alone "
            f"crosses slices, so make config.mesh.data a multiple of {slices} (and fsdp x tensor a "
            f"divisor of the {len(devices) // slices} devices of a slice)"
        )
    inner = (sizes[0] // slices, *sizes[1:])
    if slices == 1:
        grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    elif slices == found:
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:  # the devices know of no such groups: take hosts in turn
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        grid = np.concatenate(
            [
                mesh_utils.create_device_mesh(inner, list(group), allow_split_physical_axes=True)
                for group in np.split(np.array(devices, dtype=object), slices)
            ]
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def count_slices(config: MeshConfig, devices: Sequence[Any]) -> int:
    """Groups of devices with a slow network between them, which `data` crosses."""
    return config.slices or (_found(devices) if devices[0].platform == "tpu" else 1)


def _found(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", None) or 0 for device in devices})


def _sizes(config: MeshConfig, count: int) -> tuple[int, int, int]:
    """The axes with -1 resolved for `count` devices."""
    sizes = np.array([getattr(config, axis) for axis in AXES])
    fixed = int(np.prod(sizes[sizes > 0]))
    if -1 in sizes and count % fixed == 0:
        sizes[sizes == -1] = count // fixed
    if np.prod(sizes) != count:
        asked = " x ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        raise UserError(
            f"mesh {asked} does not fit {count} devices: make the product of "
            f"config.mesh.* {count}, or leave one of them at -1"
        )
    data, fsdp, tensor = (int(size) for size in sizes)
    return data, fsdp, tensor
