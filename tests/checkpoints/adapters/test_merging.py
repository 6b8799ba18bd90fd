"""Adapters merged into weights, made of weights, and brought to another rank."""

import dataclasses

import numpy as np
import pytest

from sdjax.families.bind import bind
from sdjax.formats.adapters.extraction import Ranks, extract, resize
from sdjax.formats.adapters.layers import AdapterLayer, delta
from sdjax.formats.adapters.merging import merged
from sdjax.formats.adapters.spellings import modules_of
from sdjax.formats.folders import ModelError
from sdjax.models.weights import to_diffusers
from tests.checkpoints.adapters import samples
from tests.checkpoints.adapters.test_files import MODELS, ONE, QUERY, TINY


def with_params(model, seed=0, size=0.3):
    rng = np.random.default_rng(seed)
    params = {
        path: (size * rng.standard_normal(want.shape)).astype(np.float32)
        for path, want in bind(model).abstract.items()
    }
    return dataclasses.replace(model, params=params)


def torch_weights(model):
    """{name of diffusers with its network: array in torch's layout}."""
    return {
        f"{name}.{key}": value
        for name in model.networks
        for key, value in to_diffusers(model.component(name)).items()
    }


@pytest.mark.parametrize("family", MODELS)
def test_every_module_gets_its_own_change(family):
    model = with_params(MODELS[family])
    adapter = samples.lora_adapter(model, ranks=(3, 2), scales=(1.0, 0.5))
    before, after = torch_weights(model), torch_weights(merged(model, [(adapter, 0.7)]))
    assert before.keys() == after.keys()
    for key, value in before.items():
        layer = adapter.get(key.removesuffix(".weight"))
        change = np.float32(0.7) * delta(layer) if layer else 0
        np.testing.assert_allclose(after[key], value + change, atol=1e-6, err_msg=key)


def test_the_model_is_left_as_it_was():
    model = with_params(MODELS["flux"])
    copies = {path: value.copy() for path, value in model.params.items()}
    new = merged(model, [(samples.lora_adapter(model), 1.0)])
    for path, value in model.params.items():
        np.testing.assert_array_equal(value, copies[path])
    back = merged(new, [(samples.lora_adapter(model), -1.0)])
    for path, value in model.params.items():
        np.testing.assert_allclose(back.params[path], value, atol=1e-6)


def test_weight_zero_and_no_adapter_give_the_same_bits():
    model = with_params(TINY)
    adapters = [samples.lora_adapter(model), samples.dora_adapter(model)]
    new = merged(model, [(adapter, 0.0) for adapter in adapters])
    for path, value in model.params.items():
        assert new.params[path] is value
    assert merged(model, []).params.keys() == model.params.keys()


def test_loras_add_and_their_order_does_not_matter():
    model = with_params(TINY)
    one, two = (samples.lora_adapter(model, seed=seed) for seed in (1, 2))
    a = merged(model, [(one, 0.5), (two, 1.0)])
    b = merged(model, [(two, 1.0), (one, 0.5)])
    for path, value in a.params.items():
        np.testing.assert_allclose(value, b.params[path], atol=1e-6)


def test_doras_follow_one_another():
    model = with_params(TINY)
    where, _ = modules_of(TINY)[ONE].weight
    base = model.params[where].T
    first = AdapterLayer("lora", samples.lora(np.random.default_rng(1), QUERY, 2).factors)
    magnitude = np.linspace(1, 2, 16, dtype=np.float32)[:, None]
    factors = {**samples.lora(np.random.default_rng(2), QUERY, 2).factors, "dora_scale": magnitude}
    dora = AdapterLayer("dora", factors)
    new = merged(model, [({ONE: first}, 1.0), ({ONE: dora}, 1.0)]).params[where].T
    np.testing.assert_allclose(np.linalg.norm(new, axis=1), magnitude[:, 0], rtol=1e-5)
    turned = base + delta(first) + factors["lora_up"] @ factors["lora_down"]
    np.testing.assert_allclose(
        new / magnitude, turned / np.linalg.norm(turned, axis=1, keepdims=True), atol=1e-5
    )
    half = merged(model, [({ONE: dora}, 0.5)]).params[where].T
    np.testing.assert_allclose(half, base + 0.5 * delta(dora, base), atol=1e-6)


