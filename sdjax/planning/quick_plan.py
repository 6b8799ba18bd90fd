"""Plans from schedules, without machine code: for TPUs a tenth of the compiler's time.

A compilation cannot be interrupted. So a process of its own makes each plan, and ends as soon as
the compiler has printed the schedule.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sdjax.config import Config
from sdjax.errors import UserError
from sdjax.planning import gpus, topologies
from sdjax.planning.planner import Plan, Planner
from sdjax.planning.topologies import Topology
from sdjax.system.interrupts import at_end, ignored_by_children
from sdjax.train.compilation import Outcome, schedule_lowered


class QuickPlanner(Planner):
    """A `Planner` that asks for schedules alone.

    Raises UserError for GPUs without a compiler for them.
    """

    def __init__(self, topology: Topology, devices: Sequence[Any], cache: Path):
        if not topology.chip.is_tpu and not gpus.compiler():
            raise UserError(
                f"--quick with --topology={topology.name}: without JAX's plugin for CUDA the plan "
                "is an estimate, of which there is nothing to leave out"
            )
        super().__init__(topology, devices, cache)

    def plan(self, config: Config) -> Plan:
        """Make a plan in a process of its own; see `Planner.plan`."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        with (
            tempfile.TemporaryDirectory(prefix="sdjax-plan-", ignore_cleanup_errors=True) as folder,
            at_end(lambda *_: shutil.rmtree(folder, ignore_errors=True)),
        ):
            process = context.Process(
                target=_plan, args=(theirs, self.topology, self.cache, config, Path(folder))
            )
            with ignored_by_children():
                process.start()
            theirs.close()
            try:
                answer = ours.recv()
            except EOFError as error:
                process.join()
                code = process.exitcode or 0
                if code < 0:  # a signal ended it, perhaps for its memory: end in the same way
                    signal.raise_signal(-code)
                raise UserError("no plan was made: its process failed, as told above") from error
            finally:
                process.kill()
                process.join()
        if isinstance(answer, UserError):
            raise answer
        return answer


def _plan(pipe: Connection, topology: Topology, cache: Path, config: Config, folder: Path) -> None:
    """Make one plan, send it and exit while the compiler is still at work."""

    def wanted() -> bool:
        parent = multiprocessing.parent_process()
        if parent is None or parent.is_alive():
            return True
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    def schedule(lowered: Any, options: dict[str, Any]) -> Outcome:
        return schedule_lowered(lowered, options, folder, wanted)

    answer: Plan | UserError
    try:
        planner = Planner(topology, topologies.devices(topology), cache, schedule)
        answer = planner.plan(config)
    except UserError as error:
        answer = error
    pipe.send(answer)
    pipe.close()
    os._exit(0)
