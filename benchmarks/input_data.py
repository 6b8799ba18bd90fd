"""The data of benchmarks/input_pipeline.py: photo-like JPEGs, stored in every form sdjax reads."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from sdjax.data import encoded
from sdjax.data.config import DataConfig
from sdjax.data.encoded import Encoding
from sdjax.data.tfds.dataset_folder import Stored, file_name, write_metadata
from sdjax.data.tfds.tfds_on_cpu import tfds
from sdjax.encoding.encoder import write_records
from sdjax.system import paths

DIFFERENT = 20  # pictures are stored several times under other names: to decode, no two are alike
ASPECTS = (1, 4 / 3, 3 / 2, 3 / 4, 2 / 3)  # height over width


def photo(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Noise with the spectrum of photographs, amplitude 1 / frequency^1.2, in related channels."""
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width), np.float32))
    down, across = np.fft.fftfreq(height) * height, np.fft.rfftfreq(width) * width
    frequency = np.maximum(np.hypot(down[:, None], across), 1)
    planes = np.fft.irfft2(spectrum / frequency**1.2, s=(height, width))
    grey, one, other = planes / planes.std(axis=(1, 2), keepdims=True)
    pixels = np.stack([grey + 0.3 * one, grey, grey + 0.3 * other], -1) * 45 + 120
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_photos(folder: Path, resolution: int, count: int) -> None:
    """An image folder of `count` JPEGs of quality 90, short sides 1.1 to 1.8 x `resolution`."""
    rng = np.random.default_rng(resolution)
    files = []
    for i in range(min(count, DIFFERENT)):
        short, aspect = round(resolution * rng.uniform(1.1, 1.8)), ASPECTS[i % len(ASPECTS)]
        height, width = round(short * max(aspect, 1)), round(short / min(aspect, 1))
        buffer = io.BytesIO()
        photo(rng, height, width).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    folder.mkdir(parents=True)
    rows = []
    for i in range(count):
        (folder / f"{i:05}.jpg").write_bytes(files[i % len(files)])
        rows.append({"file_name": f"{i:05}.jpg", "text": f"hills and a lake, photograph {i}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def read_folder(folder: Path) -> list[tuple[Path, str]]:
    """The files of an image folder and their captions."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    return [(folder / row["file_name"], row["text"]) for row in map(json.loads, lines)]


class BenchmarkPhotos(tfds.core.GeneratorBasedBuilder):
    """The image folder as a TFDS dataset that is opened by its name."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded
    folder = Path()

    def _info(self) -> Any:
        # Not dataset_info_from_configs, which looks for files of a package.
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(shape=(None, None, 3)), "text": tfds.features.Text()}
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Any:
        for path, text in read_folder(self.folder):
            yield path.name, {"image": str(path), "text": text}


def stored_forms(work: Path, photos: Path, resolution: int, batch: int) -> dict[str, DataConfig]:
    """The photographs as every source of sdjax, made in `work` where it is not there yet."""
    common: dict[str, Any] = {
        "data_dir": str(work / "tfds"), "resolution": resolution, "batch_size": batch,
    }  # fmt: skip
    BenchmarkPhotos.folder = photos
    made = {
        "TFDS by name": DataConfig(name="benchmark_photos", **common),
        "image folder": DataConfig(name="image_text_folder", path=str(photos), **common),
        "webdataset": DataConfig(name="webdataset", path=str(_tars(work, photos)), **common),
        "parquet": DataConfig(name="parquet", path=str(_parquet(work, photos)), **common),
        "prepared": DataConfig(name="prepared", path=str(_prepared(work, photos)), **common),
    }
    folder = _encoded(work, photos, resolution)
    return made | {"encoded": DataConfig(name="encoded", path=str(folder), **common)}


def _tars(work: Path, photos: Path) -> Path:
    folder = work / "tars"
    if not folder.exists():
        folder.mkdir()
        with tarfile.open(folder / "00000.tar", "w") as tar:
            for path, text in read_folder(photos):
                tar.add(path, path.name)
                info = tarfile.TarInfo(f"{path.stem}.txt")
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
    return folder


def _parquet(work: Path, photos: Path) -> Path:
    folder = work / "parquet"
    if not folder.exists():
        folder.mkdir()
        rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "text": text}
                for path, text in read_folder(photos)]  # fmt: skip
        pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "train-00000.parquet")
    return folder


def _prepared(work: Path, photos: Path) -> Path:
    folder = work / "prepared"
    if not folder.exists():
        _run("--input", str(photos), "--output", str(folder), "--duplicates=none")
    return folder


def _encoded(work: Path, photos: Path, resolution: int) -> Path:
    """Records as `sdjax.prepare --encode` writes them, with Stable Diffusion's shape of moments.

    Their values are noise, which to read is as much work as others; to encode would take hours.
    """
    folder = paths.to_path(work / "encoded")
    if folder.exists():
        return Path(folder)
    folder.mkdir()
    encoding = Encoding(
        dataset="photos", networks={"vae": "none"}, dtype="bfloat16", resolution=resolution,
        crop="center", buckets={}, flipped=False, selection={}, images={}, numbers={},
    )  # fmt: skip
    rng, side = np.random.default_rng(0), resolution // 8
    examples = [
        {
            "moments": rng.standard_normal((side, side, 8), np.float32),
            "size": np.array([resolution, resolution, 0, 0], np.int32),
            "text": text, "captions": [], "main_share": 1.0, "file_name": path.name,
            "height": resolution, "width": resolution,
        }
        for path, text in read_folder(photos)
    ]  # fmt: skip
    features = encoded.features(tfds, encoding)
    file = folder / file_name("encoded", "train", 0, 1)
    stored = Stored([len(examples)], write_records(file, examples, features, encoding))
    write_metadata(folder, dataset="encoded", features=features, splits={"train": stored},
                   description="A benchmark.")  # fmt: skip
    encoded.write(folder, encoding, {})
    return Path(folder)


def _run(*arguments: str) -> None:
    """sdjax.prepare, in a process of its own: Beam stays out of what is measured."""
    command = [sys.executable, "-m", "sdjax.prepare", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
