"""Adapters of single layers, held to PEFT and to numbers that were worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from sdjax.models import weights
from sdjax.models.adapters import networks as adapters
from sdjax.models.adapters.factors import KINDS, Dropout, Rule, factorization
from sdjax.models.products import Conv, Linear

# W, A and B of torch's layout: finetuning formulas worked out with a = 1, r = 2.
W = np.arange(12, dtype=np.float32).reshape(3, 4) / 10
A = np.array([[1, 0, -1, 2], [0, 1, 1, 0]], np.float32)
B = np.array([[0.1, 0.2], [0, -0.1], [0.3, 0]], np.float32)


def linear(kernel, rule, dtype=jnp.float32):
    layer = Linear(
        *kernel.shape,
        kernel_init=lambda *_: jnp.asarray(kernel),
        dtype=dtype,
        rngs=weights.Keys(jax.random.key(0)),
    )
    return adapted(layer, rule)


def adapted(layer, rule, key=1):
    holder = nnx.Dict(layer=layer)
    adapters.attach(holder, lambda path, _: rule, weights.Keys(jax.random.key(key)))
    return layer


def conv(rule, *, strides=(2, 2)):
    layer = Conv(
        6,
        8,
        (3, 3),
        strides=strides,
        padding=((1, 1), (1, 1)),
        kernel_init=nnx.initializers.normal(0.2),
        rngs=weights.Keys(jax.random.key(0)),
    )
    return adapted(layer, rule)


def fold(layer):
    (kernel,) = adapters.folded(nnx.Dict(layer=layer)).values()
    return kernel


def randomise(layer, key=7):
    """Give every factor values that are far from those of the start."""
    graph, params = weights.split(layer)
    for i, path in enumerate(params):
        if path.endswith(".key"):
            continue
        noise = jax.random.normal(jax.random.key(key + i), params[path].shape)
        params[path] = 0.3 * noise + (1 if "magnitude" in path else 0)
    return weights.merge(graph, params)


def test_worked_example_of_lora_and_dora():
    layer = linear(W.T, Rule("lora", 2, 0.5))
    layer.adapter.A[...], layer.adapter.B[...] = A.T, B.T
    expected = [[0.05, 0.2, 0.25, 0.4], [0.4, 0.45, 0.55, 0.7], [0.95, 0.9, 0.85, 1.4]]
    np.testing.assert_allclose(fold(layer).T, expected, atol=1e-6)

    layer = linear(W.T, Rule("dora", 2, 0.5))
    layer.adapter.A[...], layer.adapter.B[...] = A.T, B.T
    layer.adapter.magnitude[...] = adapters.magnitudes("layer.kernel", W.T)
    expected = [
        [0.036342, 0.145369, 0.181711, 0.290737],
        [0.417786, 0.470010, 0.574456, 0.731126],
        [0.866931, 0.821303, 0.775675, 1.277583],
    ]
    np.testing.assert_allclose(fold(layer).T, expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", ["linear", "conv", "tucker"])
def test_folded_kernel_gives_what_the_layer_with_its_adapter_gives(kind, make):
    rank = 1 if kind == "lokr" else 3  # of a second factor that is not whole
    rule = Rule(kind, rank, 0.7, factor=2, tucker=make == "tucker")
    if make == "linear":
        layer = linear(np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32), rule)
        x = jax.random.normal(jax.random.key(2), (2, 5, 12))
    else:
        layer, x = conv(rule), jax.random.normal(jax.random.key(2), (2, 9, 9, 6))
    layer = randomise(layer)
    expected = layer(x)
    kernel = fold(layer)
    layer.adapter = nnx.data(None)
    before = layer(x)
    layer.kernel[...] = kernel
    assert jnp.abs(before - expected).max() > 0.02 * jnp.abs(expected).max()
    np.testing.assert_allclose(layer(x), expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_start_of_a_convolution_is_the_layer_itself(kind, tucker):
    layer = conv(Rule(kind, 1, 2.0, factor=2, tucker=tucker))
    assert any(".C" in path for path in weights.split(layer)[1]) == tucker
    if kind == "dora":
        layer.adapter.magnitude[...] = adapters.magnitudes("layer.kernel", layer.kernel[...])
    x = jax.random.normal(jax.random.key(2), (3, 9, 9, 6))
    with_adapter = jax.jit(lambda x: layer(x))(x)
    layer.adapter = nnx.data(None)
    # Two programs sum a window for the norm of dora, not always in the same order.
    error = 3e-7 if kind == "dora" else 0
    np.testing.assert_allclose(with_adapter, jax.jit(lambda x: layer(x))(x), error, error)


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_the_layer_itself_to_the_bit(kind):
    kernel = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
    layer = linear(kernel, Rule(kind, 4, 2.0))
    if kind == "dora":
        layer.adapter.magnitude[...] = adapters.magnitudes("layer.kernel", kernel)
    x = jax.random.normal(jax.random.key(2), (3, 40))
    with_adapter = jax.jit(lambda x: layer(x))(x)
    layer.adapter = nnx.data(None)
    np.testing.assert_array_equal(with_adapter, jax.jit(lambda x: layer(x))(x))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("make", ["linear", "conv"])
def test_output_and_gradients_are_those_of_peft(kind, make):
    """The norm of DoRA is a constant in the gradient, as in PEFT."""
    rule = Rule(kind, 4, 0.75)
    settings = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["layer"], use_dora=kind == "dora")
    if make == "linear":
        kernel = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
        ours, x = linear(kernel, rule), np.random.default_rng(1).normal(size=(2, 5, 12))
        base = torch.nn.Linear(12, 8)
    else:
        ours, x = conv(rule), np.random.default_rng(1).normal(size=(2, 9, 9, 6))
        base = torch.nn.Conv2d(6, 8, 3, stride=2, padding=1)
    x = x.astype(np.float32)
    base.weight.data = torch.tensor(np.array(to_torch(ours.kernel[...])))
    base.bias.data.zero_()
    theirs = peft.get_peft_model(torch.nn.ModuleDict({"layer": base}), settings).base_model.model
    module = theirs["layer"]
    ours = randomise(ours)
    ours.kernel[...] = from_torch(base.weight.detach().numpy())
    ours.bias[...] = jnp.zeros(8)
    a, b = ours.adapter.A[...], ours.adapter.B[...]
    module.lora_A["default"].weight.data = torch.tensor(np.array(to_torch(a)))
    up = np.array(b).T
    module.lora_B["default"].weight.data = torch.tensor(
        up.reshape(module.lora_B["default"].weight.shape)
    )
    if kind == "dora":
        magnitude = module.lora_magnitude_vector["default"].weight
        magnitude.data = torch.tensor(np.array(ours.adapter.magnitude[...])).reshape(
            magnitude.shape
        )
    channels_first = torch.tensor(
        x if make == "linear" else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    )
    output = module(channels_first)
    loss = (output**2).mean()
    loss.backward()

    graph, params = weights.split(ours)
    factors = {path: value for path, value in params.items() if "adapter" in path}

    def mean_square(factors):
        y = weights.merge(graph, {**params, **factors})(jnp.asarray(x))
        return jnp.mean(y**2), y

    (_, y), gradients = jax.value_and_grad(mean_square, has_aux=True)(factors)
    expected = output.detach().numpy()
    expected = expected if make == "linear" else expected.transpose(0, 2, 3, 1)
    close(y, expected)
    close(to_torch(gradients["adapter.A"]), module.lora_A["default"].weight.grad.numpy())
    got = np.array(gradients["adapter.B"]).T
    close(got, module.lora_B["default"].weight.grad.numpy().reshape(got.shape))
    if kind == "dora":
        close(gradients["adapter.magnitude"], magnitude.grad.numpy().reshape(-1))


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_kernels_of_loha_and_lokr_are_those_of_peft(kind):
    kernel = np.zeros((12, 8), np.float32)
    layer = randomise(linear(kernel, Rule(kind, 2, 0.5, factor=2)))
    layer.kernel[...] = jnp.zeros((12, 8))
    base = torch.nn.Linear(12, 8, bias=False)
    base.weight.data.zero_()
    if kind == "loha":
        settings = peft.LoHaConfig(r=2, alpha=1, target_modules=["layer"])
    else:
        # PEFT's own rule for the factors is another: it is given what follows from ours.
        settings = peft.LoKrConfig(
            r=2, alpha=1, target_modules=["layer"], decompose_factor=2, decompose_both=False
        )
    module = peft.get_peft_model(torch.nn.ModuleDict({"layer": base}), settings).base_model.model[
        "layer"
    ]
    factors = layer.adapter
    pairs = (
        {"hada_w1_a": factors.B1, "hada_w1_b": factors.A1, "hada_w2_a": factors.B2,
         "hada_w2_b": factors.A2}
        if kind == "loha"
        else {"lokr_w1": factors.w1, "lokr_w2_a": factors.B2, "lokr_w2_b": factors.A2}
    )  # fmt: skip
    for name, value in pairs.items():
        getattr(module, name)["default"].data = torch.tensor(
            np.ascontiguousarray(np.array(value[...]).T)
        )
    close(fold(layer).T, module.get_delta_weight("default").detach().numpy())


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_tuckers_form_and_its_gradients_are_those_of_peft(kind, monkeypatch):
    # PEFT's own backward of the product is wrong for w1_a and w2_a (`HadaWeightCP` takes one half
    # in place of the other): autograd has the formula of its forward.
    monkeypatch.setattr(peft.tuners.loha.layer, "make_weight_cp", hadamard_of_tucker)
    layer = randomise(conv(Rule(kind, 2, 0.5, factor=2 if kind == "loha" else 1, tucker=True)))
    shared = {"r": 2, "alpha": 1, "target_modules": ["layer"], "use_effective_conv2d": True}
    if kind == "loha":
        settings = peft.LoHaConfig(**shared)
        names = {"w1_a": "B1", "w1_b": "A1", "t1": "C1", "w2_a": "B2", "w2_b": "A2", "t2": "C2"}
        names = {f"hada_{part}": own for part, own in names.items()}
    else:
        settings = peft.LoKrConfig(**shared, decompose_factor=1)
        names = {"lokr_w1": "w1", "lokr_w2_a": "B2", "lokr_w2_b": "A2", "lokr_t2": "C2"}
    base = torch.nn.Conv2d(6, 8, 3, stride=2, padding=1)
    base.weight.data = torch.tensor(to_torch(layer.kernel[...]))
    module = peft.get_peft_model(torch.nn.ModuleDict({"layer": base}), settings).base_model.model
    module = module["layer"]
    base.bias.data.zero_()
    layer.bias[...] = jnp.zeros(8)
    for name, own in names.items():
        getattr(module, name)["default"].data = torch.tensor(of_tucker(own, layer.adapter))
    x = np.random.default_rng(1).normal(size=(2, 9, 9, 6)).astype(np.float32)
    output = module(torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2))))
    (output**2).mean().backward()

    graph, params = weights.split(layer)
    factors = {path: value for path, value in params.items() if "adapter" in path}

    def mean_square(factors):
        y = weights.merge(graph, {**params, **factors})(jnp.asarray(x))
        return jnp.mean(y**2), y

    (_, y), gradients = jax.value_and_grad(mean_square, has_aux=True)(factors)
    close(y, output.detach().numpy().transpose(0, 2, 3, 1))
    for name, own in names.items():
        grads = {key: gradients[f"adapter.{key}"] for key in names.values()}
        close(of_tucker(own, grads), getattr(module, name)["default"].grad.numpy())


def hadamard_of_tucker(t1, w1a, w1b, t2, w2a, w2b, scale):
    def half(t, a, b):
        return torch.einsum("ijkl,jr,ip->prkl", t, b, a)

    return half(t1, w1a, w1b) * half(t2, w2a, w2b) * scale


def of_tucker(own, values):
    """A factor of Tucker's form as files have it."""
    value = values[own] if isinstance(values, dict) else getattr(values, own)[...]
    if own.startswith("B"):  # [r, out] already
        return np.array(value)
    return np.ascontiguousarray(to_torch(value).squeeze((2, 3)) if "A" in own else to_torch(value))


