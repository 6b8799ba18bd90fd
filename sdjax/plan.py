"""Whether a configuration fits a machine and how fast it should go, without the machine.

    python -m sdjax.plan --config=configs/sd21_base.py --topology=v5p:4x4x4
        [--config.field=value ...] [--quick] [--format=json] [--output=FILE] [--search]

For TPU the real train step is compiled by the real compiler (pip install -e '.[tpu]'; no TPU is
needed). A step of Stable Diffusion takes it half an hour to an hour of a core and up to 18 GB of
memory; with --quick, which leaves out machine code, four minutes and 6 GB. For GPUs it is compiled
where JAX's plugin for CUDA is installed (pip install -e '.[cuda12]'; no GPU is needed), in four
minutes (SDXL: over a quarter of an hour), and otherwise estimated. Results are kept in --cache.
Nothing is read of `data.path`.

Exit codes: 0 it fits; 1 it does not; 2 wrong configuration or option, or the compiler died; 130
Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take a while
    from sdjax.system.interrupts import install

    install("plans that were finished are kept")

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from sdjax import verbs
from sdjax.errors import UserError, explain
from sdjax.system import paths

if TYPE_CHECKING:
    from rich.console import Console

    from sdjax.config import Config
    from sdjax.planning.planner import Planner

# Flags of its own: those of `sdjax.main` (--workdir, --coordinator, ...) mean nothing here.
FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, verbs.CONFIG_HELP, flag_values=FLAGS)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None,
    "TPU slice (v5e:2x4, v5p:4x4x4, v5litepod-256, 2*v5e:16x16) or GPUs (gpu:h100:8, gpu:h100:4x8 "
    "for 4 hosts).", flag_values=FLAGS,
)  # fmt: skip
_FORMAT = flags.DEFINE_enum(
    "format", "table", ["table", "json"], "How to print the plan.", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Also write the plan as JSON into this file.", flag_values=FLAGS
)
_SEARCH = flags.DEFINE_bool(
    "search", False, "Look for the largest batch that fits and the fastest mesh, in several plans.",
    flag_values=FLAGS,
)  # fmt: skip
_QUICK = flags.DEFINE_bool(
    "quick", False,
    "For TPU: let the compiler go as far as the schedule, which takes a tenth of the time. Memory "
    "and collectives are known then; matrix products are taken to have the share of the chip's "
    "FLOP/s that compiled ones had. For GPUs: the same memory in two thirds of the time; "
    "collectives that only machine code shows to be hidden count as bare.", flag_values=FLAGS,
)  # fmt: skip
_CACHE = flags.DEFINE_string(
    "cache", "~/.cache/sdjax/plan", "Folder where results are kept.", flag_values=FLAGS
)
_CHILD = "SDJAX_PLAN_CHILD"  # set in the process that compiles
_EMBEDDING = "embeddings.token_embedding.embedding"  # of a text encoder
flags.DEFINE_bool("help", False, "Show this and stop.", short_name="h", flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    """The verb; `argv` with the program's name first."""
    try:
        return verbs.run(argv, FLAGS, __name__, __doc__ or "", _run)
    except Exception:  # Python's own exit code, 1, would say that it does not fit
        traceback.print_exc()
        return 2


def in_a_child(argv: Sequence[str]) -> int:
    """`main` in a process of its own, since a compiler that dies takes its process with it."""
    child = subprocess.Popen(
        [sys.executable, "-m", "sdjax.plan", *argv[1:]], env={**os.environ, _CHILD: "1"}
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # the child says what there is to say
        signal.signal(number, lambda number, _: child.send_signal(number))
    code = child.wait()
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = ""
    if name == "SIGKILL":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        hint = (
            f", most likely for want of memory: this machine has {memory:.0f} GiB, and a step of "
            "Stable Diffusion takes the compiler 13 to 18 GB, with --quick 3 to 6. Plan with that, "
            "close other programs or plan on a larger machine"
        )
    elif name != "SIGTERM":
        hint = "; the compiler (libtpu) crashed, and its last words are above"
    return explain(UserError(f"the plan was ended by {name}{hint}"))


def _run() -> int:
    """With the flags parsed."""
    recipe = verbs.recipe(FLAGS, "sd15")
    _check_flags()
    logging.set_verbosity(logging.ERROR)
    from sdjax.planning import topologies

    topology = topologies.parse(_TOPOLOGY.value or "")
    devices = topologies.devices(topology)
    from rich.console import Console

    from sdjax.planning.plan_report import show, show_search
    from sdjax.planning.planner import Planner
    from sdjax.planning.quick_plan import QuickPlanner

    make = QuickPlanner if _QUICK.value else Planner
    planner = make(topology, devices, Path(_CACHE.value).expanduser())
    config = _config(recipe)
    as_json = _FORMAT.value == "json"
    console = Console(stderr=as_json, width=None if Console().is_terminal else 120)
    if _SEARCH.value:
        best, tried = _search(planner, config, console)
        result: dict[str, object] = {"best": best, "tried": tried}
        fits = best is not None
        if not as_json:
            show_search(tried, best, console)
            show(best or tried[-1], console)
    else:
        if topology.chip.is_tpu and not _QUICK.value:
            console.print(
                "compiling; --quick leaves out machine code and takes a tenth of the time"
            )
        plan = planner.plan(config)
        result, fits = plan, plan["fits"]
        if not as_json:
            show(plan, console)
    text = json.dumps(result, indent=2)
    if as_json:
        print(text)
    if _OUTPUT.value:
        paths.write_text(_OUTPUT.value, text + "\n")
    return 0 if fits else 1


def _check_flags() -> None:
    """Raise UserError for what is missing or too much."""
    if not _TOPOLOGY.value:
        raise UserError("--topology is missing; for instance --topology=v5e:2x4 or gpu:h100:8")
    if not _CACHE.value:
        raise UserError("--cache is empty; expected a folder, or leave it out")
    if _OUTPUT.value and not Path(_OUTPUT.value).absolute().parent.is_dir():
        raise UserError(f"--output={_OUTPUT.value}: its folder does not exist")


def _config(raw: ConfigDict) -> Config:
    """The configuration as a run would have it, without looking at data.

    A tokenizer that the run would train has at most `tokenizer.vocab_size` entries.
    """
    from sdjax.checkpoints.assemble import assemble
    from sdjax.config import resolve

    if not raw.data.path:
        raw.data.path = "(not read)"
    config = resolve(raw)
    if config.init_from or config.vae_from or config.text_encoder_from:
        config = assemble(config, with_tokenizer=False).config
    largest = config.tokenizer.vocab_size
    if not config.draws or config.init_from or config.text_encoder_from:
        return config
    fitted: dict[str, Any] = {}
    for name, encoder in config.model.text_encoders.items():
        table = f"{name}.{_EMBEDDING}"
        rates = (rate for pattern, rate in config.optim.groups if re.search(pattern, table))
        frozen = next(rates, 1.0) == 0  # what is not trained has to be loaded, with its own size
        if not (frozen or config.tokenizer.path or encoder.vocab_size <= largest):
            fitted[name] = dataclasses.replace(encoder, vocab_size=largest)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fitted))


def _search(planner: Planner, config: Config, console: Console) -> tuple:
    from sdjax.planning.plan_search import search

    found = search(planner, config, lambda line: console.print(line, markup=False, highlight=False))
    return found.best, list(found.tried)


if __name__ == "__main__":
    sys.exit(main(sys.argv) if _CHILD in os.environ else in_a_child(sys.argv))
