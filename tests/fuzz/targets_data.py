"""Hostile pictures, captions, folders, tars, parquet and metadata for the readers of raw data.

Every input is read as an import reads it. It passes if each row comes out as an example or as a
skip with a reason, or if the input is refused in words.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import gzip
import io
import json
import os
import struct
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sdjax.data import transforms
from sdjax.data.image_files import ImageError, read_image
from sdjax.data.raw import formats
from sdjax.data.raw.clean import Example, Rules, ScoreRule, clean
from sdjax.data.raw.remedies import unusable
from sdjax.data.raw.rows import Fields, Row, Skip
from sdjax.errors import UserError
from tests.fuzz import mutation

# Pictures of the usual limit, 50 megapixels, may take more than the bound: SECURITY.md says so.
_RULES = Rules(min_side=1, max_aspect=0, max_pixels=10_000_000)
_KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "MPO")
_OTHERS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n", b"8BPS\0\1", b"icns",
    b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0", b"DDS |\0\0\0", b"P6\n99999 99999\n255\n", b"BLP2",
    b"qoif\xff\xff\xff\xff\xff\xff\xff\xff\3\0", b"GIF89a", b"RIFF\xff\xff\xff\xffWEBPVP8X",
    b"\0\0\0\x1cftypavif", b"II*\0\x08\0\0\0", b"MM\0+\0\x08\0\0", b"BM", b"\xff\xd8\xff", b"",
)  # fmt: skip
_SIZES = (0, 1, 2, 255, 256, 4096, 32767, 32768, 65535, 10**6, 2**31 - 1, 2**31, 2**32 - 1)


@functools.cache
def _pictures() -> tuple[bytes, ...]:
    """Good pictures in all formats and many modes."""
    rng = np.random.default_rng(0)
    made = []
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description" * 9
    for kind in _KINDS:
        for mode in ("RGB", "L", "RGBA", "P", "CMYK", "I;16"):
            image = Image.fromarray(rng.integers(0, 256, (23, 17, 3), np.uint8)).convert("RGB")
            image = image.convert("L" if mode == "I;16" else mode).convert(mode)
            options: list[dict[str, Any]] = [{}, {"exif": exif.tobytes()}]
            options += [{"progressive": True}] if kind in ("JPEG", "MPO") else []
            options += [{"compression": "tiff_lzw"}] if kind == "TIFF" else []
            options += [{"compression": "jpeg"}] if (kind, mode) == ("TIFF", "RGB") else []
            options += [{"save_all": True, "append_images": [image] * 3}]
            for chosen in options:
                buffer = io.BytesIO()
                try:
                    image.save(buffer, kind, **chosen)
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # a format that has no such mode
                made.append(buffer.getvalue())
    return tuple(made)


def _picture(rng: np.random.Generator) -> bytes:
    """A picture, good one time in four."""
    data = _pictures()[rng.integers(len(_pictures()))]
    act = rng.random()
    if act < 0.25:
        return data
    if act < 0.6:
        return mutation.damaged(rng, data)
    if act < 0.8:  # a number in the header at one of its edges
        form = str(rng.choice(["<H", ">H", "<I", ">I"]))
        value = int(rng.choice(_SIZES)) % 256 ** struct.calcsize(form)
        at = int(rng.integers(min(len(data), 300)))
        number = struct.pack(form, value)
        return data[:at] + number + data[at + len(number) :]
    if act < 0.9:  # a part again and again
        start, stop = sorted(int(n) for n in rng.integers(len(data), size=2))
        return data[:start] + data[start:stop] * int(rng.integers(2, 60)) + data[stop:]
    if act < 0.95:
        return _OTHERS[rng.integers(len(_OTHERS))] + rng.bytes(int(rng.integers(600)))
    return data[: rng.integers(len(data))] + _pictures()[rng.integers(len(_pictures()))]


def picture(rng: np.random.Generator, folder: Path) -> str:
    """A picture, in an import and in a report."""
    data = _picture(rng)
    (folder / "a.png").write_bytes(data)
    try:
        read_image(folder / "a.png", max_pixels=_RULES.max_pixels).convert("RGB")
    except (ImageError, UserError):
        pass
    try:
        transforms.upright_size(data)
    except ImageError:
        pass
    return _outcome(clean(Row("a", "train", data, "text"), _RULES))


def _outcome(found: Example | Skip) -> str:
    if isinstance(found, Skip):
        assert found.reason and len(found.detail) < 2000 and len(found.name) < 2000, found
        return found.reason
    height, width = found.pixels.shape[:2]
    assert transforms.decode(found.image).shape == (height, width, 3)
    return "example"


def _read(path: Path, format: str, fields: Fields | None = None, rules: Rules = _RULES) -> str:
    """All rows of a source, as an import reads them, twice for names; the first row's outcome."""
    fields = fields or Fields(columns=("score",))
    found: Counter[str] = Counter()
    skips = []
    try:
        survey = formats.survey(str(path), format, fields)
        formats.fingerprint(survey.shards, fields)
        survey.lines()
        for shard in survey.shards:
            for _ in formats.names(shard):
                pass
            for item in formats.read(shard, fields):
                made = clean(item, rules) if isinstance(item, Row) else item
                found[_outcome(made)] += 1
                if isinstance(made, Skip):
                    skips.append(made)
    except UserError as error:
        assert len(str(error)) < 5000, f"a message of {len(str(error))} characters"
        return "refused"
    unusable(skips, {}, {})
    return found.most_common(1)[0][0] if found else "nothing"