def test_tuckers_form_of_lora_is_that_of_lycoris():
    """`up(mid(down(x)))`: a convolution of 1x1, one of 3x3 with the base's stride, one of 1x1."""
    layer = randomise(conv(Rule("lora", 2, 0.5, tucker=True)))
    own = layer.adapter
    assert own.A.shape == (1, 1, 6, 2) and own.C.shape == (3, 3, 2, 2) and own.B.shape == (2, 8)
    x = np.random.default_rng(1).normal(size=(2, 9, 9, 6)).astype(np.float32)
    convolve = torch.nn.functional.conv2d
    seen = torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    down, mid = (torch.tensor(to_torch(value[...])) for value in (own.A, own.C))
    up = torch.tensor(np.array(own.B[...]).T[..., None, None].copy())
    hidden = convolve(convolve(seen, down), mid, stride=2, padding=1)
    base = convolve(seen, torch.tensor(to_torch(layer.kernel[...])), stride=2, padding=1)
    expected = (base + 0.5 * convolve(hidden, up)).numpy().transpose(0, 2, 3, 1)
    close(layer(jnp.asarray(x)), expected + np.asarray(layer.bias[...]))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_one_pixel_have_no_core(kind):
    layer = linear(np.zeros((40, 24), np.float32), Rule(kind, 2, tucker=True))
    assert not [path for path in weights.split(layer)[1] if ".C" in path]


