"""What the benchmarks share: functions timed in turn, where they ran, tables of the results."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Blocks:
    """One number for each block of a measurement, in the order in which they were taken."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        return min(self.values)

    @property
    def most(self) -> float:
        return max(self.values)

    def over(self, other: Blocks) -> Blocks:
        """The ratio to `other`, block by block: what slows the machine for a while slows both."""
        return Blocks(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        """ "median (least to most)"."""
        shown = (f"{v * scale:.{digits}g}" for v in (self.median, self.least, self.most))
        return "{} ({} to {})".format(*shown)

    def json(self) -> dict[str, Any]:
        """The three numbers and all the blocks."""
        return {
            "median": self.median,
            "least": self.least,
            "most": self.most,
            "blocks": list(self.values),
        }


def in_turn(
    functions: Mapping[str, Callable[[], Any]], *, blocks: int = 5, seconds: float = 2.0
) -> dict[str, Blocks]:
    """Seconds a call of each function, which has to wait for its own result.

    Each is called once beforehand, not timed, and once to choose how many calls make a block of
    about `seconds`. Then come `blocks` rounds of one block each, one function after the other.
    """
    calls = {}
    for name, function in functions.items():
        function()
        begin = time.perf_counter()
        function()
        calls[name] = max(1, round(seconds / max(time.perf_counter() - begin, 1e-9)))
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(blocks):
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                function()
            taken[name].append((time.perf_counter() - begin) / calls[name])
    return {name: Blocks(tuple(values)) for name, values in taken.items()}


def environment(*packages: str) -> dict[str, Any]:
    """The machine, the devices of JAX, and the versions of the packages that are installed."""
    import jax

    versions = {}
    for package in ("jax", "jaxlib", "flax", "optax", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load": os.getloadavg()[0],
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    """`result` into the file that was asked for, if one was."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
