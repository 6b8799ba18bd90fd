"""Tensors of torch files, read without torch, against torch's own values."""

import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from sdjax.formats.torch_file import TorchFileError, read_tensors
from sdjax.models import weights
from sdjax.models.weights import WeightsError

torch = pytest.importorskip("torch")
DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
DTYPES += ["complex64", "complex128"]
FORMATS = {"zip": True, "legacy": False}


@pytest.fixture(params=FORMATS)
def save(request, tmp_path):
    """`save(object)` -> a file in one of the two formats."""

    def write(value, name="weights.pth"):
        torch.save(value, tmp_path / name, _use_new_zipfile_serialization=FORMATS[request.param])
        return tmp_path / name

    return write


def as_numpy(tensor):
    tensor = tensor.detach()
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def test_every_dtype_stride_and_shared_storage_is_read_as_torch_has_it(save):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn((4, 6, 5), generator=generator) * 50
    tensors = {name: base.to(getattr(torch, name)) for name in DTYPES}
    tensors |= {
        "transposed": base.permute(2, 0, 1),
        "part": base[1:3, ::2, 4],
        "offset": base.flatten()[7:20],
        "expanded": base[0, 0, :1].expand(3, 8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros((0, 3)),
        "parameter": torch.nn.Parameter(base[0]),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    found = read_tensors(save(tensors))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        array = found[name]
        assert array.shape == tuple(tensor.shape), name
        assert str(array.dtype) == str(tensor.dtype).removeprefix("torch."), name
        wide = array.astype(np.float32) if name == "bfloat16" else array
        np.testing.assert_array_equal(wide, as_numpy(tensor), err_msg=name)
    assert np.shares_memory(found["part"], found["transposed"])
    with pytest.raises(ValueError, match="read-only"):
        found["part"][0, 0] = 1


def test_a_modules_state_dict_with_its_metadata_and_a_nested_one(save):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = module.state_dict()
    assert state._metadata, "this is what makes the pickle set attributes"
    for file in (save(state), save({"state_dict": state, "epoch": 3, "note": "x"}, "b.ckpt")):
        found = read_tensors(file)
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            np.testing.assert_array_equal(found[name], tensor.numpy())


def test_safetensors_are_read_too(tmp_path):
    weights.save_file({"a": np.arange(3.0)}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read_tensors(tmp_path / "a.safetensors")["a"], [0, 1, 2])


class Attack:
    """Unpickled, it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_code_is_refused_and_does_not_run(save, tmp_path):
    marker = tmp_path / "ran"
    file = save({"weight": torch.zeros(2), "extra": Attack(marker)})
    with pytest.raises(TorchFileError, match=r"weights.pth: refused: .* (posix|nt).system") as seen:
        read_tensors(file)
    assert "safetensors" in str(seen.value)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "the attack is real"


@pytest.mark.parametrize(
    "value, found",
    [
        (getattr, r"(__builtin__|builtins).getattr"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
        (np.float64(3), r"numpy\S*.scalar"),
        (np.dtype("float32"), "numpy.dtype"),
        (print, r"(__builtin__|builtins).print"),
    ],
)
def test_names_that_tensors_do_not_need_are_refused(save, value, found):
    with pytest.raises(TorchFileError, match=f"asks for {found}"):
        read_tensors(save({"weight": torch.zeros(2), "extra": value}))


def test_float8_is_refused_in_words(save):
    file = save({"weight": torch.zeros(2).to(torch.float8_e4m3fn)})
    with pytest.raises(TorchFileError, match="kind that only torch knows, as float8; write them"):
        read_tensors(file)


def test_a_whole_model_is_refused(save):
    with pytest.raises(TorchFileError, match="refused"):
        read_tensors(save(torch.nn.Linear(2, 2)))


def test_a_plain_pickle_that_runs_code_is_refused(tmp_path):
    marker = tmp_path / "ran"
    for name, content in {
        "at_once.pth": pickle.dumps(Attack(marker)),
        "list.pth": pickle.dumps([1, Attack(marker)]),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TorchFileError, match=f"{name}: refused.*system"):
            read_tensors(tmp_path / name)
    assert not marker.exists()


class _Crafted(pickle._Pickler):
    """Writes names of torch and persistent ids that torch itself would not."""

    def persistent_id(self, value):
        return value[1] if isinstance(value, tuple) and value[:1] == ("PID",) else None


class Call:
    """Unpickled, it calls a name."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self):
        return self.parts


def zip_file(path, value, data=b"\0" * 16, **more):
    content = io.BytesIO()
    _Crafted(content, protocol=2).dump(value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", content.getvalue())
        archive.writestr("a/data/0", data)
        for name, text in more.items():
            archive.writestr(f"a/{name}", text)
    return path


def storage(count=4, kind=torch.FloatStorage, *more):
    return ("PID", ("storage", kind, "0", "cpu", count, *more))


@pytest.mark.parametrize(
    "shape, strides, offset, count",
    [
        ((5,), (1,), 0, 4),  # one beyond
        ((2, 2), (3, 1), 1, 4),  # the last of its second row
        ((2,), (-1,), 1, 4),  # backwards
        ((2,), (1,), -1, 4),  # before the start
        ((2**40, 2**40), (2**40, 1), 0, 4),
        ((4,), (1,), 0, 10),  # announces more than there is
        ((2,), (1, 1), 0, 4),
        (("a",), (1,), 0, 4),
    ],
)
def test_tensors_that_reach_beyond_their_storage_are_refused(
    tmp_path, shape, strides, offset, count
):
    call = Call(torch._utils._rebuild_tensor_v2, storage(count), offset, shape, strides, False, {})
    with pytest.raises(TorchFileError, match="cannot be read as a whole PyTorch file"):
        read_tensors(zip_file(tmp_path / "a.pth", {"weight": call}))


def test_what_was_rebuilt_cannot_be_altered_afterwards(tmp_path):
    """A pickle may set attributes of what it made; a tensor that was checked must stay so."""
    call = Call(
        torch._utils._rebuild_tensor_v2, storage(), 0, (4,), (1,), False, {},
        state={"offset": 10**6},
    )  # fmt: skip
    with pytest.raises(TorchFileError):
        read_tensors(zip_file(tmp_path / "a.pth", {"weight": call}))


def test_strange_storages_are_refused(tmp_path):
    for odd in (
        storage(4, torch.FloatStorage, ("1", 0, 2)),  # a view, of before PyTorch 0.4
        ("PID", ("module", torch.FloatStorage, "x.py", "source")),
        ("PID", "storage"),
        storage("4"),
        storage(4, "floatstorages"),
    ):
        call = Call(torch._utils._rebuild_tensor_v2, odd, 0, (4,), (1,), False, {})
        with pytest.raises(TorchFileError, match="it refers to"):
            read_tensors(zip_file(tmp_path / "a.pth", {"weight": call}))


def test_byte_order_is_checked(tmp_path):
    call = Call(torch._utils._rebuild_tensor_v2, storage(), 0, (4,), (1,), False, {})
    good = zip_file(tmp_path / "a.pth", {"weight": call}, byteorder="little")
    np.testing.assert_array_equal(read_tensors(good)["weight"], np.zeros(4, np.float32))
    with pytest.raises(TorchFileError, match="big-endian"):
        read_tensors(zip_file(tmp_path / "b.pth", {"weight": call}, byteorder="big"))


def test_broken_and_foreign_files_are_named(save, tmp_path):
    whole = save({"weight": torch.arange(5000.0)}).read_bytes()
    for length in (len(whole) // 2, 30, len(whole) - 9):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(TorchFileError, match="cut.pth"):
            read_tensors(tmp_path / "cut.pth")
    for content in (b"<!DOCTYPE html><title>Not found</title>", b"", b"\x80\x02K\x05."):
        (tmp_path / "page.pth").write_bytes(content)
        with pytest.raises(TorchFileError, match="page.pth: not a file of torch.save"):
            read_tensors(tmp_path / "page.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(TorchFileError, match="no data.pkl"):
        read_tensors(tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="no such weights file: .*absent.pth"):
        read_tensors(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    "value", [[1, 2], {"epoch": 3}, {}, "text", collections.OrderedDict(a={"b": 1})]
)
def test_files_without_tensors_say_what_they_hold(save, value):
    with pytest.raises(TorchFileError, match=f"holds a {type(value).__name__}.*state dict"):
        read_tensors(save(value))
