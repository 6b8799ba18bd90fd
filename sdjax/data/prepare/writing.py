"""The last step: the examples that are left, as ArrayRecord shards that TFDS reads."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

from sdjax import paths
from sdjax.data.prepare.cleaning import Entry, features, read_records
from sdjax.data.prepare.settings import Place
from sdjax.data.sources import FORMAT

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Output:
    """One file of the dataset: which examples are in it, by shard of the input and number."""

    dataset: str
    split: str
    number: int
    total: int
    examples: int
    bytes: int
    parts: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def file(self) -> str:
        """Named as TFDS names them."""
        return f"{self.dataset}-{self.split}.{FORMAT}-{self.number:05}-of-{self.total:05}"


def plan(
    dataset: str, kept: list[tuple[int, int, Entry, str]], *, shard_bytes: int
) -> list[Output]:
    """(shard, row, entry, split) of all that is kept, in order -> the files to write."""
    outputs = []
    for split in SPLITS:
        groups: list[list[tuple[int, int, Entry]]] = []
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


def write_output(output: Output, *, place: Place) -> int:
    """Copies the examples of one file, unless it is there. Returns how many it holds."""
    from array_record.python import array_record_module

    target = place.folder / output.file
    if not target.exists():
        with place.writing(target) as local:
            writer = array_record_module.ArrayRecordWriter(str(local), "group_size:1")
            for shard, rows in output.parts:
                for record in read_records(place, shard, list(rows)):
                    writer.write(record)
            writer.close()
    return output.examples


def write_metadata(
    outputs: list[Output], *, place: Place, scores: tuple[str, ...], description: str
) -> None:
    """Writes what makes TFDS open the folder: dataset_info.json and features.json."""
    from sdjax.data.tfds_on_cpu import quiet_tfds, tfds

    name = outputs[0].dataset
    splits = []
    for split in SPLITS:
        files = [output for output in outputs if output.split == split]
        if files:
            splits.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[output.examples for output in files],
                    num_bytes=sum(output.bytes for output in files),
                    filename_template=tfds.core.ShardedFileTemplate(
                        data_dir=place.folder,
                        dataset_name=name,
                        split=split,
                        filetype_suffix=FORMAT,
                        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    ),
                )
            )
    with quiet_tfds():
        tfds.folder_dataset.write_metadata(
            data_dir=str(place.folder),
            features=features(scores),
            split_infos=splits,
            filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            check_data=False,
            description=description,
        )


def remove_work(place: Place) -> None:
    """Deletes what a finished run needs no more."""
    if paths.is_remote(place.work):
        paths.remove(place.work)
    else:
        shutil.rmtree(place.work)


def names_of_splits(outputs: list[Output]) -> dict[str, Any]:
    """{split: examples} in the order of the files."""
    sizes: dict[str, int] = {}
    for output in outputs:
        sizes[output.split] = sizes.get(output.split, 0) + output.examples
    return sizes
