"""A small dataset as `sdjax.prepare` stores one, whose files tests then spoil."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

EXAMPLES = 4


def write(folder: Path) -> Path:
    """Write a dataset with the split `train`, of pictures that are plain, into an empty folder."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from sdjax.data.prepare import cleaning
    from sdjax.data.tfds.dataset_folder import Stored, file_name, write_metadata
    from sdjax.data.tfds.tfds_on_cpu import tfds

    features = cleaning.features(())
    maker = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    file = folder / file_name("stranger", "train", 0, 1)
    writer, size = ArrayRecordWriter(str(file), "group_size:1"), 0
    for i in range(EXAMPLES):
        data = io.BytesIO()
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(data, "PNG")
        example = {
            "image": data.getvalue(), "text": f"red {i}", "captions": [f"red {i}"],
            "file_name": f"{i}.png", "width": 16, "height": 16,
            "original_width": 16, "original_height": 16,
        }  # fmt: skip
        record = maker.get_tf_example(features.encode_example(example)).SerializeToString()
        writer.write(record)
        size += len(record)
    writer.close()
    write_metadata(
        folder,
        dataset="stranger",
        features=features,
        splits={"train": Stored([EXAMPLES], size)},
        description="",
    )
    return folder


def read(folder: Path) -> list[np.ndarray]:
    """Return the pictures of the dataset, read as training reads them."""
    from sdjax.data.config import DataConfig
    from sdjax.data.sources import open_source

    source = open_source(DataConfig(name="prepared", path=str(folder), resolution=16), "train")
    source.texts()
    _ = source.table
    return [source[i]["image"] for i in range(len(source))]
