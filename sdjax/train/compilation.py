"""Asking a compiler what it makes of a program: all of it, or its schedule alone.

The compiler first settles what runs in which order, fused how, in which memory, with which
collectives; then it makes machine code of it. That takes nine tenths of the time for a TPU, where
it notes for each operation how many cycles it takes, and most of it for a GPU, where each fusion
goes through LLVM and ptxas. No option stops it between the two. But XLA prints the scheduled
program and its buffers between them when `xla_dump_to` names a folder.
"""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sdjax.errors import UserError

# "in memory space hbm", "on HBM"; on CPU no space is named.
_OUT_OF_HBM = re.compile(r"out of memory(?! (?:in memory space|on) (?!hbm))", re.IGNORECASE)
# The compiler of jax 0.10 has it in itself, that of 0.12 has not.
_LIBDEVICE = ". It is in nvidia-cuda-nvcc-cu12, which pip install -e '.[cuda12]' brings"
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (?:color (\d+), )?(.*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class _Prints:
    """The files that a compiler prints before machine code: patterns of their names.

    after: printed after the buffers; "" where the schedule is.
    """

    schedule: str
    buffers: str
    after: str = ""


_PRINTS = (
    _Prints(  # libtpu
        "*.after_optimizations_after_buffer_assignment.txt",
        "*.after_optimizations-buffer-assignment.txt",
    ),
    _Prints(  # XLA for CUDA
        "*_gpu_after_optimizations.txt",
        "*_gpu_after_optimizations-buffer-assignment.txt",
        "*_gpu_after_optimizations-buffer-assignment-values.txt",
    ),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The compiler's answer, which takes it minutes. error: of running out of memory.

    quick: there is no machine code, and so no cycles in the text, no costs, nothing of its size.
    """

    seconds: float
    text: str = ""
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    cost: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""
    quick: bool = False


def compile_lowered(lowered: Any, options: dict[str, Any]) -> Outcome:
    """Ask the compiler; running out of HBM is an answer.

    Raises:
        UserError: it fails for another reason; a kernel that wants too much VMEM is one.
    """
    begin = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not _OUT_OF_HBM.search(str(error)):
            remedy = _LIBDEVICE if "libdevice not found" in str(error) else ""
            raise UserError(
                "the compiler fails on this step, and not for lack of HBM: "
                f"{str(error)[:2000]}{remedy}"
            ) from error
        return Outcome(time.monotonic() - begin, error=str(error))
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    sizes = ("argument", "output", "alias", "temp", "generated_code")
    return Outcome(
        time.monotonic() - begin,
        text=compiled.as_text(),
        memory={name: int(getattr(memory, f"{name}_size_in_bytes", 0)) for name in sizes},
        cost={
            name: float(value)
            for name, value in (cost if isinstance(cost, dict) else {}).items()
            if name in ("flops", "bytes accessed", "optimal_seconds")
        },
    )


def schedule_lowered(
    lowered: Any, options: dict[str, Any], folder: Path, wanted: Callable[[], bool]
) -> Outcome:
    """The compiler's answer as far as it goes without machine code; running out of HBM is one.

    The compilation goes on in a thread that cannot be stopped: end the process afterwards.

    Args:
        lowered, options: as for `compile_lowered`, for a TPU or a GPU.
        folder: empty; the compiler prints into it, also after the answer.
        wanted: asked while waiting; to give up it ends the process.

    Raises:
        UserError: the compiler fails for another reason, or prints no schedule.
    """
    begin = time.monotonic()
    answers: list[Outcome | BaseException] = []

    def ask() -> None:
        printing = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
        try:
            answers.append(compile_lowered(lowered, options | printing))
        except BaseException as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    found = None
    while thread.is_alive() and not found and wanted():
        found = _schedule(folder)
        thread.join(0.0 if found else 0.5)
    if not found:
        thread.join()
        (answer,) = answers
        if isinstance(answer, BaseException):
            raise answer
        if answer.error:
            return answer
        found = _schedule(folder)
    if not found:
        raise UserError(
            "the compiler prints no schedule before machine code (that of libtpu 0.0.42 does); "
            "plan without --quick"
        )
    text, buffers = found
    return Outcome(time.monotonic() - begin, text, read_buffers(buffers), quick=True)


def _schedule(folder: Path) -> tuple[str, str] | None:
    """Return the scheduled program and its buffers, as printed into `folder`; None if not whole."""
    for prints in _PRINTS:
        for file in folder.glob(prints.schedule):
            text = file.read_text()
            # It ends with the last computation, the program itself.
            whole = text.endswith("\n}\n\n") and re.search(r"^ENTRY ", text, re.MULTILINE)
            if whole and (not prints.after or any(folder.glob(prints.after))):
                return text, next(folder.glob(prints.buffers)).read_text()
    return None


def read_buffers(text: str) -> dict[str, int]:
    """Bytes of HBM by class, from XLA's print of its buffer assignment; see `Outcome.memory`.

    Color 0 is HBM, others are memory on the chip; so is what a GPU's fusions have for themselves.
    """
    sizes = dict.fromkeys(("argument", "output", "alias", "temp"), 0)
    for size, color, kind in _ALLOCATION.findall(text):
        if color not in ("", "0") or kind.startswith("thread-local"):
            continue
        given, kept = "parameter " in kind, "maybe-live-out" in kind
        sizes["argument"] += int(size) * given
        sizes["output"] += int(size) * kept
        sizes["alias"] += int(size) * (given and kept)
        sizes["temp"] += int(size) * (not given and not kept)
    return sizes
