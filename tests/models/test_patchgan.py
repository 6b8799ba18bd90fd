"""The critic against torch: taming-transformers' NLayerDiscriminator."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import weights
from sdjax.models.critics.patchgan import PatchGAN, PatchGANConfig

torch = pytest.importorskip("torch")


def discriminator(width=64, layers=3):
    """taming/modules/discriminator/model.py, with torch's own modules."""
    nn = torch.nn
    main = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    channels = width
    for n in range(1, layers + 1):
        wide, stride = width * min(2**n, 8), 2 if n < layers else 1
        main += [nn.Conv2d(channels, wide, 4, stride, 1, bias=False), nn.BatchNorm2d(wide),
                 nn.LeakyReLU(0.2)]  # fmt: skip
        channels = wide
    module = nn.Module()
    module.main = nn.Sequential(*main, nn.Conv2d(channels, 1, 4, 1, 1))
    return module


@pytest.mark.parametrize("width, layers, size", [(4, 3, (32, 24)), (6, 1, (6, 10))])
def test_equals_torch_and_every_gradient(width, layers, size, reference):
    theirs = reference.randomised(discriminator(width, layers)).train()
    images = reference.normal(0, 4, *size, 3)
    x = reference.to_torch(images).requires_grad_()
    want = theirs.main(x)[:, 0]
    cotangent = reference.normal(1, *want.shape)
    want.backward(torch.tensor(cotangent).double())
    config = PatchGANConfig(width=width, layers=layers)
    graph, abstract = weights.abstract(PatchGAN, config)
    found = {
        name: value
        for name, value in reference.tensors(theirs).items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    params = weights.from_diffusers(found, abstract)

    @reference.jit
    def run(params, images):
        out, pull = jax.vjp(lambda p, x: weights.merge(graph, p)(x), params, images)
        return out, *pull(jnp.asarray(cotangent))

    out, gradients, by_images = run(params, images)
    assert out.dtype == jnp.float32
    assert reference.error(out, want.detach().numpy()) <= 1e-5
    assert reference.error(by_images, reference.from_torch(x.grad)) <= 2e-5
    gradients = weights.to_diffusers(gradients)
    for name, parameter in theirs.named_parameters():
        assert reference.error(gradients.pop(name), parameter.grad.numpy()) <= 2e-5, name
    assert not gradients


@pytest.mark.parametrize("layers, count", [(3, 2_765_633), (2, 663_361), (4, 6_960_961)])
def test_parameters_and_names_are_those_of_the_reference(layers, count):
    _, params = weights.abstract(PatchGAN, PatchGANConfig(layers=layers))
    assert sum(math.prod(p.shape) for p in params.values()) == count
    with torch.device("meta"):
        theirs = discriminator(layers=layers)
    names = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert weights.tensor_shapes(params) == names


def logits(config, side):
    graph, abstract = weights.abstract(PatchGAN, config)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(lambda p, x: weights.merge(graph, p)(x), abstract, image).shape


def test_sides_of_the_logits():
    config = PatchGANConfig()
    for side, want in ((64, 6), (128, 14), (256, 30), (512, 62)):
        assert logits(config, side) == (1, want, want)
    for layers in (1, 2, 3, 4):
        config = PatchGANConfig(layers=layers)
        assert logits(config, config.least_side) == (1, 1, 1)
        assert 0 in logits(config, config.least_side - 2**layers)


def test_it_is_drawn_as_the_reference_is(reference):
    """On clipped normal pictures of 64 px the reference's logits have mean 0.4 to 0.5, std 1.05."""
    config = PatchGANConfig()
    graph, _ = weights.abstract(PatchGAN, config)
    params = reference.jit(lambda key: weights.init(PatchGAN, config, key))(jax.random.key(0))
    for kernel in (np.asarray(v) for path, v in params.items() if path.endswith(".kernel")):
        np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, 0.02], atol=1e-3)
    np.testing.assert_allclose(np.std(params["main.9.scale"]), 0.02, rtol=0.1)
    np.testing.assert_allclose(np.mean(params["main.9.scale"]), 1, atol=3e-3)
    assert not np.any(params["main.9.bias"])
    bound = 1 / math.sqrt(4 * 4 * 3)
    first = np.abs(np.asarray(params["main.0.bias"]))
    assert 0.9 * bound < first.max() <= bound
    images = np.clip(reference.normal(0, 4, 64, 64, 3), -1, 1)
    out = np.asarray(reference.jit(lambda p, x: weights.merge(graph, p)(x))(params, images))
    assert 0.8 < out.std() < 1.3


@pytest.mark.parametrize("field, value", [("width", 0), ("layers", 0), ("layers", 9)])
def test_a_wrong_shape_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value}: expected"):
        PatchGANConfig(**{field: value})