def test_sizes_of_kronecker_factors():
    """LyCORIS's own results."""
    expected = {
        (128, -1): (8, 16), (128, 4): (4, 32), (127, -1): (1, 127), (250, -1): (10, 25),
        (250, 4): (2, 125), (360, 8): (8, 45), (360, 16): (15, 24), (320, -1): (16, 20),
        (768, -1): (24, 32), (1280, 16): (16, 80), (1024, -1): (32, 32),
    }  # fmt: skip
    assert {one: factorization(*one) for one in expected} == expected


@pytest.mark.parametrize(
    "whole, shapes",
    [(False, {"w1": (8, 8), "A2": (3, 3, 8, 4), "B2": (4, 16)}),
     (True, {"w1": (8, 8), "w2": (3, 3, 8, 16)})],
)  # fmt: skip
def test_factors_of_a_convolution_by_kronecker(whole, shapes):
    layer = Conv(
        64,
        128,
        (3, 3),
        strides=(1, 1),
        padding=((1, 1), (1, 1)),
        kernel_init=nnx.initializers.zeros,
        rngs=weights.Keys(jax.random.key(0)),
    )
    adapted(layer, Rule("lokr", 4, 0.25, factor=8, full_matrix=whole))
    params = weights.split(layer.adapter)[1]
    assert {path: value.shape for path, value in params.items()} == shapes
    assert layer.adapter.rule.scale == (1.0 if whole else 0.25)


