"""Train: `python -m sdjax.main --config=base --workdir=DIR [--config.field=value ...]`.

Resume is the same command again. `--serve` watches the run in a browser. `--dry_run` prints the
resolved configuration, parameter counts, memory and shardings, and trains nothing.

On several hosts (or processes of one) every one runs this same command. Cloud TPU, SLURM and Open
MPI say by themselves who is who; otherwise `--coordinator`, `--num_processes`, `--process_id` do.

Exit codes: 0 finished, or stopped after saving by somebody's wish on the page; 2 the configuration
or the input is wrong, a file cannot be written, another run has the workdir, or the other hosts did
not come; 3 the run diverged (NaN or Inf), or its last pictures are NaN; 75 stopped by SIGTERM or
Ctrl-C after saving, or by SIGTERM before the first step; 76 another host was lost; 130 Ctrl-C
before the first step. After 75 and 76 run the same command again, on all hosts, to go on.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take a while
    from sdjax.system.interrupts import install

    install("the same command goes on from the last checkpoint, if there is one", terminated=75)

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging
from ml_collections import config_flags

from sdjax.errors import UserError, explain
from sdjax.system import collector, paths
from sdjax.system.allocator import use_large_pages
from sdjax.verbs import CONFIG_HELP, parse_or_exit, recipe
from sdjax.web import beside

if TYPE_CHECKING:
    from sdjax.config import Config

config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and pictures; made if it is not there."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print what would be trained, and on what, and stop before training."
)


class _Place(flags.ArgumentParser):
    """ "", PORT or HOST:PORT; None for --noserve. absl says "true" for a flag without a value."""

    def parse(self, argument: str | None) -> str | None:
        return {"true": "", "false": None}.get(argument or "true", argument)


_SERVE = flags.DEFINE_flag(
    flags.Flag(
        _Place(), None, "serve", None,
        "Watch the run in a browser, at http://127.0.0.1:7860 or --serve=PORT or --serve=HOST:PORT "
        "(at a free port where that is taken); another host takes a token in $SDJAX_SERVE_TOKEN. A "
        "process of its own, which neither slows nor stops the training. Of several hosts the "
        "first serves.",
        boolean=True,
    )
)  # fmt: skip

# How this process finds the others. Not in the configuration, which is the same on all.
_CLUSTER = flags.DEFINE_enum(
    "cluster", "auto", ("auto", "none", "flags", "slurm", "mpi", "tpu"),
    "Who says which of several processes this is: 'flags' (the next three), 'slurm', 'mpi' or "
    "'tpu'; 'none' for one process; 'auto' takes flags if --coordinator is given, else whichever "
    "of the others has started several.",
)  # fmt: skip
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, the same on all; the port is any free one."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "How many processes run together.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Which of them this is, from 0.")
_JOIN_TIMEOUT = flags.DEFINE_float(
    "join_timeout", 300.0, "Seconds to wait for the other processes."
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_float(
    "heartbeat_timeout",
    60.0,
    "Seconds after which a silent process counts as lost, and the others end with exit code 76.",
)


def main(argv: Sequence[str]) -> int:
    try:
        if argv[1:]:
            raise UserError(f"unexpected arguments {argv[1:]}; options start with --")
        config = recipe(flags.FLAGS, "base")
        if _WORKDIR.value is None and not _DRY_RUN.value:
            raise UserError("--workdir is missing; for instance --workdir=runs/base")
        place = None if _SERVE.value is None or _DRY_RUN.value else beside.parse(_SERVE.value)
        if place is not None:
            beside.check()
    except UserError as error:
        return explain(error)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax and Grain tell of every file they touch

    # Imported here so that --help and a mistyped flag answer at once; joining comes before
    # anything that touches a device.
    from sdjax.parallel import distributed, hosts

    try:
        distributed.join(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            cluster=_CLUSTER.value,
            timeout=_JOIN_TIMEOUT.value,
            heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
        )
    except UserError as error:
        os._exit(explain(error))  # JAX's own way out waits for the hosts that did not come

    def resolved_and_trained() -> int:
        with collector.paused():
            from sdjax.config import resolve

        if _DRY_RUN.value and not config.data.path:
            config.data.path = "(not read)"  # a dry run looks at no data
        return train(resolve(config), _WORKDIR.value or "", dry_run=_DRY_RUN.value)

    def resolved_trained_and_served() -> int:
        if place is None or not hosts.is_first():
            return resolved_and_trained()
        with beside.served(_WORKDIR.value or "", *place):
            return resolved_and_trained()

    try:
        return hosts.together(resolved_trained_and_served)
    except paths.storage_errors(UserError) as error:
        return explain(error)


def train(config: Config, workdir: str, *, dry_run: bool = False) -> int:
    """Run `sdjax.train.loop.run` with the judge of `sdjax.evaluate` and the report."""
    with collector.paused():
        from sdjax.train import loop
        from sdjax.train.hooks import Hooks, Judge
        from sdjax.web.report.page import write_report

    def make_judge(config: Config, tokenizers: Any, folder: paths.Path) -> Judge:
        from sdjax.evaluation import judging  # of many modules, which few runs need

        return judging.PictureJudge(config, tokenizers, folder)

    return loop.run(config, workdir, dry_run=dry_run, hooks=Hooks(make_judge, write_report))


if __name__ == "__main__":
    use_large_pages()
    app.run(main, flags_parser=parse_or_exit)
