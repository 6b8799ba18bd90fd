"""PyTorch files that would take all memory, or years, to read: refused in words, at once."""

import pickle
import struct
import time
import tracemalloc
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest

from sdjax.formats import torch_pickle
from sdjax.formats.torch_file import TorchFileError, read_tensors

PROTO, STOP, MARK, NONE = b"\x80\x02", b".", b"(", b"N"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
SIZE = b"ctorch\nSize\n"
ORDERED = b"ccollections\nOrderedDict\n"
LAUGHS = b")" + b"\x86".join([b"q\x00h\x00"] * 61) + b"\x86"  # ((...), (...)), 2**60 in all
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
HUGE = 1 << 60


@contextmanager
def bounded(seconds=5.0, mebibytes=64):
    """In here an input is read, in little time and memory."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        yield
        assert time.perf_counter() - began < seconds
        assert tracemalloc.get_traced_memory()[1] < mebibytes * 2**20
    finally:
        tracemalloc.stop()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def storage(count=4, key=None, kind=b"ctorch\nFloatStorage\n"):
    key = text("0") if key is None else key
    return MARK + text("storage") + kind + key + text("cpu") + number(count) + b"tQ"


FOUR, ONE = number(4) + b"\x85", number(1) + b"\x85"


def tensor(shape=FOUR, strides=ONE, where=None):
    where = storage() if where is None else where
    return REBUILD + MARK + where + number(0) + shape + strides + b"\x89" + ORDERED + b")RtR"


def state(*items):
    return PROTO + b"}" + MARK + b"".join(items) + b"u" + STOP


def zipped(path, content, data=b"\0" * 16, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/data/0", data)
    return path


def legacy(path, content, keys=("0",), count=4, data=b"\0" * 16):
    parts = [pickle.dumps(part, 2) for part in (MAGIC, PROTOCOL, {"little_endian": True})]
    parts += [content, pickle.dumps(list(keys), 2), struct.pack("<q", count), data]
    path.write_bytes(b"".join(parts))
    return path


def test_crafted_files_are_read_where_they_are_whole(tmp_path):
    for write in (zipped, legacy):
        found = read_tensors(write(tmp_path / "a.pth", state(text("w"), tensor())))
        np.testing.assert_array_equal(found["w"], np.zeros(4, np.float32))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_torch_save_is_read(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    tensors = {f"{i}.weight": torch.full((2, 3), float(i)) for i in range(300)}
    for zipping in (True, False):
        torch.save(tensors, tmp_path / "a.pth", pickle_protocol=protocol,
                   _use_new_zipfile_serialization=zipping)  # fmt: skip
        found = read_tensors(tmp_path / "a.pth")
        assert {name: float(value[1, 2]) for name, value in found.items()} == {
            f"{i}.weight": i for i in range(300)
        }


PICKLES = {
    "a memo index that takes 64 GB": (PROTO + b"Nr\xff\xff\xff\xff" + STOP, "holds a NoneType"),
    "laughs as a key": (state(LAUGHS, NONE), "dictionary has the key"),
    "laughs as a pair's key": (
        PROTO + ORDERED + b"]" + LAUGHS + b"N\x86a\x85R" + STOP, "dictionary has the key",
    ),
    "laughs as a shape": (state(text("w"), tensor(shape=LAUGHS)), "shape or strides"),
    "laughs as strides": (state(text("w"), tensor(strides=LAUGHS)), "shape or strides"),
    "laughs as a storage": (state(text("w"), tensor(where=LAUGHS)), "where a Storage is"),
    "laughs as a storage's key": (state(text("w"), tensor(where=storage(key=LAUGHS))), "refers to"),
    "laughs as a reference": (state(text("w"), LAUGHS + b"Q"), "refers to"),
    "laughs as a storage's kind": (state(text("w"), tensor(where=storage(kind=LAUGHS))),
                                   "refers to"),
    "laughs called": (PROTO + LAUGHS + b")R" + STOP, "where a Name is expected"),
    "laughs in place of a dictionary": (PROTO + LAUGHS + STOP, "holds a tuple"),
    "a text of an exabyte": (PROTO + b"\x8d" + struct.pack("<Q", HUGE), "beyond its end"),
    "a frame of an exabyte": (b"\x80\x04\x95" + struct.pack("<Q", HUGE) + b"N" + STOP,
                              "holds a NoneType"),
    "bytes of an exabyte": (PROTO + b"\x8e" + struct.pack("<Q", HUGE), "beyond its end"),
    "a number of a million bits": (PROTO + b"\x8b" + struct.pack("<I", 2**17) + b"\1" * 2**17
                                   + STOP, "holds a number of 1,048,569 bits"),
    "a number of 5,000 digits": (PROTO + b"L" + b"7" * 5000 + b"L\n" + STOP, "4,300 digits"),
    "as many lists in one another": (PROTO + b"](" * 10**6 + STOP, "more than 20,000 steps"),
    "a shape of a thousand sizes": (
        state(text("w"), tensor(shape=SIZE + MARK + number(1) * 1000 + b"t\x85R")),
        "shape or strides",
    ),
    "a list that is copied again and again": (
        PROTO + b"](" + b"K\x01K\x02\x86" * 3_000 + b"eq\x000" + (ORDERED + b"h\x00\x85R0") * 10
        + STOP,
        "more than 20,000 steps",
    ),
    "a name to import": (PROTO + b"cos\nsystem\n" + STOP, "asks for os.system"),
    "an object that is made": (PROTO + ORDERED + b")\x81" + STOP, "opcode NEWOBJ"),
    "a name of the registry": (PROTO + b"\x82\x01" + STOP, "opcode EXT1"),
    "attributes of a tensor": (state(text("w"), tensor() + b"}b"), "where a OrderedDict"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_do_much_are_refused_at_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch_pickle, "MOST_STEPS", 20_000)
    content, message = PICKLES[name]
    with bounded(), pytest.raises(TorchFileError, match=message) as seen:
        read_tensors(zipped(tmp_path / "a.pth", content))
    assert str(seen.value).startswith(f"{tmp_path / 'a.pth'}: ") and len(str(seen.value)) < 800
    with bounded(), pytest.raises(TorchFileError, match="a.pth: "):
        read_tensors(legacy(tmp_path / "a.pth", content))


def test_a_pickle_larger_than_any_models_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sdjax.formats.torch_file.MOST_BYTES", 1000)
    content = state(text("w" * 1000), tensor())
    with pytest.raises(TorchFileError, match=r"data.pkl has 1,\d+ bytes; expected at most 1,000"):
        read_tensors(zipped(tmp_path / "a.pth", content))
    monkeypatch.setattr(torch_pickle, "MOST_BYTES", 1000)
    with pytest.raises(TorchFileError, match="beyond its end, or 1,000 bytes"):
        read_tensors(legacy(tmp_path / "a.pth", content))


def test_tensors_that_are_much_larger_than_their_storage_are_refused(tmp_path):
    shape, strides = number(2**40) + b"\x85", number(0) + b"\x85"
    content = state(text("w"), tensor(shape=shape, strides=strides))
    for write in (zipped, legacy):
        with bounded(), pytest.raises(TorchFileError, match="repeats its 4 numbers more often"):
            read_tensors(write(tmp_path / "a.pth", content))


def test_compressed_encrypted_and_overlapping_parts_are_refused(tmp_path):
    file = tmp_path / "a.pth"
    zipped(file, state(text("w"), tensor()), bytes(2**27), zipfile.ZIP_DEFLATED)
    with bounded(), pytest.raises(TorchFileError, match="'a/data.*' in it is compressed"):
        read_tensors(file)
    whole = zipped(file, state(text("w"), tensor())).read_bytes()
    directory = whole.index(b"PK\1\2")
    flags = whole[: directory + 8] + b"\1" + whole[directory + 9 :]
    file.write_bytes(flags)
    with pytest.raises(TorchFileError, match="'a/data.pkl' in it is encrypted"):
        read_tensors(file)
    end = whole.index(b"PK\5\6")
    entries = whole[directory:end]
    count, size = struct.pack("<HH", 1000, 1000), struct.pack("<I", 500 * len(entries))
    file.write_bytes(
        whole[:directory] + entries * 500 + whole[end : end + 8] + count + size + whole[end + 16 :]
    )
    with pytest.raises(TorchFileError, match="its parts are larger together than the file"):
        read_tensors(file)


@pytest.mark.parametrize("count", [-4, 2**40, 2**62, 5])
def test_storages_of_a_length_that_the_old_format_does_not_have_are_refused(tmp_path, count):
    content = state(text("w"), tensor(where=storage(count)))
    with bounded(), pytest.raises(TorchFileError, match="a.pth: .*(refers to|are left)"):
        read_tensors(legacy(tmp_path / "a.pth", content, count=count))


@pytest.mark.parametrize("keys", [("1",), (("0",),), (None,), ("0", "0")])
def test_storages_that_nothing_announced_are_refused(tmp_path, keys):
    with pytest.raises(TorchFileError, match="a.pth: "):
        read_tensors(legacy(tmp_path / "a.pth", state(text("w"), tensor()), keys=keys))
