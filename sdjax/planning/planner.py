"""A plan: the real train step compiled for hardware that this machine lacks, and its costs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from sdjax.config import Config, to_dict
from sdjax.config_model import blank_method
from sdjax.families.registry import model_of
from sdjax.parallel.chips import Chip
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.xla import compiler_options
from sdjax.planning import estimate, gpus, hlo, plan_cache
from sdjax.planning.topologies import Topology
from sdjax.sampling.generate import latent_shape
from sdjax.train.announce import memory_classes
from sdjax.train.compilation import Outcome, compile_lowered
from sdjax.train.monitoring.model_flops import count_flops, denoiser_flops, train_flops
from sdjax.train.program import Program, build

SCHEMA = 3  # of the result; raise it when its meaning changes
LISTED = 10  # temporaries in a plan
# The share of a GPU's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION sets another
# (docs.jax.dev/en/latest/gpu_memory_allocation.html).
GPU_FRACTION = 0.75
# The memory assumed for machine code and its constants where no code is made: 0.4 to 1.4 GiB for a
# step of Stable Diffusion, in the plans so far.
CODE_BYTES = 3 * 2**29
# Options of a compiler without its hardware. On a GPU XLA would try which algorithms are fastest;
# that of jax 0.12 has no settings of Triton's products without it, and they are cuBLAS's then.
# On CPU it would order operations for concurrency, at the cost of memory.
_TRITON = {} if jax.__version_info__ < (0, 12) else {"xla_gpu_enable_triton_gemm": False}
_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {"xla_gpu_autotune_level": 0, **_TRITON},
    "cpu": {"xla_cpu_enable_concurrency_optimized_scheduler": False},
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Plan = dict[str, Any]
Ask = Callable[[Any, dict[str, Any]], Outcome]


class Planner:
    """A maker of plans for one topology; it compiles no program twice, in earlier runs included.

    Args:
        topology, devices: the slice, and JAX's stand-ins for its devices.
        cache: folder of earlier answers.
        schedule: asks the compiler for a schedule alone, (lowered, options) -> Outcome; None
            compiles the program. A program that was compiled earlier answers both.
    """

    def __init__(
        self, topology: Topology, devices: Sequence[Any], cache: Path, schedule: Ask | None = None
    ):
        self.topology, self.devices, self.cache = topology, list(devices), cache
        self._schedule = schedule

    def program(self, config: Config) -> Program:
        """The step of `config` over the devices.

        Raises:
            UserError: the mesh or the batch does not fit them.
        """
        method = blank_method(config)
        return build(config, method, make_mesh(config.mesh, self.devices))

    def plan(self, config: Config) -> Plan:
        """The plan of a step of `config`; see docs/planning.md for the fields.

        Raises:
            UserError: the mesh or the batch does not fit the devices, or the compiler failed for
                another reason than lack of HBM.
        """
        program = self.program(config)
        platform = _platform(program)
        asks = platform == "gpu" and config.model.attention != "dense"
        with gpus.lowering(self.topology.chip) if asks else contextlib.nullcontext():
            lowered = program.step.lower(program.state, program.frozen, program.batch)
        options = compiler_options(program.mesh, config.train.xla_options)
        options |= _OPTIONS.get(platform, {})
        order = [device.id for device in program.mesh.devices.flat]
        key = _digest(lowered.as_text(), order, self.topology.name, versions(), options)
        outcome = self._outcome(lowered, key, options)
        chip = dataclasses.asdict(self.topology.chip)
        parts = (SCHEMA, key, to_dict(config), chip, outcome.quick)
        with plan_cache.entry(self.cache / "plans", _digest(*parts)) as kept:
            if kept.value is None:
                kept.value = make_plan(config, program, self.topology, outcome)
            return kept.value

    def _outcome(self, lowered: Any, key: str, options: dict[str, Any]) -> Outcome:
        """The compiler's answer, from the cache if it is there."""
        with plan_cache.entry(self.cache / "compiled", key) as kept:
            if kept.value is None and self._schedule is None:
                kept.value = dataclasses.asdict(compile_lowered(lowered, options))
            if kept.value is not None:
                return Outcome(**kept.value)
        assert self._schedule is not None
        with plan_cache.entry(self.cache / "scheduled", key) as kept:
            if kept.value is None:
                kept.value = dataclasses.asdict(self._schedule(lowered, options))
            return Outcome(**kept.value)


