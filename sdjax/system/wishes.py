"""The files by which those who watch a run ask it to stop, or to show pictures now.

A wish is a file of `WORKDIR/wishes`, which whoever may write there makes, such as `sdjax.serve`.
The run looks for files and removes what it has read: no signal goes to a process whose number stood
in a file.
"""

from __future__ import annotations

from sdjax.system import paths

FOLDER = "wishes"
STOP, SAMPLE = "stop", "sample"


def make(workdir: paths.Path, wish: str) -> None:
    """Ask the run of a workdir for `STOP` or `SAMPLE`.

    Raises:
        WriteError: the file cannot be written.
        UserError: its folder cannot be made.
    """
    if wish not in (STOP, SAMPLE):
        raise ValueError(f"wish={wish!r}: expected {STOP!r} or {SAMPLE!r}")
    paths.make_folder(workdir / FOLDER)
    paths.write_text(workdir / FOLDER / wish, "")


def pending(workdir: paths.Path) -> list[str]:
    """Return the wishes that the run has not read yet."""
    return [wish for wish in (STOP, SAMPLE) if (workdir / FOLDER / wish).exists()]