def _text(rng: np.random.Generator) -> bytes:
    """A caption."""
    some = (b"a cat", b"", b"\xff\xfe", b"\xef\xbb\xbfa", b"x" * 500_000, b"a\0b",
            b"&amp;" * 50_000,
            "\u200b".encode(), b"\xed\xa0\x80", b"version https://git-lfs.github.com/spec/v1\n",
            b"\xff\xfe\0\xd8", "é".encode() * 150_000, b"\r\n" * 99)  # fmt: skip
    return some[rng.integers(len(some))]


def pictures_and_captions(rng: np.random.Generator, folder: Path) -> str:
    """A folder of pictures and captions, links, pipes and folders that are called like them."""
    for number in range(int(rng.integers(1, 5))):
        (folder / f"{number}.png").write_bytes(_picture(rng))
        (folder / f"{number}.txt").write_bytes(_text(rng))
    for _ in range(int(rng.integers(1, 5))):
        place = folder / str(
            rng.choice(["x.png", "0.txt", "sub", "x.txt", "metadata.jsonl", "y.jpg"])
        )
        targets = ("/dev/zero", "/etc/passwd", ".", "..", str(folder), "x.png", "gone", "sub/sub",
                   "/", "0.png", "/proc/self/environ", "pipe")  # fmt: skip
        act = rng.random()
        if place.exists() or place.is_symlink():
            continue
        if act < 0.6:
            place.symlink_to(targets[rng.integers(len(targets))])
        elif act < 0.75:
            os.mkfifo(place)
        elif act < 0.9:
            place.mkdir()
        else:
            with place.open("wb") as file:
                file.truncate(1 << int(rng.integers(10, 44)))  # ext4 has no larger ones
    return _read(folder, "image_text_folder")


