"""Pictures that a model of coloured shapes draws, and what the reader of shapes finds in them.

The reader is sdjax/data/builders/shape_reader.py, which also reads the pictures of a run's end.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdjax.data.builders.shape_reader import score
from sdjax.data.builders.shapes import Wanted

HEADER = f"{'':36}" + "".join(f"{name:>9}" for name in ("colour", "shape", "size", "place", "all"))


def drawn(model: str, prompts: list[str], options: list[str], keep: Path | None) -> np.ndarray:
    """Pictures [N, H, W, 3] uint8 that `sdjax.sample` draws, one of each prompt.

    keep: a folder for them; by default they are not kept.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
        command = [
            sys.executable, "-m", "sdjax.sample", f"--model={model}", f"--output={folder}",
            f"--prompts_file={folder / 'prompts.txt'}", "--batch_size=64", *options,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        files = sorted(folder.glob("[0-9]*.png"))
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def line(name: str, wanted: Sequence[Sequence[Wanted]], images: np.ndarray) -> str:
    """A row under `HEADER`: the shares of pictures that show what is wanted."""
    shares = score(wanted, images)
    shares.pop("samples")
    return f"{name:36}" + "".join(f"{100 * value:7.1f} %" for value in shares.values())
