"""Changes of weights: worked numbers, and PEFT's own layers as the reference."""

import dataclasses

import numpy as np
import pytest

from sdjax.formats.adapters.layers import AdapterLayer, bias_delta, delta, fitted
from tests.checkpoints.adapters import samples

W = np.asarray([[0, 0.1, 0.2, 0.3], [0.4, 0.5, 0.6, 0.7], [0.8, 0.9, 1.0, 1.1]], np.float32)
FACTORS = {
    "lora_down": np.asarray([[1, 0, -1, 2], [0, 1, 1, 0]], np.float32),
    "lora_up": np.asarray([[0.1, 0.2], [0, -0.1], [0.3, 0]], np.float32),
}
LORA = AdapterLayer("lora", FACTORS, 0.5)  # alpha 1, rank 2


def dora(magnitude):
    return AdapterLayer("dora", {**FACTORS, "dora_scale": magnitude}, 0.5)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_worked_example_of_a_lora():
    expected = [[0.05, 0.2, 0.25, 0.4], [0.4, 0.45, 0.55, 0.7], [0.95, 0.9, 0.85, 1.4]]
    np.testing.assert_allclose(W + delta(LORA), expected, atol=1e-7)
    assert (LORA.rank, LORA.alpha) == (2, 1.0)


@pytest.mark.parametrize("column", [False, True])
def test_the_worked_example_of_a_dora_by_outputs(column):
    norm = np.linalg.norm(W, axis=1, keepdims=column)
    expected = [
        [0.036342, 0.145369, 0.181711, 0.290737],
        [0.417786, 0.470010, 0.574456, 0.731126],
        [0.866931, 0.821303, 0.775675, 1.277583],
    ]
    np.testing.assert_allclose(W + delta(dora(norm), W), expected, atol=1e-6)


def test_the_worked_example_of_a_dora_by_inputs():
    norm = np.linalg.norm(W, axis=0, keepdims=True)
    found = W + delta(dora(norm), W)
    np.testing.assert_allclose(found[0], [0.043335, 0.201656, 0.283654, 0.331258], atol=1e-6)


def test_a_square_weights_magnitudes_say_their_side_by_their_shape():
    base, norm = W[:, :3], np.asarray([1.0, 2.0, 3.0], np.float32)
    factors = {"lora_down": np.zeros((1, 3), np.float32), "lora_up": np.zeros((3, 1), np.float32)}
    for shape, axis in (((3, 1), 1), ((1, 3), 0)):
        layer = AdapterLayer("dora", {**factors, "dora_scale": norm.reshape(shape)})
        found = base + delta(fitted(layer, (3, 3)), base)
        np.testing.assert_allclose(np.linalg.norm(found, axis=axis), norm, rtol=1e-6)


def test_a_dora_without_the_base_weight_is_an_error():
    with pytest.raises(ValueError, match="base weight"):
        delta(dora(np.ones(3, np.float32)))


def test_the_worked_example_of_a_kronecker_product():
    factors = {
        "lokr_w1": np.asarray([[1, 2], [0, -1]], np.float32),
        "lokr_w2": np.asarray([[0.1, 0.2], [0.3, 0.4]], np.float32),
    }
    expected = [[0.1, 0.2, 0.2, 0.4], [0.3, 0.4, 0.6, 0.8], [0, 0, -0.1, -0.2], [0, 0, -0.3, -0.4]]
    np.testing.assert_allclose(delta(AdapterLayer("lokr", factors)), expected, atol=1e-7)


