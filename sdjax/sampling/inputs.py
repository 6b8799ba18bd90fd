"""Prompts and initial noise, from the files of a command line."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sdjax.data.pictures import METADATA
from sdjax.errors import UserError
from sdjax.system import paths, text_files, untrusted


def read_prompts(prompts: Sequence[str], file: str | None) -> list[str]:
    """Prompts of the flags, then those of the file (empty lines left out).

    Raises:
        UserError: there are none, or the file cannot be read.
    """
    found = list(prompts)
    if file:
        try:
            text = text_files.read_text(file, pipes=True)
        except text_files.TextError as error:
            raise UserError(f"--prompts_file={error}") from error
        found += [line.strip() for line in text_files.lines(text) if line.strip()]
    if not found:
        raise UserError('no prompts: give --prompts="..." or --prompts_file=FILE')
    return found


def repeated(prompts: Sequence[str], count: int | None) -> list[str]:
    """Return `count` prompts, from the first again after the last; as they are if it is None.

    Raises:
        UserError: there would be none.
    """
    if count is None:
        return list(prompts)
    if count < 1:
        raise UserError(f"--count={count}; expected at least 1")
    return [prompts[i % len(prompts)] for i in range(count)]


def write_metadata(folder: paths.Path, files: Sequence[str], texts: Sequence[str]) -> None:
    """Write metadata.jsonl, so that pictures of a folder are a dataset with captions."""
    rows = [
        json.dumps({"file_name": file, "text": text})
        for file, text in zip(files, texts, strict=True)
    ]
    paths.write_text(folder / METADATA, "".join(f"{row}\n" for row in rows))


def read_latents(file: str, count: int, shape: tuple[int, int, int]):
    """Initial noise [count, h, w, C] float32 from a .npy file in either layout.

    Raises:
        UserError: the file is no array, or of another shape.
    """
    import numpy as np

    from sdjax.system import array_files

    height, width, channels = shape
    try:
        with paths.reading(file) as local:
            latents = array_files.read_npy(local).astype(np.float32)
    except untrusted.damage() as error:
        why = text_files.pointer_note(file) or untrusted.why(error)
        raise UserError(f"--latents={file} cannot be read as a NumPy array: {why}") from error
    if latents.shape == (count, height, width, channels):
        return latents
    if latents.shape == (count, channels, height, width):
        return latents.transpose(0, 2, 3, 1)
    raise UserError(
        f"--latents={file} has shape {list(latents.shape)}; expected "
        f"{[count, height, width, channels]} or {[count, channels, height, width]} for {count} "
        f"prompts of {width} x {height} latents"
    )