def test_a_dora_at_its_start_changes_nothing():
    model = with_params(TINY)
    where, _ = modules_of(TINY)[ONE].weight
    base = model.params[where].T
    factors = dict(samples.lora(np.random.default_rng(2), QUERY, 2).factors)
    factors["lora_up"] = np.zeros_like(factors["lora_up"])
    factors["dora_scale"] = np.linalg.norm(base, axis=1, keepdims=True)
    new = merged(model, [({ONE: AdapterLayer("dora", factors)}, 1.0)]).params[where].T
    np.testing.assert_allclose(new, base, rtol=1e-6)


def test_biases_and_norms_are_changed():
    model = with_params(MODELS["flux"])
    block = "transformer.transformer_blocks.1."
    adapter = {
        f"{block}norm1.linear": AdapterLayer("full", {"diff_b": np.ones(72, np.float32)}),
        f"{block}attn.norm_q": AdapterLayer("full", {"diff": np.ones(6, np.float32)}),
    }
    before, after = torch_weights(model), torch_weights(merged(model, [(adapter, 0.5)]))
    changed = {key for key, value in before.items() if not np.array_equal(value, after[key])}
    assert changed == {f"{block}norm1.linear.bias", f"{block}attn.norm_q.weight"}
    for key in changed:
        np.testing.assert_allclose(after[key] - before[key], 0.5, rtol=1e-5)


def test_modules_have_weights_of_their_own():
    model = with_params(TINY)
    adapter = samples.lora_adapter(model)

    def factor_of(path):
        return 2.0 if path.startswith("unet.up_blocks.1.") else float(path.startswith("text"))

    before = torch_weights(model)
    after = torch_weights(merged(model, [(adapter, factor_of)]))
    for key, layer in adapter.items():
        change = after[f"{key}.weight"] - before[f"{key}.weight"]
        np.testing.assert_allclose(change, factor_of(key) * delta(layer), atol=1e-6)


