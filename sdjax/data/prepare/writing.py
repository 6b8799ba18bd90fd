"""The last step: the kept examples as ArrayRecord shards that TFDS reads."""

from __future__ import annotations

import dataclasses
import shutil

from sdjax.data.prepare.cleaning import read_records
from sdjax.data.prepare.index import IndexEntry
from sdjax.data.prepare.settings import Workspace
from sdjax.data.tfds.dataset_folder import Stored, file_name
from sdjax.system import paths

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Output:
    """One file of the dataset, and its examples by shard of the input and number."""

    dataset: str
    split: str
    number: int
    total: int
    examples: int
    bytes: int
    parts: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def file(self) -> str:
        """The name of the file in TFDS."""
        return file_name(self.dataset, self.split, self.number, self.total)


def plan(
    dataset: str, kept: list[tuple[int, int, IndexEntry, str]], *, shard_bytes: int
) -> list[Output]:
    """The files to write for the (shard, row, entry, split) of all that is kept, in order."""
    outputs = []
    for split in SPLITS:
        groups: list[list[tuple[int, int, IndexEntry]]] = []
        filled = shard_bytes
        for shard, row, entry, its in kept:
            if its != split:
                continue
            if filled >= shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append((shard, row, entry))
            filled += entry.bytes
        for number, group in enumerate(groups):
            parts: dict[int, list[int]] = {}
            for shard, row, _ in group:
                parts.setdefault(shard, []).append(row)
            outputs.append(
                Output(
                    dataset,
                    split,
                    number,
                    len(groups),
                    len(group),
                    sum(entry.bytes for _, _, entry in group),
                    tuple((shard, tuple(rows)) for shard, rows in parts.items()),
                )
            )
    return outputs


def write_output(output: Output, *, workspace: Workspace) -> int:
    """Copy the examples of one file, unless it exists. Return the number of examples."""
    from array_record.python import array_record_module

    target = workspace.folder / output.file
    if not target.exists():
        with workspace.writing(target) as local:
            writer = array_record_module.ArrayRecordWriter(str(local), "group_size:1")
            for shard, rows in output.parts:
                for record in read_records(workspace, shard, list(rows)):
                    writer.write(record)
            writer.close()
    return output.examples


def stored(outputs: list[Output]) -> dict[str, Stored]:
    """The files of each split, as the metadata take them."""
    splits: dict[str, list[Output]] = {}
    for output in outputs:
        splits.setdefault(output.split, []).append(output)
    return {
        split: Stored([file.examples for file in files], sum(file.bytes for file in files))
        for split, files in splits.items()
    }


def remove_work(workspace: Workspace) -> None:
    """Delete the intermediate files of a finished run."""
    if paths.is_remote(workspace.work):
        paths.remove(workspace.work)
    else:
        shutil.rmtree(workspace.work)
