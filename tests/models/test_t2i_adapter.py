"""T2I-Adapters against diffusers `T2IAdapter`, and the maps that a UNet takes of them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import capture, weights
from sdjax.models.config import ConfigError
from sdjax.models.t2i_adapter.config import T2IAdapterConfig
from sdjax.models.t2i_adapter.network import T2IAdapter, total_maps
from sdjax.models.unet import UNet
from tests.models.test_controlnet import SD1, XL, inputs

FULL = T2IAdapterConfig(channels=(16, 32), downscale_factor=2)
DEEP = T2IAdapterConfig(channels=(8, 16, 16), num_res_blocks=1, downscale_factor=4, in_channels=1)
FULL_XL = T2IAdapterConfig(
    channels=(16, 24, 32, 32), downscale_factor=4, adapter_type="full_adapter_xl"
)
LIGHT = T2IAdapterConfig(channels=(16, 32), downscale_factor=2, adapter_type="light_adapter")
# The config, height and width of the condition, and those of the maps.
CASES = {
    "full": (FULL, (16, 12), [(8, 6), (4, 3)]),
    "deep, of odd sizes": (DEEP, (20, 12), [(5, 3), (3, 2), (2, 1)]),
    "xl": (FULL_XL, (24, 16), [(6, 4), (6, 4), (3, 2), (3, 2)]),
    "light": (LIGHT, (12, 16), [(6, 8), (3, 4), (2, 2)]),
}
PUBLISHED = {
    "sd1": (T2IAdapterConfig(), 77_369_280),
    "sdxl": (T2IAdapterConfig(downscale_factor=16, adapter_type="full_adapter_xl"), 79_028_160),
    "light": (
        T2IAdapterConfig(channels=(320, 640, 1280), num_res_blocks=4, adapter_type="light_adapter"),
        18_689_200,
    ),
}


def torch_adapter(reference, config, seed=0):
    diffusers = pytest.importorskip("diffusers")
    return reference.randomised(diffusers.T2IAdapter.from_config(config.to_json()), seed)


def pictures(config, size, seed=3):
    """Conditions, [2, H, W, 3]; of one channel, what its three are all equal to."""
    drawn = np.random.default_rng(seed).uniform(size=(2, *size, config.in_channels))
    return np.broadcast_to(drawn, (2, *size, 3)).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_maps_and_every_gradient_equal_diffusers(case, reference):
    """FT-54."""
    config, size, sizes = CASES[case]
    model = torch_adapter(reference, config)
    condition = pictures(config, size)
    want = model(reference.to_torch(condition[..., : config.in_channels]))
    shapes = [tuple(reference.from_torch(x).shape) for x in want]
    assert [shape[1:3] for shape in shapes] == sizes
    assert [
        (shape[3], math.ceil(size[0] / shape[1])) for shape in shapes
    ] == [(c, math.ceil(size[0] / math.ceil(size[0] / f))) for c, f in config.maps]  # fmt: skip
    cotangents = [reference.normal(10 + i, *shape) for i, shape in enumerate(shapes)]
    sum((x * reference.to_torch(c)).sum() for x, c in zip(want, cotangents, strict=True)).backward()
    graph, abstract = weights.abstract(T2IAdapter, config, remat="block")
    params = weights.from_diffusers(reference.tensors(model), abstract)

    @reference.jit
    def run(params):
        out, pullback = jax.vjp(lambda p: weights.merge(graph, p)(condition), params)
        return out, pullback(tuple(map(jnp.asarray, cotangents)))[0]

    maps, gradients = run(params)
    for ours, theirs in zip(maps, want, strict=True):
        assert reference.error(ours, reference.from_torch(theirs)) <= 2e-5
    gradients = weights.to_diffusers(gradients)
    for name, parameter in model.named_parameters():
        error = reference.error(gradients.pop(name), parameter.grad.numpy())
        assert error <= 2e-5, name
    assert not gradients


# The maps of FULL_XL are those of a UNet whose first level has no attention, and of its middle.
@pytest.mark.parametrize(
    ("control", "config", "size"), [(SD1, FULL, (5, 7)), (XL, FULL_XL, (8, 6))], ids=["sd1", "xl"]
)
def test_a_unet_with_the_maps_of_two_networks_equals_diffusers(control, config, size, reference):
    diffusers = pytest.importorskip("diffusers")
    unet = control.unet
    nets = [torch_adapter(reference, config, seed) for seed in (0, 1)]
    torch_unet = diffusers.UNet2DConditionModel.from_config(unet.to_json())
    torch_unet.set_default_attn_processor()
    torch_unet = reference.randomised(torch_unet, 2)
    (xt, t, context, _), added = inputs(reference, control, size)
    conditions = [pictures(config, tuple(2 * s for s in size), seed) for seed in (3, 4)]
    text = context["context"] if added else context
    more = {k: reference.to_torch(v) for k, v in added.items()}
    extra = {"added_cond_kwargs": more} if added else {}
    maps = diffusers.MultiAdapter(nets)([reference.to_torch(c) for c in conditions], [0.5, 1.5])
    shown = [x.detach().clone().requires_grad_() for x in maps]
    want = torch_unet(
        *(reference.to_torch(x) for x in (xt, t, text)),
        down_intrablock_additional_residuals=[x * 1.0 for x in shown], **extra,
    ).sample  # fmt: skip
    cotangent = reference.normal(20, *reference.from_torch(want).shape)
    (want * reference.to_torch(cotangent)).sum().backward()
    graph, abstract = weights.abstract(T2IAdapter, config)
    network, unet_abstract = weights.abstract(UNet, unet)
    own = [weights.from_diffusers(reference.tensors(net), abstract) for net in nets]
    params = weights.from_diffusers(reference.tensors(torch_unet), unet_abstract)

    @reference.jit
    def run(own, params):
        said = [weights.merge(graph, p)(c) for p, c in zip(own, conditions, strict=True)]
        scaled = [[w * x for x in maps] for w, maps in zip((0.5, 1.5), said, strict=True)]
        given = total_maps(scaled)
        out, pullback = jax.vjp(
            lambda maps: weights.merge(network, params)(xt, t, context, maps=maps), given
        )
        return out, pullback(jnp.asarray(cotangent))[0]

    out, gradients = run(own, params)
    assert reference.error(out, reference.from_torch(want)) <= 2e-5
    for ours, theirs in zip(gradients, shown, strict=True):
        assert reference.error(ours, reference.from_torch(theirs.grad)) <= 2e-5


def test_maps_that_do_not_fit_a_unet_are_refused(reference):
    xt, t, context, _ = inputs(reference, SD1)[0]
    graph, abstract = weights.abstract(UNet, SD1.unet)

    def run(maps):
        jax.eval_shape(lambda p: weights.merge(graph, p)(xt, t, context, maps=maps), abstract)

    with pytest.raises(ValueError, match=r"map has \[2, 4, 6, 16\], the UNet's \[2, 8, 6, 16\]"):
        run((jnp.zeros((2, 4, 6, 16)),))
    with pytest.raises(ValueError, match="4 maps for a UNet of 2 levels and a middle"):
        run((jnp.zeros((2, 8, 6, 16)),) * 4)


@pytest.mark.parametrize("case", PUBLISHED)
def test_parameters_of_published_networks_are_those_of_diffusers(case):
    """finetuning.md, section 8."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config, count = PUBLISHED[case]
    _, params = weights.abstract(T2IAdapter, config)
    shapes = weights.tensor_shapes(params)
    assert sum(map(math.prod, shapes.values())) == count
    with torch.device("meta"):
        theirs = diffusers.T2IAdapter.from_config(config.to_json())
    assert {n: tuple(v.shape) for n, v in theirs.state_dict().items()} == shapes
    factor = config.maps[-1][1]
    assert factor == theirs.total_downscale_factor


