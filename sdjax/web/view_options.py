"""The options of `sdjax.serve` that name what is watched and looked at."""

from __future__ import annotations

import argparse

from sdjax.errors import UserError


def add_view_options(p: argparse.ArgumentParser) -> None:
    """Add --workdir, --data and what goes with them."""
    p.add_argument(
        "--workdir", action="append", default=[], metavar="DIR",
        help="a run to watch, or a folder of runs; may be given again",
    )  # fmt: skip
    p.add_argument(
        "--data", action="append", default=[], metavar="DIR",
        help="pictures to look at: a folder of them, or the --output of sdjax.prepare; may be "
        "given again",
    )  # fmt: skip
    p.add_argument(
        "--captions", metavar="FILE",
        help="new file of captions that are mended on the page, for `sdjax.prepare "
        "--captions_from=FILE`; takes a token; none are mended by default",
    )  # fmt: skip
    p.add_argument("--handed", type=int, help=argparse.SUPPRESS)  # by `sdjax.main --serve`


def check_views(args: argparse.Namespace) -> None:
    """Raise UserError where nothing is to be served, or an option has nothing to go with."""
    if not (args.model or args.workdir or args.data):
        raise UserError(
            "there is nothing to serve; give --model=DIR to draw, --workdir=DIR to watch runs, or "
            "--data=DIR to look at pictures"
        )
    if args.captions and not args.data:
        raise UserError("--captions=FILE is for the captions of --data=DIR, which is missing")
    for option in ("lora", "embedding", "expert"):
        if getattr(args, option, None) and not args.model:
            raise UserError(f"--{option} is for --model=DIR, which is missing")
    if args.ratings and not args.model:
        raise UserError("--ratings=DIR is for what --model=DIR draws, which is missing")
