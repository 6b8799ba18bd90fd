"""LPIPS against torch and the published numbers."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.formats.vgg16 import read_lpips
from sdjax.models import weights
from sdjax.models.lpips.network import LPIPS, LPIPSConfig, normalised, shipped_heads
from sdjax.models.params import component

torch = pytest.importorskip("torch")

SMALL = LPIPSConfig(widths=(4, 6, 8, 8, 8))
SHIFT = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
SCALE = torch.tensor([0.458, 0.448, 0.450])[:, None, None]


class Torch(torch.nn.Module):
    """lpips/lpips.py in evaluation, over the layers of torchvision's vgg16 (configuration "D")."""

    def __init__(self, config):
        super().__init__()
        layers, channels, self.ends = [], 3, []
        for i, (width, count) in enumerate(zip(config.widths, config.layers, strict=True)):
            layers += [torch.nn.MaxPool2d(2, 2)] if i else []
            for _ in range(count):
                layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
                channels = width
            self.ends.append(len(layers))
        self.features = torch.nn.Sequential(*layers)
        self.heads = torch.nn.ParameterList(torch.rand(w) for w in config.widths)

    def forward(self, a, b):
        a, b, total, begin = (a - SHIFT) / SCALE, (b - SHIFT) / SCALE, 0.0, 0
        for end, head in zip(self.ends, self.heads, strict=True):
            a, b = self.features[begin:end](a), self.features[begin:end](b)
            f, g = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
            total = total + ((f - g).square() * head[:, None, None]).sum(1).mean((1, 2))
            begin = end
        return total


def bound(config, params):
    graph, _ = weights.abstract(LPIPS, config)
    return weights.merge(graph, params)


def test_equals_torch_and_its_gradient(reference):
    torch.manual_seed(0)
    theirs = Torch(SMALL)
    for layer in theirs.features:  # some activations survive all blocks
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    theirs = theirs.double()
    a, b = (np.tanh(reference.normal(seed, 2, 32, 24, 3)) for seed in (0, 1))
    x = reference.to_torch(a).requires_grad_()
    want = theirs(x, reference.to_torch(b))
    (want * torch.tensor([1.0, -2.0])).sum().backward()
    params = weights.from_diffusers(reference.tensors(theirs), weights.abstract(LPIPS, SMALL)[1])

    @reference.jit
    def run(params, a):
        model = bound(SMALL, params)
        return model(a, b), jax.grad(lambda a: model(a, b) @ jnp.asarray([1.0, -2.0]))(a)

    value, gradient = run(params, a)
    assert value.dtype == jnp.float32 and value.shape == (2,)
    assert reference.error(value, want.detach().numpy()) <= 1e-5
    assert reference.error(gradient, reference.from_torch(x.grad)) <= 1e-5


def test_names_and_shapes_are_those_of_torchvision():
    """torchvision/models/vgg.py, vgg16: 14,714,688 parameters before the classifier."""
    _, params = weights.abstract(LPIPS, LPIPSConfig())
    shapes = weights.tensor_shapes({p: v for p, v in params.items() if p.startswith("features.")})
    indices = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    assert set(shapes) == {f"features.{i}.{leaf}" for i in indices for leaf in ("weight", "bias")}
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 14_714_688


def test_the_shipped_heads_are_those_of_version_0_1():
    """Sums of lpips 0.1.4, weights/v0.1/vgg.pth; those of v0.0 are 3.64, 1.96, 1.12, ..."""
    heads = shipped_heads()
    sums = [float(heads[f"heads.{i}"].sum()) for i in range(5)]
    np.testing.assert_allclose(sums, (6.92599, 8.85833, 17.51501, 51.52132, 47.03485), rtol=1e-6)
    extremes = [
        (float(heads[f"heads.{i}"].min()), float(heads[f"heads.{i}"].max())) for i in (0, 4)
    ]
    np.testing.assert_allclose(extremes, [(0.02102, 1.28282), (0.01928, 0.45844)], atol=5e-6)
    assert all(value.min() >= 0 and value.dtype == np.float32 for value in heads.values())


def test_zeros_have_a_finite_gradient_and_other_features_the_exact_value():
    gradient = jax.grad(lambda x: jnp.sum(normalised(x)))(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(gradient, np.zeros((2, 3), np.float32))
    x = np.float32([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(normalised(jnp.asarray(x)), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


def test_equal_pictures_have_no_distance_and_no_gradient_even_where_nothing_is_active(reference):
    _, abstract = weights.abstract(LPIPS, SMALL)
    params = {path: jnp.full(value.shape, -0.1) for path, value in abstract.items()}
    picture = jnp.ones((1, 16, 16, 3))  # no unit is active from the first layer on

    @reference.jit
    def run(params):
        model = bound(SMALL, params)
        return jax.value_and_grad(lambda a: model(a, picture)[0])(picture)

    value, gradient = run(params)
    assert value == 0 and np.all(np.asarray(gradient) == 0)


def vgg16():
    """A file of VGG16 among the sample data, in any layout that is read."""
    found = sorted(Path(os.environ.get("SDJAX_TEST_DATA", "/nowhere")).glob("vgg16*"))
    return found[0] if found else pytest.skip("no vgg16* in $SDJAX_TEST_DATA")


def test_published_weights_give_the_published_distances(reference):
    """Distances by the package lpips 0.1.4 with torchvision's vgg16, net="vgg"."""
    params = component(read_lpips("lpips", vgg16()), "lpips")
    y, x = np.mgrid[:64, :64].astype(np.float64)
    waves = np.sin(2 * np.pi * x / 16), np.cos(2 * np.pi * y / 16), np.sin(np.pi * (x + y) / 16)
    a = 0.8 * np.stack(waves, -1)[None].astype(np.float32)
    others = np.concatenate([np.roll(a, 1, axis=2), a / 2, 0 * a])
    run = reference.jit(lambda params, a, b: jnp.stack(bound(LPIPSConfig(), params).parts(a, b)))
    parts = np.asarray(run(params, np.repeat(a, 3, axis=0), others))
    np.testing.assert_allclose(parts.sum(0), (0.02436823, 0.05755721, 0.88306261), rtol=1e-6)
    want = (0.284176, 0.189279, 0.103022, 0.138805, 0.167780)
    np.testing.assert_allclose(parts[:, 2], want, atol=1e-6)
