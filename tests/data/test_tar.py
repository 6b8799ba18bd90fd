"""Tars: what the standard library reads of them, and those that would take all memory or time."""

import gzip
import io
import random
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest

from sdjax.data.raw import formats, limits, tar, webdataset
from sdjax.data.raw.rows import Fields, Row, Shard

NAMES = ["a.jpg", "b" * 99, "c" * 100, "d" * 101, "folder/" * 30 + "e.png", "f" * 300 + ".txt",
         "é" * 60 + ".jpg", "sp ace.json", "folder/" * 14 + "x" * 90 + ".jpg", "../up",
         "\udcff.txt"]  # fmt: skip
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
EVERYTHING = 1 << 62


def archive(entries, format=tarfile.GNU_FORMAT, **headers):
    """A tar of (name, content); of another type for a tuple of that."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, **headers) as made:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                made.addfile(info, io.BytesIO(content))
            else:
                (info.type,), info.linkname = content, "somewhere" * 10
                made.addfile(info)
    return buffer.getvalue()


def read(data, wanted=lambda name: EVERYTHING):
    return [(m.name, m.data) for m in tar.members(io.BytesIO(data), wanted)]


def header(name="a.jpg", size=0, kind=b"0", **fields):
    """A header that says whatever it is told to, with the right sum."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    block[124:136] = (b"%011o\0" % size) if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    for at, value in fields.items():
        at = int(at.removeprefix("at"))
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data):
    return data + bytes(-len(data) % 512)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("packed", [False, True])
def test_members_are_those_that_the_standard_library_reads(format, packed):
    rng = random.Random(0)
    entries = [(name, rng.randbytes(rng.choice([0, 1, 511, 512, 513, 70_000]))) for name in NAMES]
    others = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)
    entries[3:3] = [(f"other{n}", (type,)) for n, type in enumerate(others)]
    kept, left = [], 0
    for entry in entries:
        try:
            archive([entry], FORMATS[format])
            kept.append(entry)
        except (ValueError, UnicodeEncodeError):  # a name that the format cannot hold
            left += 1
    assert left <= 4
    data = archive(kept, FORMATS[format])
    with tarfile.open(fileobj=io.BytesIO(data)) as theirs:
        expected = [(m.name, theirs.extractfile(m).read()) for m in theirs if m.isfile()]
    assert len(expected) == len(kept) - 4
    data = gzip.compress(data) if packed else data
    assert read(data) == expected
    some = read(data, lambda name: 600 if name.endswith("g") else 0)
    assert some == [(n, c if n.endswith("g") and len(c) <= 600 else None) for n, c in expected]


def test_global_headers_and_pax_sizes_are_read():
    data = archive([("a.jpg", b"abc")], tarfile.PAX_FORMAT, pax_headers={"comment": "git"})
    assert read(data) == [("a.jpg", b"abc")]
    record = b"12 size=600\n"
    data = header(kind=b"x", size=len(record)) + padded(record)
    data += header(size=0) + padded(b"x" * 600) + bytes(1024)
    assert read(data) == [("a.jpg", b"x" * 600)]


BROKEN_PAX = [b"", b"x", b"5 a=b\n", b"7 a=b\n", b"99 a=b\n", b"-6 a=b\n", b"6 a=bc", b"6 abcd\n",
              b"9" * 5000 + b" a=b\n", b"13 size=-600\n", b"14 size=1e999\n",
              b"%d size=%s\n" % (5011, b"9" * 5000)]  # fmt: skip


@pytest.mark.parametrize("record", BROKEN_PAX[1:])
def test_odd_pax_header_ends_the_archive_in_words(record):
    data = archive([("first.jpg", b"1")])[:1024]
    data += header(kind=b"x", size=len(record)) + padded(record)
    data += header() + bytes(1024)
    found = tar.members(io.BytesIO(data), lambda name: EVERYTHING)
    assert next(found).name == "first.jpg"
    with pytest.raises(tar.TarError):
        next(found)


def sparse_gnu():
    """400 bytes that claim to be 9 GB, as GNU tar writes them."""
    holes = b"%011o\0%011o\0" % (0, 0) + bytes(72) + b"\0" + b"%011o\0" % (8**11 - 1)
    return header("a.jpg", 0, b"S", at386=holes) + bytes(1024)


def sparse_pax():
    entries = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg",
               "GNU.sparse.realsize": str(9 * 10**9)}  # fmt: skip
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as made:
        info = tarfile.TarInfo("GNUSparseFile.0/a.jpg")
        info.pax_headers, info.size = entries, 512
        made.addfile(info, io.BytesIO(padded(b"1\n0\n1\n")))
    return buffer.getvalue()