def test_a_kronecker_product_of_a_convolution_is_the_sum_over_its_definition():
    w1, w2 = draw(2, 3), draw(4, 2, 3, 3, seed=1)
    found = delta(AdapterLayer("lokr", {"lokr_w1": w1, "lokr_w2": w2}, 0.5))
    assert found.shape == (8, 6, 3, 3)
    for o, i in ((0, 0), (5, 3), (7, 5)):
        expected = 0.5 * w1[o // 4, i // 2] * w2[o % 4, i % 2]
        np.testing.assert_allclose(found[o, i], expected, rtol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("tucker", [False, True])
def test_a_merged_convolution_is_that_of_the_activations(tucker, stride):
    torch = pytest.importorskip("torch")
    conv = torch.nn.functional.conv2d
    x, base = torch.tensor(draw(2, 5, 8, 8)), draw(6, 5, 3, 3, seed=1)
    up = draw(6, 4, 1, 1, seed=2)
    if tucker:
        factors = {"lora_down": draw(3, 5, 1, 1), "lora_mid": draw(4, 3, 3, 3), "lora_up": up}
        low = conv(x, torch.tensor(factors["lora_down"]))
        low = conv(low, torch.tensor(factors["lora_mid"]), stride=stride, padding=1)
    else:
        factors = {"lora_down": draw(4, 5, 3, 3), "lora_up": up}
        low = conv(x, torch.tensor(factors["lora_down"]), stride=stride, padding=1)
    layer = fitted(AdapterLayer("lora", factors, 0.5), base.shape)
    merged = conv(x, torch.tensor(base + delta(layer, base)), stride=stride, padding=1)
    expected = conv(x, torch.tensor(base), stride=stride, padding=1)
    expected = expected + 0.5 * conv(low, torch.tensor(up))
    np.testing.assert_allclose(merged, expected, atol=1e-4)  # of values up to 30


@pytest.mark.parametrize("shape, factor", [((6, 4, 1, 1), (6, 4)), ((6, 4), (6, 4, 1, 1))])
def test_a_matrix_and_a_convolution_of_one_pixel_are_the_same(shape, factor):
    layer = samples.lora(np.random.default_rng(0), factor, 2)
    found = fitted(layer, shape)
    np.testing.assert_array_equal(delta(found).reshape(6, 4), delta(layer).reshape(6, 4))
    assert delta(found).shape == shape


@pytest.mark.parametrize(
    "change",
    [
        {"lora_up": draw(6, 3)},
        {"lora_down": draw(2, 5)},
        {"lora_up": draw(5, 2)},
        {"diff_b": draw(4)},
        {"dora_scale": draw(5, 1)},
        {"lora_mid": draw(2, 2, 3, 3)},
    ],
)
def test_factors_that_do_not_fit_are_named(change):
    layer = samples.lora(np.random.default_rng(0), (6, 4), 2)
    wrong = dataclasses.replace(layer, factors={**layer.factors, **change})
    with pytest.raises(ValueError, match=next(iter(change))):
        fitted(wrong, (6, 4))


@pytest.mark.parametrize("size", [(1, 4, 0), (6, 1, 2), (1, 0), (5,)])
@pytest.mark.parametrize("kind", ["full", "dora"])
def test_magnitudes_of_another_number_are_named(kind, size):
    """Found by fuzzing: 24 numbers, none at all, or of a whole difference of another module."""
    factors = {"lora_down": np.ones((2, 4)), "lora_up": np.ones((6, 2))}
    if kind == "full":
        factors = {"diff": np.ones((6, 4))}
    layer = AdapterLayer(kind, factors | {"dora_scale": np.ones(size)}, 1.0)
    with pytest.raises(ValueError, match="dora_scale is .*the module's weight is"):
        fitted(layer, (6, 4))


def test_a_bias_is_changed_as_it_stands():
    layer = AdapterLayer("full", {"diff_b": np.ones(3, np.float32)})
    np.testing.assert_array_equal(bias_delta(layer), np.ones(3))
    assert not layer.changes_weight and bias_delta(LORA) is None


# ---- PEFT as the reference -----------------------------------------------------------------------


def net():
    import torch

    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {"linear": torch.nn.Linear(12, 16), "conv": torch.nn.Conv2d(8, 12, 3, stride=2, padding=1)}
    )


def peft_layer(config, module):
    """(the base weight, the weight that PEFT merges, its factors as ours) of a random adapter."""
    import torch
    from peft import get_peft_model, get_peft_model_state_dict

    model = net()
    base = {name: child.weight.detach().numpy().copy() for name, child in model.items()}
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.tensor(draw(*parameter.shape, seed=len(name)))
                magnitude = "magnitude" in name
                parameter.copy_(parameter * (1 + 0.2 * noise) if magnitude else 0.3 * noise)
    state = {k: v.numpy().copy() for k, v in get_peft_model_state_dict(wrapped).items()}
    merged = wrapped.merge_and_unload()[module].weight.detach().numpy()
    prefix = f"base_model.model.{module}."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return base[module], merged, own


NAMES = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up"}


@pytest.mark.parametrize("module", ["linear", "conv"])
@pytest.mark.parametrize("use_dora, rslora", [(False, False), (False, True), (True, False)])
def test_lora_and_dora_are_those_of_peft(module, use_dora, rslora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=use_dora, use_rslora=rslora, target_modules=["linear", "conv"]
    )
    base, merged, own = peft_layer(config, module)
    scale = 6 / 2 if rslora else 6 / 4
    factors = {NAMES[key]: value for key, value in own.items() if key in NAMES}
    if use_dora:
        magnitude = own["lora_magnitude_vector"]
        factors["dora_scale"] = magnitude.reshape(-1, *(1,) * (base.ndim - 1))
    layer = fitted(AdapterLayer("dora" if use_dora else "lora", factors, scale), base.shape)
    assert np.abs(merged - base).max() > 0.1
    np.testing.assert_allclose(base + delta(layer, base), merged, atol=2e-6)


@pytest.mark.parametrize("module", ["linear", "conv"])
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_loha_and_lokr_are_those_of_peft(kind, tucker, module):
    peft = pytest.importorskip("peft")
    options = dict(r=2, alpha=3, use_effective_conv2d=tucker, target_modules=["linear", "conv"])
    if kind == "loha":
        config = peft.LoHaConfig(**options)
    else:
        config = peft.LoKrConfig(**options, decompose_both=True, decompose_factor=-1)
    base, merged, own = peft_layer(config, module)
    layer = fitted(AdapterLayer(kind, own, 3 / 2), base.shape)
    assert np.abs(merged - base).max() > 0.01
    np.testing.assert_allclose(base + delta(layer, base), merged, atol=2e-6)
