"""The command `sdjax VERB [options]`, short for `python -m sdjax.VERB [options]`."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import sys

VERBS = {
    "prepare": "clean captioned pictures to train on; with --encode, latents of them",
    "main": "train; the same command resumes",
    "sample": "draw pictures of prompts",
    "convert": "to and from diffusers folders and single files; averages",
    "evaluate": "FID, KID, CLIP score, ...: how good is it",
    "report": "curves, pictures and numbers of a run on one page",
    "serve": "draw for the clients of A1111 and OpenAI, over HTTP",
    "sweep": "search the configuration",
    "improve": "find what fails, collect, train on, judge again",
    "plan": "does a run fit TPUs or GPUs, and how fast is it",
}


def main(argv: list[str] | None = None) -> int:
    """Become the verb's own process; or an exit code: 0 for --help, 2 for a wrong verb."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        return _say(_help())
    if argv[0] == "--version":
        return _say(f"sdjax {importlib.metadata.version('sdjax')}")
    verb, *options = argv
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(VERBS)}"
        print(f"error: sdjax has no verb {verb!r}; {hint}", file=sys.stderr)
        return 2
    os.execv(sys.executable, [sys.executable, "-m", f"sdjax.{verb}", *options])


def _say(text: str) -> int:
    """Print; a reader such as `head` may have seen enough before the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes
    return 0


def _help() -> str:
    lines = [f"  {verb:<9} {about}" for verb, about in VERBS.items()]
    return "\n".join([
        "usage: sdjax VERB [options]; `sdjax VERB --help` lists the options", "", *lines, "",
        "For instance: sdjax main --config=base --workdir=runs/base",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