def test_initial_values_have_torchs_laws():
    kernel = np.zeros((320, 64), np.float32)
    a = np.asarray(linear(kernel, Rule(rank=64)).adapter.A[...])
    assert np.abs(a).max() <= 1 / np.sqrt(320) and a.std() == pytest.approx(0.0323, rel=0.03)
    a = np.asarray(linear(kernel, Rule(rank=16, init="gaussian")).adapter.A[...])
    assert a.std() == pytest.approx(1 / 16, rel=0.03)
    a = np.asarray(conv(Rule(rank=16)).adapter.A[...])
    assert np.abs(a).max() <= 1 / np.sqrt(6 * 9)


@pytest.mark.parametrize(
    "kind, name, std",
    [
        ("lora", "C", 1 / np.sqrt(3 * 64 * 9)),
        ("loha", "C1", 0.1),
        ("loha", "C2", 0.1),
        ("lokr", "C2", 1 / np.sqrt(3 * 64 * 9)),
        ("lokr", "B2", 1 / np.sqrt(3 * 160)),
    ],
)
def test_initial_values_of_tuckers_form_are_those_of_lycoris(kind, name, std):
    layer = Conv(
        6,
        160,
        (3, 3),
        strides=(1, 1),
        padding=((1, 1), (1, 1)),
        kernel_init=nnx.initializers.zeros,
        rngs=weights.Keys(jax.random.key(0)),
    )
    own = adapted(layer, Rule(kind, 64, factor=1, tucker=True)).adapter
    assert np.std(getattr(own, name)[...]) == pytest.approx(std, rel=0.03)


def test_blocks_that_are_stacked_have_factors_of_their_own():
    from sdjax.models.stacking import Blocks

    def block(rngs):
        return Linear(6, 4, kernel_init=nnx.initializers.normal(), rngs=rngs)

    stacked = Blocks((block, 3), rngs=weights.Keys(jax.random.key(0)))
    adapters.attach(stacked, lambda *_: Rule("dora", 2, 1.5), weights.Keys(jax.random.key(1)))
    params = weights.split(stacked)[1]
    assert params["0-2.adapter.A"].shape == (3, 6, 2)
    assert params["0-2.adapter.magnitude"].shape == (3, 4)
    assert len({a.tobytes() for a in np.asarray(params["0-2.adapter.A"])}) == 3
    stacked = randomise(stacked)
    x = jax.random.normal(jax.random.key(2), (5, 6))
    _, together = stacked.scan(lambda layer, carry, _: (carry, layer(x)), None)
    (kernels,) = adapters.folded(stacked).values()
    expected = jnp.einsum("bi,nio->nbo", x, kernels) + getattr(stacked, "0-2").bias[...][:, None]
    np.testing.assert_allclose(together, expected, rtol=1e-5, atol=1e-6)


