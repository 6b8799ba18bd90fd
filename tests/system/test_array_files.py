"""Arrays of strangers: real numbers alone, and no more of them than the file has."""

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest

from sdjax.errors import UserError
from sdjax.evaluation import reference
from sdjax.sampling.inputs import read_latents
from sdjax.system.array_files import open_npz, read_npy


def npy(shape, kind="'<f4'", data=b"\0" * 16):
    file = io.BytesIO()
    header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    file.write(np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header + data)
    return file.getvalue()


def test_good_arrays_are_read_as_numpy_reads_them(tmp_path):
    values = {
        "mu": np.arange(3.0),
        "features": np.arange(6, dtype=np.float32).reshape(3, 2).T,
        "meta": np.array(json.dumps({"tower": "x"})),
        "zero": np.zeros((0, 4), np.int64),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **values)
        with open_npz(tmp_path / "a.npz") as found:
            assert set(found) == set(values)
            for name, value in values.items():
                assert found[name].dtype == value.dtype
                np.testing.assert_array_equal(found[name], value)
    for version in ((1, 0), (2, 0), (3, 0)):
        with open(tmp_path / "a.npy", "wb") as file:
            np.lib.format.write_array(file, values["features"], version=version)
        np.testing.assert_array_equal(read_npy(tmp_path / "a.npy"), values["features"])


@pytest.mark.parametrize(
    "data",
    [
        npy("(1099511627776,)"),
        npy("(1073741824, 1073741824, 1073741824)"),
        npy("(4, -1)"),
        npy("(2," * 40),
        npy("(" * 4000),
        npy("(1,) * 10**9"),
        npy("(4,)", "'|O'"),
        npy("(4,)", "'<c8'"),
        npy("(4,)", "'|V4'"),
        npy("(4,)", "[('a', '<f4')]"),
        npy("(9,)"),
        b"\x93NUMPY\x09\x00" + b"\0" * 100,
        b"",
        b"\x93NUM",
        b"PK\3\4" + b"\0" * 100,
        b"\x80\x04\x95cos\nsystem\n.",
    ],
)
def test_latents_that_announce_more_or_are_something_else_are_refused(tmp_path, data):
    file = tmp_path / "a.npy"
    file.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(UserError, match="a.npy cannot be read as a NumPy array: "):
        read_latents(str(file), 1, (4, 4, 4))
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_an_archive_that_unpacks_to_all_memory_is_refused(tmp_path):
    file = tmp_path / "a.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", npy("(2,)"))
    small = file.read_bytes()
    at = small.index(b"PK\1\2") + 24  # the size that the directory announces
    file.write_bytes(small[:at] + (2**31).to_bytes(4, "little") + small[at + 4 :])
    with pytest.raises(UserError, match="unpacks to 2,147,483,648 bytes; expected at most"):
        reference.read(file)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mu": np.zeros((2, 2))}, r"mu has shape \[2, 2\]"),
        ({"sigma": np.zeros(3)}, r"sigma \[3\]"),
        ({"mu": np.array([1.0, np.nan])}, "NaN or Inf"),
        ({"mu": np.array(["a", "b"])}, "could not convert"),
        ({"features": np.zeros((3, 5), np.float32)}, r"features are float32 \[3, 5\]"),
        ({"features": np.array(["a"])}, "features are <U1"),
        ({"meta": np.array("[1]")}, "meta is"),
        ({"meta": np.array("[" * 100_000)}, "nested too deeply"),
        ({"meta": np.array("9" * 5000)}, "4,300 digits"),
    ],
)
def test_statistics_that_do_not_fit_together_are_refused(tmp_path, change, message):
    good = {
        "mu": np.zeros(2),
        "sigma": np.eye(2),
        "features": np.zeros((3, 2), np.float32),
        "meta": np.array("{}"),
    }
    np.savez(tmp_path / "good.npz", **good)
    assert reference.read(tmp_path / "good.npz").features.shape == (3, 2)
    np.savez(tmp_path / "a.npz", **good | change)
    with pytest.raises(UserError, match=f"a.npz: cannot be read as statistics .*{message}"):
        reference.read(tmp_path / "a.npz")


def test_encrypted_and_cut_archives_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    whole = (tmp_path / "a.npz").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "b.npz").write_bytes(whole[:length])
        with pytest.raises(UserError, match="b.npz: cannot be read"):
            reference.read(tmp_path / "b.npz")
    at = whole.index(b"PK\1\2")
    (tmp_path / "b.npz").write_bytes(whole[: at + 8] + b"\1" + whole[at + 9 :])
    with pytest.raises(UserError, match="b.npz: cannot be read .*encrypted"):
        reference.read(tmp_path / "b.npz")
