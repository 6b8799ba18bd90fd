"""Asking a compiler what it makes of a program: all of it, or its schedule alone.

A TPU's compiler first settles what runs in which order, fused how, in which memory, with which
collectives; then it makes machine code of it, which takes it nine tenths of the time, and of whose
length in cycles it takes a note for each operation. libtpu has no option to stop between the two.
But XLA prints the scheduled program and its buffers between them when `xla_dump_to` names a folder.
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
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (?:color (\d+), )?(.*)$", re.MULTILINE)
# Printed last, and first, of what there is before machine code.
_SCHEDULE = "*.after_optimizations_after_buffer_assignment.txt"
_BUFFERS = "*.after_optimizations-buffer-assignment.txt"


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
            raise UserError(
                f"the compiler fails on this step, and not for lack of HBM: {str(error)[:2000]}"
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
        lowered, options: as for `compile_lowered`, for a TPU.
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
    text = ""
    while thread.is_alive() and not text and wanted():
        text = _schedule(folder)
        thread.join(0.0 if text else 0.5)
    if not text:
        thread.join()
        (answer,) = answers
        if isinstance(answer, BaseException):
            raise answer
        if answer.error:
            return answer
        text = _schedule(folder)
    if not text:
        raise UserError(
            "the compiler prints no schedule before machine code (that of libtpu 0.0.42 does); "
            "plan without --quick"
        )
    sizes = read_buffers(next(folder.glob(_BUFFERS)).read_text())
    return Outcome(time.monotonic() - begin, text, sizes, quick=True)


def _schedule(folder: Path) -> str:
    """Return the scheduled program that the compiler prints into `folder`; "" if not yet whole."""
    for file in folder.glob(_SCHEDULE):
        text = file.read_text()
        if text.endswith("\n}\n\n"):  # of the last computation, the program itself
            header = re.search(r"^ENTRY ", text, re.MULTILINE)
            return text if header else ""
    return ""


def read_buffers(text: str) -> dict[str, int]:
    """Bytes of HBM by class, from XLA's print of its buffer assignment; see `Outcome.memory`.

    Color 0 is HBM, others are memory on the chip.
    """
    sizes = dict.fromkeys(("argument", "output", "alias", "temp"), 0)
    for size, color, kind in _ALLOCATION.findall(text):
        if color not in ("", "0"):
            continue
        given, kept = "parameter " in kind, "maybe-live-out" in kind
        sizes["argument"] += int(size) * given
        sizes["output"] += int(size) * kept
        sizes["alias"] += int(size) * (given and kept)
        sizes["temp"] += int(size) * (not given and not kept)
    return sizes