def test_a_frozen_kernel_costs_no_product_for_its_gradient():
    """6 N r (in + out) for the factors and 4 N in out for the layer, of 6 N in out and more."""
    layer = linear(np.zeros((256, 256), np.float32), Rule(rank=4))
    graph, params = weights.split(layer)
    factors = {path: v for path, v in params.items() if "adapter" in path}
    x = jnp.ones((64, 256))

    def flops(trained):
        def loss(trained, frozen, x):
            # The gradient of x, too, which layers before this one ask for.
            return weights.merge(graph, {**frozen, **trained})(x).sum()

        frozen = {path: v for path, v in params.items() if path not in trained}
        step = jax.jit(jax.grad(loss, argnums=(0, 2)))
        return step.lower(trained, frozen, x).compile().cost_analysis()["flops"]

    assert flops(factors) < 0.75 * flops(params)


@pytest.mark.parametrize("rates", [{"inputs": 0.5}, {"hidden": 0.5}, {"rank": 0.5}])
def test_dropout_keeps_the_mean(rates):
    rule = Rule("lora", 8, 1.0, dropout=Dropout(**rates))
    layer = randomise(linear(np.zeros((16, 4), np.float32), rule))
    layer.kernel[...] = jnp.zeros((16, 4))
    x = jnp.ones((1, 16))

    draws = drawn(layer, x, 20_000)
    expected = x @ layer.adapter.A[...] @ layer.adapter.B[...] + layer.bias[...]
    error = draws.std(0) / np.sqrt(len(draws))
    assert draws.std() > 0.1 and np.all(np.abs(draws.mean(0) - expected) < 5 * error)


def test_dropout_of_modules_leaves_the_layer_as_it_was():
    rule = Rule("lora", 2, 1.0, dropout=Dropout(module=0.4))
    layer = randomise(linear(np.zeros((6, 4), np.float32), rule))
    x = jnp.ones((3, 6))

    draws = drawn(layer, x, 2000)
    layer.adapter = nnx.data(None)
    without = np.all(draws == layer(x), axis=(1, 2))
    assert without.mean() == pytest.approx(0.4, abs=0.05)
    assert len(np.unique(np.asarray(draws[~without]), axis=0)) == 1


def drawn(layer, x, count):
    """The layer's output under so many keys, [count, ...]."""
    graph, params = weights.split(layer)

    def output(key):
        own = {**params, "adapter.key": jax.random.key_data(key)}
        return weights.merge(graph, own)(x)

    return jax.jit(jax.vmap(output))(jax.random.split(jax.random.key(3), count))


def test_keys_differ_for_each_adapter_and_block():
    keys = adapters.dropout_keys(["a.key", "b.key"], [(2,), (3, 2)], jax.random.key(0))
    assert keys["b.key"].shape == (3, 2)
    rows = np.concatenate([np.asarray(keys["a.key"])[None], keys["b.key"]])
    assert len(np.unique(rows, axis=0)) == 4


@pytest.mark.parametrize("lead", [(), (3,)])
def test_large_changes_are_scaled_to_the_largest_norm(lead):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(*lead, 3, 3, 6, 4)).astype(np.float32)
    b = rng.normal(size=(*lead, 4, 5)).astype(np.float32)
    if lead:  # stacked layers are dense
        a = a.reshape(3, 54, 4)
    params = {"x.adapter.A": jnp.asarray(a), "x.adapter.B": jnp.asarray(b)}

    def norms(params):
        changes = (
            params["x.adapter.A"] @ params["x.adapter.B"]
            if lead
            else (params["x.adapter.A"].reshape(-1, 4) @ params["x.adapter.B"])[None]
        )
        return 0.5 * np.linalg.norm(np.asarray(changes), axis=(-2, -1))

    before = norms(params)
    most = float(np.median(before)) if lead else 0.1 * float(before[0])
    after = adapters.within(params, {"x": 0.5}, most)
    np.testing.assert_allclose(norms(after), np.minimum(before, most), rtol=1e-5)
    untouched = adapters.within(params, {"x": 0.5}, 1e6)
    np.testing.assert_array_equal(untouched["x.adapter.A"], params["x.adapter.A"])


def to_torch(value):
    value = np.asarray(value)
    return np.ascontiguousarray(value.T if value.ndim == 2 else value.transpose(3, 2, 0, 1))


def from_torch(value):
    return jnp.asarray(value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0))


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