def metadata(rng: np.random.Generator, folder: Path) -> str:
    """Metadata in lines, as an array or as CSV, with hostile values, rows and bytes."""
    rows: list[Any] = [
        {"file_name": f"{n % 3}.png", "text": "a cat", "captions": ["b", "c"], "score": n / 4}
        for n in range(int(rng.integers(1, 30)))
    ]
    for number in range(3):
        (folder / f"{number}.png").write_bytes(_pictures()[0])
    rows = [mutation.tree(rng, row) if rng.random() < 0.4 else row for row in rows]
    kind = rng.integers(3)
    if kind == 0:
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, delimiter=str(rng.choice(list(",;\t|"))))
        writer.writerow(["file_name", "text", "score"])
        for row in rows:
            cells = (
                row.values() if isinstance(row, dict) else row if isinstance(row, list) else [row]
            )
            writer.writerow([str(cell)[: int(rng.choice([10, 10**6]))] for cell in cells])
        name, text = "metadata.csv", buffer.getvalue()
    else:
        name = "metadata.jsonl"
        lines = [_dumped(row) for row in rows]
        text = "\n".join(lines) if kind == 1 else f"[{','.join(lines)}]"
    codec = str(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"]))
    data = text.encode(codec, "surrogatepass")
    if rng.random() < 0.4:
        data = mutation.damaged(rng, data)
    if rng.random() < 0.05:
        data += b"\n" + b"[" * 200_000 + b"\n" + b"9" * 20_000 + b"\n" + b"x" * 5_000_000
    (folder / name).write_bytes(data)
    return _read(
        folder, "image_text_folder", rules=dataclasses.replace(_RULES, scores=(ScoreRule("score"),))
    )


def _dumped(row: Any) -> str:
    try:
        return json.dumps(row)
    except (ValueError, RecursionError, TypeError):
        return '{"file_name": ' + "9" * 5000 + "}"


def tar(rng: np.random.Generator, folder: Path) -> str:
    """A tar with damaged headers, of which some have the right sum, packed or not."""
    buffer = io.BytesIO()
    form = int(rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    ends = (".jpg", ".txt", ".json", ".seg.png", ".bin", ".cls", "", ".input.jpg")
    with tarfile.open(fileobj=buffer, mode="w", format=form) as made:
        for number in range(int(rng.integers(1, 8))):
            name = f"{number // 2}" * int(rng.choice([1, 1, 60, 200])) + str(rng.choice(ends))
            info = tarfile.TarInfo(name)
            data = _text(rng)[:5000] if name.endswith("txt") else _picture(rng)
            if name.endswith("json"):
                data = _dumped(mutation.tree(rng, {"caption": "a", "score": 1})).encode("utf-8")
            info.size = len(data)
            if rng.random() < 0.2:
                info.type = bytes([rng.choice(list(b"0123456789LKSxgXVMD\0"))])
            try:
                made.addfile(info, io.BytesIO(data))
            except ValueError:  # a name that is too long for the format
                continue
    data = bytearray(buffer.getvalue())
    for _ in range(int(rng.integers(0, 5))):
        at = 512 * int(rng.integers(len(data) // 512))
        fields = (
            (124, b"\x80" + b"\0" * 5 + rng.bytes(6)), (124, b"77777777777\0"), (482, b"\1"),
            (156, rng.bytes(1)), (0, rng.bytes(9)), (345, rng.bytes(20)), (124, rng.bytes(12)),
        )  # fmt: skip
        place, value = fields[rng.integers(len(fields))]
        data[at + place : at + place + len(value)] = value
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    whole = bytes(data) if rng.random() < 0.7 else mutation.damaged(rng, bytes(data))
    if rng.random() < 0.2:  # a long run of zeros, which gzip makes nothing of
        whole += bytes(1 << int(rng.integers(10, 25)))
    if rng.random() < 0.3:
        whole = gzip.compress(whole, 1)
        whole = mutation.damaged(rng, whole) if rng.random() < 0.3 else whole
    (folder / "a.tar").write_bytes(whole)
    return _read(folder, "webdataset")


_COLUMNS = ("image", "text", "captions", "score", "original_width", "file_name")


def parquet(rng: np.random.Generator, folder: Path) -> str:
    """A parquet file of odd types, of values repeated very often, or with damaged bytes."""
    count = int(rng.integers(1, 200))
    arrays = [_column(rng, count) for _ in _COLUMNS]
    names = list(_COLUMNS)
    if rng.random() < 0.6:
        arrays[0] = pa.array([_picture(rng) for _ in range(count)])
    if rng.random() < 0.6:
        arrays[1] = pa.array([f"text {n}" for n in range(count)])
    if rng.random() < 0.1:
        names[2] = "text"
    options = {"compression": str(rng.choice(["zstd", "snappy", "gzip", "none"])),
               "row_group_size": int(rng.choice([1, 7, 1000])),
               "use_dictionary": bool(rng.random() < 0.8),
               "data_page_version": str(rng.choice(["1.0", "2.0"]))}  # fmt: skip
    as_metadata = rng.random() < 0.3
    path = folder / ("metadata.parquet" if as_metadata else "a.parquet")
    (folder / "0.png").write_bytes(_pictures()[0])
    try:
        pq.write_table(pa.Table.from_arrays(arrays, names), path, **options)
    except (pa.ArrowException, ValueError):  # of a type that parquet does not have
        return "not written"
    if rng.random() < 0.4:
        path.write_bytes(mutation.damaged(rng, path.read_bytes()))
    return _read(folder, "image_text_folder" if as_metadata else "parquet")


def _column(rng: np.random.Generator, count: int) -> Any:
    """A column of any type, whose values may be long, in all at most 32 MiB."""
    long = min(1 << int(rng.integers(1, 21)), (32 << 20) // count)
    values: tuple[Any, ...] = (
        "x" * long, b"\xff" * long, 5, 1.5, None, ["a", "b"], ["x" * (long >> 6)] * 50,
        {"bytes": b"x"}, {"bytes": bytes(long), "path": "a"}, [[1]], "0.png", True, "../0.png",
    )  # fmt: skip
    act = rng.random()
    if act < 0.15:
        return pa.array(rng.integers(-(2**31), 2**31, count), pa.int32()).cast(pa.date32())
    if act < 0.25:
        return pa.array(rng.integers(-(2**62), 2**62, count)).cast(pa.timestamp("us"))
    value = values[rng.integers(len(values))]
    if act < 0.5 and isinstance(value, str | bytes):
        numbers = pa.array(np.zeros(count, np.int32))
        return pa.array([value]).dictionary_encode().take(numbers)
    return pa.array([value] * min(count, 3) + [None] * (count - min(count, 3)))


TARGETS = [
    ("picture", picture),
    ("folder", pictures_and_captions),
    ("metadata", metadata),
    ("tar", tar),
    ("parquet", parquet),
]
