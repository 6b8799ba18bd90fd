"""A folder of ArrayRecord files as a dataset that TFDS opens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdjax.system import paths

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
FORMAT = "array_record"


@dataclasses.dataclass(frozen=True)
class Stored:
    """The files of a split: the number of examples in each, in order, and the bytes of all."""

    lengths: list[int]
    size: int


def file_name(dataset: str, split: str, shard: int, count: int) -> str:
    """The name of a shard in TFDS."""
    return f"{dataset}-{split}.{FORMAT}-{shard:05d}-of-{count:05d}"


def write_metadata(
    folder: paths.Path, *, dataset: str, features: Any, splits: Mapping[str, Stored],
    description: str,
) -> None:  # fmt: skip
    """Write dataset_info.json and features.json, which come last and make the folder readable."""
    from sdjax.data.tfds.tfds_on_cpu import quiet_tfds, tfds

    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=stored.lengths,
            num_bytes=stored.size,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder,
                dataset_name=dataset,
                split=split,
                filetype_suffix=FORMAT,
                template=TEMPLATE,
            ),
        )
        for split, stored in splits.items()
    ]
    with quiet_tfds():
        tfds.folder_dataset.write_metadata(
            data_dir=str(folder),
            features=features,
            split_infos=infos,
            filename_template=TEMPLATE,
            check_data=False,
            description=description,
        )
