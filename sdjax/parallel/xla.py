"""The options that XLA gets beyond its defaults, on each backend, each with its reason.

The options go with the compilation of the step and nowhere else, so the planner and the trainer
give the compiler the same, and no environment variable has to be set. A flag in XLA_FLAGS or
LIBTPU_INIT_ARGS comes before these, and one in `train.xla_options` before all. docs/notes/speed.md
lists those that were tried and left out.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from sdjax.models.config import ConfigError
from sdjax.parallel.chips import chip_name


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting.

    platform: of `jax.Device`. collectives: only where devices exchange anything. chip: of
    `parallel.chips`; "" for all of the platform.
    """

    platform: str
    name: str
    value: str
    collectives: bool = True
    chip: str = ""


OPTIONS = (
    # XLA turns the gather of a split weight and the product after it into a loop of
    # collective-permutes and partial products. That suits large weights split over few chips; here
    # it made programs several times as long, with more traffic, so gathers stay gathers.
    # (docs/planning.md; found with the planner.)
    Option("tpu", "xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000", collectives=False),
    # Sums of gradients run in the background of what is computed next ("async collective fusion",
    # as MaxText's benchmarks/xla_flags_library.py sets it; with gathers XLA does so by itself). An
    # all-reduce of several arrays at once cannot, and XLA combines them up to 100 MiB and more; so
    # only what is small, biases and scales, is combined. On v5e alone: on other chips it "might
    # lead to incorrect results", says libtpu 0.0.50, and refuses it.
    Option("tpu", "xla_enable_async_all_reduce", "true", chip="v5e"),
    Option("tpu", "xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true", chip="v5e"),
    Option("tpu", "xla_jf_crs_combiner_threshold_in_bytes", str(2**20), chip="v5e"),
    # Sums of gradients, and fsdp's gathers and scatters, run beside the backward pass: without it
    # XLA waits for each where it stands. Off by default, and what NVIDIA sets in its images:
    # docs.jax.dev/en/latest/gpu_performance_tips.html, docs.nvidia.com/jax-toolbox.
    Option("gpu", "xla_gpu_enable_latency_hiding_scheduler", "true"),
    # Values are rounded to bfloat16 where the networks say so, as torch rounds them. With XLA's
    # leave to skip that, it kept copies in float32 of what biases sum up: 4 % of the traffic.
    Option("gpu", "xla_allow_excess_precision", "false", collectives=False),
)


def compiler_options(mesh: Mesh, own: Sequence[str] = ()) -> dict[str, str | bool]:
    """Return the options of `lowered.compile` for the devices of a mesh.

    Args:
        own: `train.xla_options`, "NAME=VALUE" each; they come last and win.
    """
    device, several = mesh.devices.flat[0], mesh.size > 1
    elsewhere = set_in_environment(os.environ)
    chosen = {
        option.name: option.value
        for option in OPTIONS
        if option.platform == device.platform
        and (not option.chip or option.chip == chip_name(device.device_kind))
        and (several or not option.collectives)
        and option.name not in elsewhere
    }
    chosen |= parse(own)
    return {name: _as_flag(value) for name, value in chosen.items()}


def parse(options: Sequence[str]) -> dict[str, str]:
    """`train.xla_options` as {name: value}.

    Raises:
        ValueError: one is not of the form NAME=VALUE, or a name comes twice.
    """
    found: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not (re.fullmatch(r"xla_\w+", name) and equals and value):
            raise ValueError(
                f"train.xla_options has {option!r}; expected NAME=VALUE without dashes, as "
                "'xla_gpu_autotune_level=5'"
            )
        if name in found:
            raise ValueError(f"train.xla_options sets {name} twice; keep one of them")
        found[name] = value
    return found


def set_in_environment(environment: Mapping[str, str]) -> set[str]:
    """Names of the flags that XLA, or the compiler for TPUs, reads there by itself."""
    words = " ".join(environment.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    return set(re.findall(r"(?:^|\s)--(xla_\w+)", words))


def describe(options: Mapping[str, str | bool]) -> str:
    """Return a line for the log; "" where there are no options."""
    if not options:
        return ""
    listed = ", ".join(f"{name}={str(value).lower()}" for name, value in options.items())
    return f"XLA options: {listed}"


def as_config_error(error: Exception, own: Sequence[str]) -> ConfigError | None:
    """Return the compiler's refusal of an option of `train.xla_options`; None if it is another."""
    found = re.search(
        r"No such compile option: '(\w+)'|While setting option (\w+), (.*)", str(error)
    )
    name = (found[1] or found[2]) if found else ""
    if found is None or name not in parse(own):
        return None
    what = found[3] or "this version has no such option for this device."
    return ConfigError(
        f"train.xla_options: XLA does not take {name}={parse(own)[name]}: {what.strip()} Leave it "
        "out or mend it"
    )


def _as_flag(value: str) -> str | bool:
    """XLA takes numbers as text here, but not truth values."""
    return value.lower() == "true" if value.lower() in ("true", "false") else value