@pytest.mark.parametrize("case", CASES)
def test_a_config_comes_back_from_the_file_that_diffusers_writes(case, reference):
    config, *_ = CASES[case]
    theirs = dict(torch_adapter(reference, config).config)
    read, ignored = T2IAdapterConfig.from_json(theirs)
    assert read == config and all(name.startswith("_") for name in ignored)
    assert T2IAdapterConfig.from_json({})[0] == T2IAdapterConfig()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter_type": "adapter"}, "one of .'full_adapter', 'full_adapter_xl'"),
        ({"channels": []}, "1 to 8 widths"),
        ({"channels": [1]}, "4 to 32,768"),
        ({"in_channels": 4}, "1 or 3"),
        ({"downscale_factor": 1000}, "1 to 256"),
        ({"num_res_blocks": 0}, "1 to 32"),
        ({"adapter_type": "full_adapter_xl", "channels": [8, 8, 8, 16]}, "from the third on"),
        ({"more": 1}, "unknown field"),
    ],
)
def test_configs_that_are_not_honoured_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        T2IAdapterConfig.from_json(T2IAdapterConfig().to_json() | changes)


def test_a_condition_of_another_size_is_refused():
    graph, abstract = weights.abstract(T2IAdapter, FULL)
    with pytest.raises(ValueError, match="multiples of 2"):
        jax.eval_shape(lambda p: weights.merge(graph, p)(jnp.zeros((1, 8, 7, 3))), abstract)


def test_a_colour_condition_is_read_by_its_luma(reference):
    """As PIL's convert("L") has it, before it rounds."""
    from PIL import Image

    config = dataclasses.replace(FULL, in_channels=1)
    coloured = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    grey = np.asarray(Image.fromarray(coloured[0]).convert("L"))[None, ..., None]
    graph, _ = weights.abstract(T2IAdapter, config)
    params = weights.init(T2IAdapter, config, jax.random.key(0))
    read = reference.jit(lambda x: weights.merge(graph, params)(x / 255))
    one, other = (read(np.broadcast_to(x, (1, 8, 8, 3))) for x in (coloured, grey))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=0.6 / 255)


def test_maxima_are_of_each_map(reference):
    graph, _ = weights.abstract(T2IAdapter, FULL)
    params = weights.init(T2IAdapter, FULL, jax.random.key(0))
    condition = pictures(FULL, (8, 8))
    found = capture.maxima(graph, params, condition)
    maps = weights.merge(graph, params)(condition)
    assert found == {f"adapter.body.{i}": jnp.abs(x).max() for i, x in enumerate(maps)}
