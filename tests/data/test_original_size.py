"""The size of a picture before it was stored smaller, from raw files to what SDXL is told."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdjax.data.config import DataConfig
from sdjax.data.pipeline import make_iterator

# Stored 40 x 20 (height, width): what the data says of the original -> what is told.
CASES = {
    "larger": ({"original_height": 400, "original_width": 200}, (400, 200)),
    "text": ({"original_height": "400", "original_width": "200"}, (400, 200)),
    "nothing": ({}, (40, 20)),
    "half": ({"original_height": 400}, (40, 20)),
    "null": ({"original_height": None, "original_width": None}, (40, 20)),
    "smaller": ({"original_height": 4, "original_width": 2}, (40, 20)),
    "endless": ({"original_height": 10**12, "original_width": 10**12}, (40, 20)),
    "words": ({"original_height": "tall", "original_width": [3]}, (40, 20)),
    "infinite": ({"original_height": float("inf"), "original_width": 200}, (40, 20)),
    "lying": ({"original_height": 200, "original_width": 400}, (400, 200)),  # turned by EXIF
}


def jpeg(name):
    lying = name == "lying"
    image = Image.new("RGB", (40, 20) if lying else (20, 40), (len(name) * 9, 80, 40))
    exif, buffer = Image.Exif(), io.BytesIO()
    if lying:
        exif[0x0112] = 6
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def write_folder(folder):
    with (folder / "metadata.jsonl").open("w") as lines:
        for name, (fields, _) in CASES.items():
            (folder / f"{name}.jpg").write_bytes(jpeg(name))
            lines.write(json.dumps({"file_name": f"{name}.jpg", "text": name, **fields}) + "\n")
    return "image_text_folder"


def write_tar(folder):
    with tarfile.open(folder / "000.tar", "w") as tar:
        for name, (fields, _) in CASES.items():
            files = {"jpg": jpeg(name), "json": json.dumps({"caption": name, **fields}).encode()}
            for kind, data in files.items():
                member = tarfile.TarInfo(f"{name}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return "webdataset"


def write_parquet(folder):
    def column(key):  # of whole numbers, as a table has them
        found = (fields.get(key) for fields, _ in CASES.values())
        return [value if type(value) is int else None for value in found]

    table = {
        "image": [{"bytes": jpeg(name), "path": None} for name in CASES],
        "text": list(CASES),
        "original_height": pa.array(column("original_height"), pa.int64()),
        "original_width": pa.array(column("original_width"), pa.int64()),
    }
    pq.write_table(pa.table(table), folder / "000.parquet")
    return "parquet"


class First:
    """A tokenizer stand-in: the number of the case."""

    def encode(self, texts):
        return np.array([[list(CASES).index(text)] for text in texts], np.int32)


@pytest.mark.parametrize("write", [write_folder, write_tar, write_parquet])
def test_sdxl_is_told_the_original_size(write, tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    config = DataConfig(
        name=write(folder), path=str(folder), data_dir=str(tmp_path / "tfds"), batch_size=4,
        resolution=16, crop="center",
    )  # fmt: skip
    told = {}
    for split in ("train", "test"):
        iterator = make_iterator(
            config, {"tokens": First()}, split=split, seed=0, number_shapes={"size": (4,)}
        )
        for _ in range(3):
            batch = next(iterator)
            for number, size in zip(batch["tokens"][:, 0], batch["size"], strict=True):
                told[list(CASES)[number]] = tuple(size[:2])
                # The crop is that of the resized picture, 32 x 16, whatever it was before.
                assert tuple(size[2:]) == (8, 0)
        iterator.close()
    expected = {name: size for name, (_, size) in CASES.items()}
    if write is write_parquet:
        expected["text"] = (40, 20)
    assert told == expected
