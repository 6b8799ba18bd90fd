"""The chips sdjax knows by name: what each can do at most, from its maker's data sheet.

Telemetry takes the peak FLOP/s from here for MFU, `sdjax.plan` everything else.
"""

from __future__ import annotations

import dataclasses
import functools

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, as it is sold. A JAX device is a chip, or half of one (`devices` = 2).

    flops: dense bfloat16 FLOP/s. hbm: bytes of device memory; of TPUs what the compiler lets a
    program have, which is a little less than is on the chip. hbm_bandwidth, links, network:
    bytes/s to its memory, out of the chip over ICI or NVLink (one direction, all links), and out
    of the host over the data-centre network (a chip's share). clock: Hz, of TPUs, for the
    compiler's estimates in cycles. dims: of a TPU slice's shape. kernels: the share of `flops` that
    kernels of Pallas have, whose cost is counted as of matrix units of 128 x 128, or of GPUs those
    of cuDNN's attention. products: the share that matrix products and convolutions have, of TPUs by
    the compiler's cycles.
    """

    name: str
    kinds: tuple[str, ...]  # what `device_kind` starts with
    flops: float
    hbm: float
    hbm_bandwidth: float
    links: float
    network: float
    devices: int = 1
    clock: float = 0.0
    dims: int = 0
    kernels: float = 1.0
    products: float = 0.66

    @property
    def is_tpu(self) -> bool:
        return self.dims > 0


# TPU: docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x}: peak compute, HBM bandwidth and
# ICI bandwidth per chip (listed for both directions together from v5e on, in Gbit/s before: halved
# and divided here), data-centre network per chip or pod. Memory is what the compiler states when it
# refuses a program ("exceeds available HBM (15.75G)"), times the devices of a chip. The clock is
# the peak over the FLOPs of all matrix units in a cycle: 128 x 128 units, 1 a core on v2, 2 on v3,
# 4 on v4, v5e and v5p; 256 x 256 units on v6e and tpu7x, as many as the compiler counts (its
# estimate for a large matrix product is 83 to 97 % of this). Kernels: in the units of 256 x 256 the
# heads of attention fill a part, and the vector units are no faster: by the instructions that they
# compile to, v6e takes 1.15 (splash) to 1.5 times (models/short_keys.py) as long as v5p, with twice
# its FLOP/s. Products: all those of a training step of SD 1.5 and 2.1 at 512 px, in full plans (by
# the cycles of v5e 0.75, of v5p 0.65 to 0.68, of v6e 0.43 to 0.46); v2 to v4 are taken to be as
# v5p, and tpu7x as v6e.
TPUS = (
    Chip("v2", ("TPU v2",), 45e12, 2 * 7.48 * GIB, 700e9, 248e9, 3.1e9, 2, 0.70e9, 2),
    Chip("v3", ("TPU v3",), 123e12, 2 * 15.48 * GIB, 900e9, 328e9, 3.1e9, 2, 0.94e9, 2),
    Chip("v4", ("TPU v4",), 275e12, 30.75 * GIB, 1228e9, 300e9, 6.25e9, 1, 1.05e9, 3),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 200e9, 3.1e9, 1, 1.5e9, 2,
         products=0.75),
    Chip("v5p", ("TPU v5",), 459e12, 95.74 * GIB, 2765e9, 600e9, 6.25e9, 1, 1.75e9, 3),
    Chip("v6e", ("TPU v6",), 918e12, 31.25 * GIB, 1638e9, 400e9, 12.5e9, 1, 1.75e9, 2,
         kernels=0.4, products=0.44),
    Chip("tpu7x", ("TPU7x",), 2307e12, 2 * 94.75 * GIB, 7380e9, 600e9, 12.5e9, 2, 2.2e9, 3,
         kernels=0.4, products=0.44),
)  # fmt: skip

# NVIDIA: the data sheets (A100, H100, H200, L4, L40S, GH200, B200), bfloat16 without sparsity;
# NVLink is listed for both directions together and halved here, PCIe 4.0 x16 where there is none.
# Network: 400 Gbit/s a GPU on DGX H100 and B200, 200 on DGX A100; 100 for a host of L4 or L40S.
# Products and kernels are assumed, not measured: cuBLAS and cuDNN reach 60 to 75 % of the data
# sheet in large products, less in convolutions; attention with heads of 64, forward and backward,
# 350 to 450 TFLOP/s on an H100, half of the peak on an A100 (papers on FlashAttention-2 and -3).
_hopper = functools.partial(Chip, kernels=0.4, products=0.6)  # and later ones
_ampere = functools.partial(Chip, kernels=0.5, products=0.6)
GPUS = (
    _hopper("b200", ("NVIDIA B200",), 2250e12, 180e9, 8000e9, 900e9, 50e9),
    _hopper("gh200", ("NVIDIA GH200",), 989e12, 96e9, 4000e9, 450e9, 50e9),
    _hopper("h200", ("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 50e9),
    _hopper("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 80e9, 2000e9, 32e9, 25e9),
    _hopper("h100", ("NVIDIA H100",), 989e12, 80e9, 3350e9, 450e9, 50e9),
    _ampere("a100-80", ("NVIDIA A100-SXM4-80", "NVIDIA A100 80"), 312e12, 80e9, 2039e9, 300e9,
            25e9),
    _ampere("a100-40", ("NVIDIA A100",), 312e12, 40e9, 1555e9, 300e9, 25e9),
    _ampere("l40s", ("NVIDIA L40S",), 362e12, 48e9, 864e9, 32e9, 12.5e9),
    _ampere("l4", ("NVIDIA L4",), 121e12, 24e9, 300e9, 32e9, 12.5e9),
)  # fmt: skip

# Devices that train but that nobody plans for.
_OTHER_FLOPS = {"TPU v4 lite": 138e12}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one JAX device of this kind; None if unknown."""
    for kind, flops in _OTHER_FLOPS.items():
        if device_kind.startswith(kind):
            return flops
    chip = _of_kind(device_kind)
    return chip.flops / chip.devices if chip else None


def chip_name(device_kind: str) -> str:
    """The name of the chip that JAX devices of this kind are of; "" if unknown."""
    chip = None if device_kind.startswith(tuple(_OTHER_FLOPS)) else _of_kind(device_kind)
    return chip.name if chip else ""


def _of_kind(device_kind: str) -> Chip | None:
    return next((chip for chip in TPUS + GPUS if device_kind.startswith(chip.kinds)), None)


def find(name: str) -> Chip | None:
    """The chip of that name."""
    return next((chip for chip in TPUS + GPUS if chip.name == name), None)
