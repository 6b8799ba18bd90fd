"""One page about a training run: curves, pictures, metrics, speed, data and what went wrong.

    python -m sdjax.report --workdir=runs/base

writes runs/base/report.html: a single file that can be opened without a network, sent by mail, and
read on a phone. It is made of the files of the workdir alone, so it can be written while the run is
going on, and on another machine. Exit codes: 0 done; 2 the input or an option is wrong, or the page
cannot be written; 130 Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take a while
    from sdjax.system.interrupts import install

    install("the same command writes the page again")

import argparse
import sys
from collections.abc import Sequence

from sdjax.errors import UserError, cause_of, explain
from sdjax.system import paths

# One of these makes a folder a workdir.
FILES = ("config.json", "metrics.jsonl")


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    p = argparse.ArgumentParser(
        prog="python -m sdjax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--workdir", required=True, metavar="DIR",
        help="folder of a run (that of sdjax.main), or gs://BUCKET/FOLDER",
    )  # fmt: skip
    p.add_argument(
        "--output", metavar="FILE", help="page to write (report.html in the workdir by default)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, write the page, and give the exit code."""
    args = parser().parse_args(argv)
    try:
        print(f"the report is in {report(args)}")
    except UserError as error:
        return explain(error)
    return 0


def report(args: argparse.Namespace) -> paths.Path:
    """Write what the options of `parser` say, and give the path of the page.

    Raises:
        UserError: there is no such run, or the page cannot be written.
    """
    from sdjax.web.report.page import write_report

    folder = paths.to_path(args.workdir)
    if not paths.exists(folder):
        raise UserError(f"--workdir={args.workdir}: there is no such folder")
    if not any((folder / name).exists() for name in FILES):
        raise UserError(
            f"--workdir={args.workdir} has neither {' nor '.join(FILES)}; expected the folder that "
            "was the --workdir of sdjax.main"
        )
    output = None
    if args.output:
        output = paths.to_path(args.output)
        if output.is_dir():
            raise UserError(f"--output={args.output} is a folder; expected a file, such as x.html")
        paths.make_folder(output.parent)
    try:
        return write_report(folder, output)
    except paths.storage_errors() as error:
        where = args.output or folder
        raise UserError(
            f"the report cannot be written to {where}: {'; '.join(cause_of(error))} (--output "
            "writes it elsewhere)"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