def _digest(*parts: Any) -> str:
    """The key of an answer: a digest of all its inputs."""
    text = json.dumps(parts, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """The versions of all packages that take part in compiling."""
    found = {}
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def memory_limit(topology: Topology) -> int:
    """The bytes of each device that a program may use."""
    chip = topology.chip
    return int(chip.hbm / chip.devices * (1.0 if chip.is_tpu else GPU_FRACTION))


def make_plan(config: Config, program: Program, topology: Topology, outcome: Outcome) -> Plan:
    """The plan from the compiler's answer; see docs/planning.md for the fields."""
    batch, chip = config.data.batch_size, topology.chip
    known = {k: v for k, v in memory_classes(program).items() if k != "gradients"}
    limit = memory_limit(topology)
    plan: Plan = {
        "schema": SCHEMA,
        "topology": topology.name,
        "chip": chip.name,
        "chips": topology.chips,
        "devices": topology.devices,
        "basis": _basis(program, chip, outcome),
        "versions": versions(),
        "mesh": {axis: int(size) for axis, size in program.mesh.shape.items()},
        "batch": {
            "global": batch,
            "per_chip": batch / topology.chips,
            "accumulation": config.train.accumulation,
        },
        "compile_seconds": round(outcome.seconds, 1),
        "fits": not outcome.error,
        "warnings": [],
    }
    if outcome.error:
        needed, plan["temporaries"] = read_out_of_memory(outcome.error)
        plan["memory"] = {"limit": limit, "classes": known, "total": None, "needed": needed}
        plan["error"] = outcome.error.splitlines()[0]
    else:
        plan["memory"] = _memory(known, outcome, limit, chip)
        plan["fits"] = plan["memory"]["total"] <= limit
        plan |= _performance(config, program, topology, outcome)
    plan["advice"] = [] if plan["fits"] else advice(config, plan, known)
    return plan


def _platform(program: Program) -> str:
    """The platform of the compiler: "tpu", "gpu", or "cpu" in place of GPUs without a compiler."""
    return program.mesh.devices.flat[0].platform


def _basis(program: Program, chip: Chip, outcome: Outcome) -> str:
    """The origin of the plan's numbers, for its first line."""
    platform = _platform(program)
    if platform == "cpu":
        return "estimate"
    how = "scheduled, without machine code," if outcome.quick else "compiled"
    return f"{how} for {chip.name} by {'libtpu' if platform == 'tpu' else 'XLA for CUDA'}"


def _memory(known: dict[str, int], outcome: Outcome, limit: int, chip: Chip) -> dict[str, Any]:
    """The memory of a device in bytes: the limit, the classes and their total."""
    sizes = outcome.memory
    classes = {
        **known,
        "padding of arguments": max(0, sizes["argument"] - sum(known.values())),
        "outputs not in place of arguments": max(0, sizes["output"] - sizes["alias"]),
        "temporaries": sizes["temp"],
        "program": CODE_BYTES if outcome.quick and chip.is_tpu else sizes.get("generated_code", 0),
    }
    return {"limit": limit, "classes": classes, "total": sum(classes.values()), "needed": None}


def _performance(
    config: Config, program: Program, topology: Topology, outcome: Outcome
) -> dict[str, Any]:
    """The fields of a plan about FLOPs, bytes, time, speed, collectives and temporaries."""
    schedule = hlo.read(outcome.text, topology.devices, topology.island)
    chip, rates = topology.chip, estimate.Rates.of(topology)
    platform = _platform(program)
    if outcome.quick or platform == "gpu":
        flops = math.fsum(w.times * w.flops for w in schedule.operations)
        flops += math.fsum(k.times * (k.flops or 0.0) for k in schedule.kernels)
    elif platform == "tpu":
        flops = outcome.cost.get("flops", 0.0) * estimate.loop_factor(schedule)
        silent = [kernel for kernel in schedule.kernels if not kernel.declared]
        flops += sum(kernel.times * (kernel.flops or 0.0) for kernel in silent)
    else:  # XLA on CPU hides products in library calls
        arguments = (program.state, program.frozen, program.batch)
        flops = count_flops(program.step, *arguments) / topology.devices
    took = estimate.step_time(schedule, topology, flops, foreign=platform == "cpu")
    optimal = outcome.cost.get("optimal_seconds")
    believed = estimate.plausible(optimal, took.roofline, flops / rates.flops)
    traffic = estimate.hbm_bytes(schedule)
    images = config.data.batch_size / took.step
    model = train_flops(config)
    return {
        "flops": flops,
        "hbm_bytes": traffic,
        "xla_bytes_accessed": outcome.cost.get("bytes accessed"),
        "intensity": flops / traffic if traffic else None,
        "balance": chip.flops / chip.hbm_bandwidth,
        "model_flops_per_image": model,
        "denoiser_flops_per_image": _unet(config),
        "time": {
            **dataclasses.asdict(took),
            "optimal_seconds": optimal if chip.is_tpu else None,
            "optimal_seconds_plausible": believed if chip.is_tpu and not outcome.quick else None,
        },
        "images_per_second": images,
        "images_per_second_per_chip": images / topology.chips,
        "mfu": model * images / (topology.chips * chip.flops),
        "collectives": estimate.collective_table(schedule, topology),
        "temporaries": [dataclasses.asdict(buffer) for buffer in schedule.buffers[:LISTED]],
        "kernels": [dataclasses.asdict(kernel) for kernel in schedule.kernels],
        "warnings": warnings(schedule, topology, platform, quick=outcome.quick),
    }


def _unet(config: Config) -> float | None:
    if not config.draws:
        return None
    side = config.data.resolution
    return denoiser_flops(config, latent_shape(model_of(config.model), side, side))


def warnings(
    schedule: hlo.HloSchedule, topology: Topology, platform: str, *, quick: bool
) -> list[str]:
    """Sentences about the gaps and the assumptions of the estimate."""
    found = []
    if quick and platform == "tpu":
        found.append(
            "--quick: no machine code was made. Matrix products are taken to reach "
            f"{topology.chip.products:.0%} of the chip's FLOP/s, as in Stable Diffusion (those of "
            f"tiny networks reach far less), and the program to take {CODE_BYTES / 2**30:g} GiB; "
            "the rest is what the compiler has settled"
        )
    silent = sorted({k.name for k in schedule.kernels if k.flops is None})
    if silent:
        found.append(
            f"THE ESTIMATE LACKS THE TIME OF {len(silent)} KERNEL(S): {', '.join(silent)}. XLA "
            "does not see into them; give their pallas_call a cost_estimate=pl.CostEstimate(...)"
        )
    declared = sorted({k.name for k in schedule.kernels if k.flops is not None})
    if declared:
        found.append(f"time of kernels by their analytic cost: {', '.join(declared)}")
    if schedule.unknown_loops:
        found.append(
            f"{schedule.unknown_loops} loop(s) of unknown length count as one pass, so time and "
            "FLOPs are lower bounds"
        )
    if platform == "gpu":
        chip = topology.chip
        found.append(
            f"products are taken to reach {chip.products:.0%} of the GPU's FLOP/s and attention "
            f"{chip.kernels:.0%}: assumed, since XLA estimates no library calls; what algorithms "
            "that are tried out on the GPU take of its memory for their work is not in this"
        )
    if platform == "cpu":
        found.append(
            "AN ESTIMATE, without a compiler for GPUs (which comes with pip install -e '.[cuda12]' "
            "or '.[cuda13]' and needs no GPU): memory is that of the same program compiled "
            "for CPU (which computes bfloat16 products in float32 and fuses otherwise: expect less "
            "on a GPU), time is a roofline, which no GPU reaches; trainers get 30 to 50 % of peak"
        )
    if platform != "tpu":
        found.append(
            f"of a GPU's memory {GPU_FRACTION:.0%} is counted on, which is what JAX takes; "
            "XLA_PYTHON_CLIENT_MEM_FRACTION changes it"
        )
    return found


def read_out_of_memory(message: str) -> tuple[int | None, list[dict[str, Any]]]:
    """The needed bytes in the compiler's message, and the largest allocations it lists."""
    needed = None
    found = re.search(
        r"\(([\d.]+)([KMGT]?)\) exceeds available|Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]?", message
    )
    if found:
        number, unit = (g for g in found.groups() if g is not None)
        needed = int(float(number) * _UNITS[unit])
    listed = []
    for block in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = re.match(r"([\d.]+)([KMGT]?)", block)
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", block)
        name = re.search(r'op_name="([^"]*)"', block)
        if size and shape:
            bytes_ = int(float(size.group(1)) * _UNITS[size.group(2)])
            listed.append({"shape": shape.group(1), "op_name": name.group(1) if name else "",
                           "bytes": bytes_, "count": 1})  # fmt: skip
    return needed, listed[:LISTED]


def advice(config: Config, plan: Plan, known: dict[str, int]) -> list[str]:
    """Changes to the config that make it fit, dearest last."""
    limit, mesh = plan["memory"]["limit"], plan["mesh"]
    found = []
    rows = config.data.batch_size // (mesh["data"] * mesh["fsdp"]) // config.train.accumulation
    if config.model.remat == "none":
        found.append("--config.model.remat=block recomputes activations instead of keeping them")
    sharded = sum(known[name] for name in ("parameters", "optimizer", "EMA"))
    ways = math.gcd(mesh["data"], 8) if mesh["data"] < 8 else 8
    if mesh["fsdp"] == 1 and ways > 1 and sharded > limit / 10:
        found.append(
            f"--config.mesh.fsdp={ways} splits parameters, optimizer and EMA, "
            f"{sharded / 2**30:.1f} GiB a device, to {sharded / ways / 2**30:.1f} GiB"
        )
    if rows > 1:
        half = config.data.batch_size // 2
        found.append(
            f"--config.train.accumulation={2 * config.train.accumulation} keeps the batch of "
            f"{config.data.batch_size} and halves the images a device holds at once, now {rows}"
        )
        found.append(f"--config.data.batch_size={half}: activations grow with the batch")
    if config.model.remat == "block":
        found.append("--config.model.remat=full keeps less still, and computes more")
    if not found:
        found.append("more chips with --config.mesh.fsdp over all of them, or chips with more HBM")
    return found