HOSTILE = {
    "a sparse member of GNU": (sparse_gnu(), "bad_record"),
    "a sparse member of pax": (sparse_pax(), "bad_record"),
    "a picture of 2^40 bytes": (header(size=1 << 40), "bad_shard"),
    "a member of 2^40 bytes that nobody reads": (header("a.bin", 1 << 40), "bad_shard"),
    "a member of 2^62 bytes": (header("a.bin", 1 << 62), "bad_shard"),
    "a negative size": (header(at124=b"\xff" * 12), "bad_shard"),
    "a name of 2^40 bytes": (header(kind=b"L", size=1 << 40), "bad_shard"),
    "a pax header of 2^40 bytes": (header(kind=b"x", size=1 << 40), "bad_shard"),
    "3,000 headers in a row": (header(kind=b"x") * 3_000 + header(), "bad_shard"),
    "3,000 long names in a row": (header(kind=b"L") * 3_000 + header(), "bad_shard"),
    "bzip2": (b"BZh91AY&SY", "bad_shard"),
    "gzip that breaks off": (gzip.compress(archive([("a.jpg", b"1" * 9999)]))[:-40], "bad_shard"),
    "gzip that is damaged": (b"\x1f\x8b\x08\0" + b"\xff" * 60, "bad_shard"),
    "nothing": (b"", "bad_shard"),
    "one letter": (b"x", "bad_shard"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tar_is_read_up_to_its_fault_in_no_time_and_memory(what, tmp_path):
    data, reason = HOSTILE[what]
    good = archive([("0.jpg", b"picture"), ("0.txt", b"caption")])[: 4 * 512]
    if what not in ("bzip2", "nothing", "one letter") and "gzip" not in what:
        data = good + data + bytes(1024)
    (tmp_path / "a.tar").write_bytes(data)
    shard = Shard("webdataset", str(tmp_path), str(tmp_path / "a.tar"), "train")
    tracemalloc.start()
    began = time.monotonic()
    rows = list(formats.read(shard, Fields()))
    names = list(formats.names(shard))
    seconds, (_, peak) = time.monotonic() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows[-1].reason == reason, rows
    if data.startswith(good):
        assert isinstance(rows[0], Row) and rows[0].text == b"caption"
        assert names[0] == "a.tar/0.jpg"
    assert seconds < 3 and peak < 5e6


def test_gzip_bomb_is_read_up_to_its_limit(tmp_path, monkeypatch):
    """Zeros are packed to a thousandth; a member that nobody reads is unpacked all the same."""
    monkeypatch.setattr(tar, "EXPANSION_SLACK", 1 << 20)
    entries = [("0.jpg", b"picture"), ("0.txt", b"0"), ("z.bin", bytes(20 << 20)), ("1.jpg", b"1")]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(archive(entries)))
    shard = Shard("webdataset", str(tmp_path), str(tmp_path / "a.tar.gz"), "train")
    tracemalloc.start()
    rows = list(formats.read(shard, Fields()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [getattr(row, "reason", "") for row in rows] == ["", "bad_shard"]
    assert "100 times its size" in rows[1].detail and peak < 2e6


def test_members_that_are_too_large_are_counted_and_not_read(tmp_path, monkeypatch):
    for kind, most in (("image", 100), (".txt", 50), ("json", 60)):
        monkeypatch.setitem(webdataset._MOST, kind, most)
    entries = [
        ("0.jpg", b"x" * 101), ("0.txt", b"0"), ("1.jpg", b"x" * 100), ("1.txt", b"y" * 51),
        ("2.jpg", b"x"), ("2.json", b"z" * 61), ("3.jpg", b"x"), ("3.txt", b"three"),
        ("3.json", b"z" * 61), ("4.jpg", b"x"), ("4.json", b'{"text": %s}' % (b"9" * 45)),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(archive(entries))
    shard = Shard("webdataset", str(tmp_path), str(tmp_path / "a.tar"), "train")
    found = {row.name[6:]: getattr(row, "reason", "") for row in formats.read(shard, Fields())}
    assert found == {"0.jpg": "too_many_bytes", "1.jpg": "caption_too_long",
                     "2.jpg": "caption_too_long", "3.jpg": "", "4.jpg": ""}  # fmt: skip


def test_pictures_of_one_key_are_held_within_the_limit_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MOST_PICTURE_BYTES", 100)
    entries = [("0.a.jpg", b"x" * 60), ("0.a.txt", b"a"), ("0.b.jpg", b"x" * 60), ("0.b.txt", b"b"),
               ("1.jpg", b"x" * 60), ("1.txt", b"one")]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(archive(entries))
    shard = Shard("webdataset", str(tmp_path), str(tmp_path / "a.tar"), "train")
    found = {row.name[6:]: getattr(row, "reason", "") for row in formats.read(shard, Fields())}
    assert found == {"0.a.jpg": "", "0.b.jpg": "too_many_bytes", "1.jpg": ""}


def test_number_of_json_with_5000_digits_leaves_the_row_its_caption(tmp_path):
    entries = [("0.jpg", b"x"), ("0.txt", b"zero"), ("0.json", b'{"a": ' + b"9" * 5000 + b"}"),
               ("1.jpg", b"x"), ("1.txt", b"one"), ("1.json", b"[" * 100_000)]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(archive(entries))
    shard = Shard("webdataset", str(tmp_path), str(tmp_path / "a.tar"), "train")
    assert [row.text for row in formats.read(shard, Fields())] == [b"zero", b"one"]


def test_damaged_tar_never_raises(tmp_path):
    rng = random.Random(1)
    whole = archive([(f"{n}.{end}", rng.randbytes(300)) for n in range(4) for end in ("jpg", "txt")]
                    + [("n" * 200 + ".jpg", b"long")], tarfile.PAX_FORMAT)  # fmt: skip
    shard = Shard("webdataset", str(tmp_path), str(tmp_path / "a.tar"), "train")
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.5:  # with the sum mended, so that the damage is believed
            at = 512 * rng.randrange(len(data) // 512)
            data[at + rng.randrange(512)] = rng.randrange(256)
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        (tmp_path / "a.tar").write_bytes(bytes(data[: rng.randrange(512, len(data))]))
        list(formats.read(shard, Fields()))
        list(formats.names(shard))


def test_limits_are_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "prepare.md").read_text()
    for name in vars(limits):
        if name.isupper() and name != "MOST_BYTES":  # another name of MOST_PICTURE_BYTES
            assert f"`{name}`" in text, name
