"""Weights in float8 against torch; those that are quantised or not finite are named."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors

from sdjax.models import weight_checks, weights
from sdjax.models.weights import WeightsError, from_diffusers, load_file, save_file


class Shape:
    """What `weights.abstract` has of a parameter."""

    def __init__(self, *shape):
        self.shape, self.dtype = shape, np.dtype(np.float32)


def write(file, kind, shape=(4,)):
    """A safetensors file of one tensor "a", byte by byte, of any kind."""
    size = int(np.prod(shape))
    header = {"a": {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return file


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float8_is_read_as_torch_has_it(name, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name))
    tensors = {
        "wide": torch.randn(3, 5),
        "every": every.reshape(2, 8, 16),
        "scalar": every[57].clone(),
        "none": every[:0].clone(),
    }
    save_torch(tensors, tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys() and found["every"].dtype == getattr(ml_dtypes, name)
    for key, want in tensors.items():
        assert found[key].shape == tuple(want.shape)
        np.testing.assert_array_equal(found[key].astype(np.float32), want.float().numpy())
    assert np.isnan(found["every"].astype(np.float32)).sum() > 0
    chosen = load_file(tmp_path / "w.safetensors", wanted=lambda key: key == "scalar")
    assert chosen.keys() == {"scalar"}


def test_float8_becomes_the_parameters_dtype(tmp_path):
    half = np.array([[0.5, -448.0], [2.0**-9, 0.0]], np.float32)
    written = write(tmp_path / "w.safetensors", "F8_E4M3", (2, 2))
    data = half.astype(ml_dtypes.float8_e4m3fn).tobytes()
    written.write_bytes(written.read_bytes()[:-4] + data)
    params = from_diffusers({"x.weight": load_file(written)["a"]}, {"x.kernel": Shape(2, 2)})
    assert params["x.kernel"].dtype == np.float32
    np.testing.assert_array_equal(params["x.kernel"], half.T)


@pytest.mark.skipif(safetensors.__version__ < "0.6", reason="it does not know these kinds")
@pytest.mark.parametrize("kind", ["F8_E8M0", "F4"])
def test_kinds_of_numbers_that_need_scales_are_refused(kind, tmp_path):
    file = write(tmp_path / "w.safetensors", kind, (4,) if kind != "F4" else (8,))
    if kind == "F4":
        file.write_bytes(file.read_bytes().replace(b"[0, 8]", b"[0, 4]")[:-4])
    with pytest.raises(WeightsError, match=f"w.safetensors: a is stored as {kind}; sdjax reads"):
        load_file(file)


@pytest.mark.parametrize(
    "mark",
    ["scaled_fp8", "model.scaled_fp8", "a.scale_weight", "a.weight_scale", "a.comfy_quant",
     "a.SCB", "a.weight.quant_state.bitsandbytes__nf4", "a.qweight", "a.weight._scale"],
)  # fmt: skip
def test_quantised_weights_are_refused_by_the_names_of_their_scales(mark, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a.weight": np.ones((2, 2), np.int8), mark: np.ones(1, np.float32)}, file)
    with pytest.raises(WeightsError, match=rf"quantised and need the scales.*\({mark}\); sdjax"):
        load_file(file)
    assert load_file(file, wanted=lambda key: key == "a.weight").keys() == {"a.weight"}
    assert weight_checks.quantised(["norm.scale", "logit_scale", "scale_shift_table"]) == ""


def test_integers_without_scales_are_refused():
    tensors = {"a.weight": np.ones((2, 3), np.int8), "a.bias": np.ones(2, np.float16)}
    want = {"a.kernel": Shape(3, 2), "a.bias": Shape(2)}
    with pytest.raises(WeightsError, match=r"no floats: a.weight is int8; sdjax reads float32"):
        from_diffusers(tensors, want)


def test_config_of_quantised_weights_is_refused():
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    problem = weight_checks.quantised_config(config)
    assert problem.startswith("quantization_config (bitsandbytes): its weights are quantised; sdj")
    for plain in ({}, {"quantization_config": None}, {"quantization_config": {}}):
        assert weight_checks.quantised_config(plain) == ""


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16,
                                   ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])  # fmt: skip
def test_weights_that_are_not_finite_are_named_and_counted(dtype):
    bad = np.ones((2, 3))
    bad[1, 2] = np.nan
    tensors = {"a.weight": bad.astype(dtype), "b.bias": np.ones(2, dtype)}
    want = {"a.kernel": Shape(3, 2), "b.bias": Shape(2)}
    with pytest.raises(WeightsError) as caught:
        from_diffusers(tensors, want)
    assert str(caught.value).splitlines()[1:] == ["  a.weight: 1 NaN among 6 values"]
    with pytest.raises(WeightsError, match="1 of 2 weights are not finite.*\n  file: a.weight: 1"):
        from_diffusers(tensors, want, spell=lambda name: f"file: {name}")


@pytest.mark.filterwarnings("error")
def test_infinities_and_what_float32_cannot_hold_are_named():
    tensors = {"a.bias": np.array([np.inf, -np.inf, np.nan]), "b.bias": np.array([1e39, 1, 2])}
    tensors["c.bias"] = np.full(3, 3e38, np.float32)  # finite, though its sum is not
    with pytest.raises(WeightsError) as caught:
        from_diffusers(tensors, {name: Shape(3) for name in tensors})
    assert str(caught.value).splitlines()[1:] == [
        "  a.bias: 1 NaN and 2 Inf among 3 values",
        "  b.bias: 1 Inf among 3 values",
    ]


def test_eight_are_named_and_the_rest_counted():
    tensors = {f"x{i:02}.bias": np.full(1, np.nan) for i in range(11)}
    with pytest.raises(WeightsError) as caught:
        weights.check_finite(tensors)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("11 of 11 weights") and len(lines) == 10
    assert lines[-1] == "  and 3 more"