@pytest.mark.parametrize(
    "adapter, words",
    [
        ({"unet.nothing": samples.lora(np.random.default_rng(0), QUERY, 2)}, "unet.nothing"),
        ({ONE: samples.lora(np.random.default_rng(0), (16, 9), 2)}, "lora_down"),
        ({ONE: AdapterLayer("full", {"diff_b": np.ones(16, np.float32)})}, "which has none"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(adapter, words):
    with pytest.raises(ModelError, match=words):
        merged(with_params(TINY), [(adapter, 1.0)])


# ---- made of weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_merged_lora_is_extracted_again(family):
    base = with_params(MODELS[family])
    adapter = samples.lora_adapter(base, ranks=(3,), scales=(0.5,))
    found, kept = extract(base, merged(base, [(adapter, 1.0)]), 3)
    assert found.keys() == adapter.keys()
    for path, layer in adapter.items():
        np.testing.assert_allclose(delta(found[path]), delta(layer), atol=2e-6, err_msg=path)
    assert all(share == pytest.approx(1.0, abs=1e-6) for share in kept.values())


def test_an_extracted_lora_is_the_best_of_its_rank():
    """Eckart and Young: against numpy's singular values."""
    base, tuned = with_params(TINY), with_params(TINY, seed=1)
    found, kept = extract(base, tuned, 2)
    before, after = torch_weights(base), torch_weights(tuned)
    total = captured = 0.0
    for key, value in after.items():
        network, change = key.partition(".")[0], value - before[key]
        total += float(np.sum(change**2)) * (network == "unet")
        if (layer := found.get(key.removesuffix(".weight"))) is not None:
            values = np.linalg.svd(change.reshape(len(change), -1), compute_uv=False)
            rest = np.linalg.norm(change - delta(layer))
            np.testing.assert_allclose(rest, np.linalg.norm(values[2:]), rtol=1e-4, err_msg=key)
            assert layer.rank == min(2, len(values))
            captured += float(np.sum(values[:2] ** 2)) * (network == "unet")
    assert kept["unet"] == pytest.approx(captured / total, rel=1e-4)


def test_models_that_cannot_be_compared_are_refused():
    base = with_params(TINY)
    with pytest.raises(ModelError, match="no weight of --input differs"):
        extract(base, base, 2)
    with pytest.raises(ModelError, match="expected the same networks"):
        extract(base, with_params(MODELS["sdxl"]), 2)


@pytest.mark.parametrize("tucker", [False, True])
def test_a_lora_of_less_rank_is_the_best_of_it(tucker):
    rng = np.random.default_rng(0)
    conv = "unet.down_blocks.0.resnets.0.conv1"
    layer = samples.lora(rng, modules_of(TINY)[conv].shape, 4, scale=0.5)
    if tucker:
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        factors = {"lora_down": draw(3, 8, 1, 1), "lora_mid": draw(4, 3, 3, 3),
                   "lora_up": draw(8, 4, 1, 1)}  # fmt: skip
        layer = AdapterLayer("lora", factors, 0.5)
    found, kept = resize({conv: layer}, Ranks(2), TINY)
    whole = delta(layer)
    values = np.linalg.svd(whole.reshape(8, -1), compute_uv=False)
    rest = np.linalg.norm(whole - delta(found[conv]))
    np.testing.assert_allclose(rest, np.linalg.norm(values[2:]), rtol=1e-4)
    assert kept == pytest.approx(np.sum(values[:2] ** 2) / np.sum(values**2), rel=1e-5)
    same, kept = resize({conv: layer}, Ranks(8), TINY)
    np.testing.assert_allclose(delta(same[conv]), whole, atol=1e-5)
    assert kept == pytest.approx(1.0)


def fewest(values, rule, number):
    """The rank of kohya's resize_lora.py, from its words."""
    for rank in range(1, len(values) + 1):
        kept = values[:rank]
        enough = {
            "sv_fro": np.linalg.norm(kept) >= number * np.linalg.norm(values),
            "sv_cumulative": kept.sum() >= number * values.sum(),
            "sv_ratio": rank == len(values) or values[rank] <= values[0] / number,
        }
        if enough[rule]:
            return rank
    return len(values)


@pytest.mark.parametrize("kind", ["lora", "full"])  # by the triangles of factors, and by the matrix
@pytest.mark.parametrize(
    "rule, number",
    [
        ("sv_fro", 0.9),
        ("sv_fro", 0.5),
        ("sv_cumulative", 0.7),
        ("sv_ratio", 3.0),
        ("sv_ratio", 1.01),
    ],
)
def test_ranks_that_follow_from_singular_values_are_kohyas(rule, number, kind):
    rng = np.random.default_rng(0)
    out, width = modules_of(TINY)[ONE].shape
    columns = np.linalg.qr(rng.standard_normal((out, 6)))[0]
    rows = np.linalg.qr(rng.standard_normal((width, 6)))[0]
    change = np.asarray(columns * 2.0 ** -np.arange(6) @ rows.T, np.float32)
    layer = AdapterLayer("full", {"diff": change})
    if kind == "lora":
        up = np.asarray(columns * 2.0 ** -np.arange(6), np.float32)
        layer = AdapterLayer(
            "lora", {"lora_down": rows.T.astype(np.float32), "lora_up": 2 * up}, 0.5
        )
    values = np.linalg.svd(change, compute_uv=False)[:6]
    rank = fewest(values, rule, number)
    assert 1 <= rank < 6
    found, kept = resize({ONE: layer}, Ranks(None, rule, number), TINY)
    assert found[ONE].rank == rank
    left, others, right = np.linalg.svd(change)
    best = (left[:, :rank] * others[:rank]) @ right[:rank]
    np.testing.assert_allclose(delta(found[ONE]), best, atol=1e-6)
    assert kept == pytest.approx(np.sum(values[:rank] ** 2) / np.sum(values**2), rel=1e-5)
    capped, _ = resize({ONE: layer}, Ranks(1, rule, number), TINY)
    assert capped[ONE].rank == 1


@pytest.mark.parametrize("rule", ["sv_fro", "sv_cumulative", "sv_ratio"])
def test_a_change_that_is_none_has_rank_1(rule):
    out, width = modules_of(TINY)[ONE].shape
    zero = {"lora_down": np.ones((4, width), np.float32), "lora_up": np.zeros((out, 4), np.float32)}
    found, kept = resize({ONE: AdapterLayer("lora", zero)}, Ranks(4, rule, 0.9), TINY)
    assert (found[ONE].rank, kept) == (1, 1.0)
    assert not np.any(delta(found[ONE]))


def test_other_kinds_become_loras_and_magnitudes_stay():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    lokr = AdapterLayer("lokr", {"lokr_w1": draw(4, 4), "lokr_w2": draw(4, 4)}, 0.5)
    dora = samples.dora_adapter(TINY, wanted=lambda path: path == ONE)[ONE]
    found, _ = resize({ONE: lokr}, Ranks(16), TINY)
    assert found[ONE].kind == "lora"
    np.testing.assert_allclose(delta(found[ONE]), delta(lokr), atol=1e-5)
    found, _ = resize({ONE: dora}, Ranks(1), TINY)
    assert (found[ONE].kind, found[ONE].rank) == ("dora", 1)
    np.testing.assert_array_equal(found[ONE].factors["dora_scale"], dora.factors["dora_scale"])
