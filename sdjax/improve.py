"""Make a model better where it fails: find the groups of prompts, collect, train on, judge again.

    python -m sdjax.improve --workdir=runs/base --propose_only
    python -m sdjax.improve --workdir=runs/base
    python -m sdjax.improve --workdir=runs/photos --more=COLLECTED --judge=clip --clip=CLIP_DIR

One command, in stages:

  1. Judge the best checkpoint on half of the held-out prompts, group by group.
  2. List the groups that fail (with Wilson's 95 % intervals), and propose what to collect:
     proposal.md for people, collect.jsonl for programs.
  3. Build the next mixture: pictures that are made (captioned_shapes), a folder of what was
     collected (--more), or what there is, weighted.
  4. Train on from that checkpoint: recipe.py, and a run of `sdjax.main` in OUTPUT/run.
  5. Judge before and after on the other half of the prompts, which decided nothing, and say
     whether it got better, with intervals, and what got worse: improve.json and improve.html.

Stop it at any time: the same command goes on where it was. For another round, give OUTPUT/run as
--workdir. The run is your own: its config.json is trained on, so take no stranger's.

A prompt is right
  fidelity  where the picture shows all of its caption, and nothing else (captioned_shapes), or
            what --shows says of it
  clip      where CLIP finds the picture nearer to its caption than to 99 others (R-precision)
  loss      where the loss of the example is among the lower three quarters of those before

Exit codes: 0 done; 2 the input or an option is wrong, or a file cannot be written; 75 stopped by
SIGTERM or Ctrl-C while training, after saving; 130 Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take a while
    from sdjax.system.interrupts import install

    install("the same command goes on")

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import logging

from sdjax.system import locks, paths, progress, text_files
from sdjax.system.allocator import use_large_pages

if TYPE_CHECKING:
    from sdjax.improving.rounds import Options, Round

STOPPED = 75


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    p = argparse.ArgumentParser(
        prog="python -m sdjax.improve", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--workdir", required=True, metavar="DIR", help="folder of a run of yours")
    p.add_argument(
        "--output",
        default="",
        metavar="DIR",
        help="folder of the round; WORKDIR/improve by default",
    )
    p.add_argument("--step", type=int, help="the checkpoint; the best one by default")
    p.add_argument(
        "--propose_only", "--dry_run", action="store_true",
        help="stop after the proposal; the same command without it goes on",
    )  # fmt: skip
    _add_finding(p)
    _add_mending(p)
    return p


def _add_finding(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("what fails")
    group.add_argument("--split", default="", help="held-out split; data.eval_split by default")
    group.add_argument(
        "--judge", default="auto", choices=("auto", "fidelity", "clip", "loss"),
        help="what says that a prompt is right, see above; fidelity where it can be had, else clip "
        "with --clip, else loss",
    )  # fmt: skip
    group.add_argument(
        "--shows", default="exact",
        help="of --judge=fidelity: what a picture has to show of its caption; colour, shape, "
        "number, size, position, relation or exact (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--clip", default="", metavar="DIR", help="folder of a CLIP, for --judge=clip"
    )
    group.add_argument(
        "--group_by", default="auto", choices=("auto", "attributes", "words", "tags"),
        help="attributes of captioned_shapes, words of captions, or their tags; by the captions",
    )  # fmt: skip
    group.add_argument(
        "--prompts", type=int, default=256, help="of each half, at most (%(default)s)"
    )
    group.add_argument("--per_prompt", type=int, default=1, help="pictures of each (%(default)s)")
    group.add_argument(
        "--least", type=int, default=8,
        help="groups of fewer prompts are neither blamed nor compared (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--target", type=float,
        help="a group fails where its whole interval is below this share; by default below the "
        "interval of all other prompts",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    group.add_argument("--batch_size", type=int, default=16, help="pictures at once (%(default)s)")


def _add_mending(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("what is done about it")
    group.add_argument(
        "--how", default="auto", choices=("auto", "synthesise", "more", "reweight"),
        help="more with --more, synthesise for captioned_shapes, else reweight",
    )  # fmt: skip
    group.add_argument(
        "--more", default="", metavar="DIR",
        help="what was collected: a folder of captioned pictures, tar shards, parquet files, or "
        "what sdjax.prepare wrote",
    )  # fmt: skip
    group.add_argument(
        "--most",
        type=int,
        default=2000,
        help="examples proposed for a group, at most (%(default)s)",
    )
    group.add_argument(
        "--cap", type=float, default=3.0,
        help="how many times more often reweight shows an example, at most (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--steps", type=int, default=0, help="of the next run; a fifth of the run's by default"
    )
    group.add_argument(
        "--rate", type=float, default=0.3, help="its learning rate over the run's (%(default)s)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, do a round, and give the exit code."""
    args = parser().parse_args(argv)
    logging.set_verbosity(logging.WARNING)
    from sdjax.checkpoints.checkpoint import CheckpointError
    from sdjax.errors import UserError, explain
    from sdjax.improving.rounds import Options
    from sdjax.improving.training import Stopped

    options = {name: value for name, value in vars(args).items() if name != "propose_only"}
    try:
        with progress.shown(True):
            improve(Options(**options), propose_only=args.propose_only)
        return 0
    except Stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    except paths.storage_errors(UserError, CheckpointError, FloatingPointError) as error:
        return explain(error)


def improve(options: Options, *, propose_only: bool = False) -> None:
    """Do a round, from wherever it is.

    Raises:
        UserError and its kin: the run, a file or an option is wrong.
        Stopped: the next run was asked to stop, and has saved.
    """
    from sdjax.improving import rounds, training
    from sdjax.train.startup import enable_compilation_cache

    training.read_base(options.workdir)  # before a folder is made
    enable_compilation_cache("")
    with locks.held(paths.to_path(options.folder), "--output", "sdjax.improve"):
        one = rounds.open_round(options)
        tell(
            f"{options.workdir}, step {one.step}: judged by {one.judge}, grouped by {one.grouping}"
        )
        rounds.judged(one, options.workdir, one.step, rounds.BEFORE, (rounds.FIND, rounds.JUDGE))
        findings, proposals = rounds.proposed(one)
        tell(text_files.read_text(one.folder / rounds.PROPOSAL))
        if propose_only or not proposals:
            if not proposals:
                rounds.write_result(one, findings, proposals, "", None)
            tell(f"{one.folder / rounds.COLLECT}: the same for programs")
            return
        note = rounds.built(one, proposals, tell)
        tell(f"training on by {one.folder / training.RECIPE}; it prints into "
             f"{one.folder / training.RUN / training.LOG}")  # fmt: skip
        training.train(one.folder, tell)
        run = str(one.folder / training.RUN)
        rounds.judged(one, run, None, rounds.AFTER, (rounds.JUDGE,))
        found = rounds.compared(one, [p.group for p in proposals])
        rounds.write_result(one, findings, proposals, note, found)
        _write_page(one)
    tell(f"{found.sentence()}\n{one.folder / rounds.RESULT}, improve.html beside it; for another "
         f"round: --workdir={run}")  # fmt: skip


def _write_page(one: Round) -> None:
    from sdjax.web.improvement import write_page

    write_page(paths.to_path(one.folder))


def tell(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


if __name__ == "__main__":
    use_large_pages()
    sys.exit(main())
