"""ControlNet against diffusers `ControlNetModel`, and the residuals that a UNet takes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.families import sd, sdxl
from sdjax.models import weights
from sdjax.models.config import ConfigError
from sdjax.models.controlnet.config import ControlNetConfig
from sdjax.models.controlnet.network import ControlNet, guess_scales, scaled, total
from sdjax.models.unet import Residuals, UNet, UNetConfig

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
SD1 = ControlNetConfig(
    block_out_channels=(16, 32),
    down_block_types=(CROSS_DOWN, DOWN),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=24,
    attention_head_dim=4,
    conditioning_embedding_out_channels=(4, 8),
)
SD2 = dataclasses.replace(
    SD1,
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    upcast_attention=True,
    controlnet_conditioning_channel_order="bgr",
    conditioning_embedding_out_channels=(4, 6, 8, 10),
)
XL = dataclasses.replace(
    SD1,
    block_out_channels=(16, 24, 32),
    down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
    layers_per_block=2,
    attention_head_dim=(1, 2, 4),
    transformer_layers_per_block=(1, 1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=10 + 6 * 8,
)
POOLED = dataclasses.replace(SD1, global_pool_conditions=True)
# The config, and how many residuals there are before the middle's.
CASES = {"sd1": (SD1, 4), "sd2": (SD2, 4), "xl": (XL, 9), "pooled": (POOLED, 4)}
PUBLISHED = {"sd1": UNetConfig(), "sd2": sd.UNET_SD2, "sdxl": sdxl.UNET_SDXL}


def inputs(reference, config, size=(8, 6)):
    """(latents, timesteps, context, condition), and what torch gets besides, as numpy."""
    xt = reference.normal(1, 2, *size, config.in_channels)
    context = reference.normal(2, 2, 5, config.cross_attention_dim)
    side = tuple(s * config.downscale for s in size)
    condition = np.random.default_rng(3).uniform(size=(2, *side, 3)).astype(np.float32)
    added = {}
    if config.addition_embed_type:
        ids = np.random.default_rng(4).integers(0, 1500, (2, 6)).astype(np.float32)
        added = {"text_embeds": reference.normal(5, 2, 10), "time_ids": ids}
        context = {"context": context, "pooled": added["text_embeds"], "numbers": ids}
    return (xt, np.float32([3.0, 990.5]), context, condition), added


def torch_control(reference, config, seed=0):
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.ControlNetModel.from_config(config.to_json())
    made.set_default_attn_processor()
    return reference.randomised(made, seed)  # the zero convolutions too


def run_torch(reference, model, given, added, **options):
    xt, t, context, condition = given
    text = context["context"] if added else context
    more = {"added_cond_kwargs": {k: reference.to_torch(v) for k, v in added.items()}}
    down, mid = model(
        *(reference.to_torch(x) for x in (xt, t, text, condition)),
        **(more if added else {}), return_dict=False, **options,
    )  # fmt: skip
    return [*down, mid]


@pytest.mark.parametrize("case", CASES)
def test_residuals_and_every_gradient_equal_diffusers(case, reference):
    config, count = CASES[case]
    model = torch_control(reference, config)
    given, added = inputs(reference, config)
    want = run_torch(reference, model, given, added)
    cotangents = [
        reference.normal(10 + i, *reference.from_torch(x).shape) for i, x in enumerate(want)
    ]
    sum((x * reference.to_torch(c)).sum() for x, c in zip(want, cotangents, strict=True)).backward()
    graph, abstract = weights.abstract(ControlNet, config)
    params = weights.from_diffusers(reference.tensors(model), abstract)

    @reference.jit
    def run(params):
        out, pullback = jax.vjp(lambda p: weights.merge(graph, p)(*given), params)
        *down, mid = map(jnp.asarray, cotangents)
        return out, pullback(Residuals(tuple(down), mid))[0]

    (down, mid), gradients = run(params)
    assert len(down) == count
    for ours, theirs in zip((*down, mid), want, strict=True):
        assert reference.error(ours, reference.from_torch(theirs)) <= 2e-5
    gradients = weights.to_diffusers(gradients)
    for name, parameter in model.named_parameters():
        error = reference.error(gradients.pop(name), parameter.grad.numpy())
        assert error <= 2e-5, name
    assert not gradients


@pytest.mark.parametrize("config", [SD1, POOLED])
@pytest.mark.parametrize("guess", [False, True])
def test_weight_and_guess_mode_scale_as_in_diffusers(config, guess, reference):
    model = torch_control(reference, config)
    given, added = inputs(reference, config)
    want = run_torch(reference, model, given, added, guess_mode=guess, conditioning_scale=0.7)
    graph, abstract = weights.abstract(ControlNet, config)
    params = weights.from_diffusers(reference.tensors(model), abstract)
    guess = guess and not config.global_pool_conditions
    down, mid = reference.jit(
        lambda p: scaled(weights.merge(graph, p)(*given), 0.7, guess=guess)
    )(params)  # fmt: skip
    for ours, theirs in zip((*down, mid), want, strict=True):
        assert reference.error(ours, reference.from_torch(theirs)) <= 2e-5


def test_guess_mode_goes_from_a_tenth_to_one():
    scales = guess_scales(13)
    assert len(scales) == 13
    np.testing.assert_allclose(scales[[0, 6, -1]], [0.1, 10**-0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize("case", ["sd1", "xl"])
def test_a_unet_with_the_residuals_of_two_networks_equals_diffusers(case, reference):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

    config, _ = CASES[case]
    nets = [torch_control(reference, config, seed) for seed in (0, 1)]
    torch_unet = diffusers.UNet2DConditionModel.from_config(config.unet.to_json())
    torch_unet.set_default_attn_processor()
    torch_unet = reference.randomised(torch_unet, 2)
    given, added = inputs(reference, config)
    xt, t, context, condition = given
    other = 1 - condition
    text = context["context"] if added else context
    more = {k: reference.to_torch(v) for k, v in added.items()}
    extra = {"added_cond_kwargs": more} if added else {}
    first = tuple(reference.to_torch(x) for x in (xt, t, text))
    down, mid = MultiControlNetModel(nets)(
        *first, [reference.to_torch(c) for c in (condition, other)], [0.5, 1.5],
        return_dict=False, **extra,
    )  # fmt: skip
    want = torch_unet(
        *first, down_block_additional_residuals=down, mid_block_additional_residual=mid, **extra
    ).sample
    graph, abstract = weights.abstract(ControlNet, config)
    unet, unet_abstract = weights.abstract(UNet, config.unet)
    controls = [weights.from_diffusers(reference.tensors(net), abstract) for net in nets]
    params = weights.from_diffusers(reference.tensors(torch_unet), unet_abstract)

    @reference.jit
    def run(controls, params):
        a, b = (weights.merge(graph, p) for p in controls)
        rest = (xt, t, context)
        sums = total([scaled(a(*rest, condition), 0.5), scaled(b(*rest, other), 1.5)])
        return weights.merge(unet, params)(*rest, residuals=sums)

    assert reference.error(run(controls, params), reference.from_torch(want)) <= 2e-5


@pytest.mark.parametrize(
    ("case", "count", "tensors", "convolutions"),
    [("sd1", 361_279_120, 340, 12), ("sd2", 364_228_240, 340, 12),
     ("sdxl", 1_251_014_160, 844, 9)],
)  # fmt: skip
def test_parameters_of_published_networks_are_those_of_diffusers(
    case, count, tensors, convolutions
):
    """finetuning.md, section 7."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config = ControlNetConfig.of_unet(PUBLISHED[case])
    _, params = weights.abstract(ControlNet, config)
    shapes = weights.tensor_shapes(params)
    assert sum(map(math.prod, shapes.values())) == count
    assert len(shapes) == tensors
    kernels = [n for n in shapes if n.startswith("controlnet_down_blocks.") and "weight" in n]
    assert len(kernels) == convolutions
    embedding = [n for n in shapes if n.startswith("controlnet_cond_embedding.")]
    assert sum(math.prod(shapes[n]) for n in embedding) == 1_086_480
    with torch.device("meta"):
        theirs = diffusers.ControlNetModel.from_config(config.to_json())
    assert {n: tuple(v.shape) for n, v in theirs.state_dict().items()} == shapes


@pytest.mark.parametrize("case", CASES)
def test_a_config_comes_back_from_the_file_that_diffusers_writes(case, tmp_path, reference):
    config, _ = CASES[case]
    model = torch_control(reference, config)
    theirs = dict(model.config)
    read, ignored = ControlNetConfig.from_json(theirs)
    assert read == config
    assert [name for name in ignored if not name.startswith("_")] == [
        "addition_embed_type_num_heads"
    ]
    assert all(theirs[k] == v for k, v in config.to_json().items() if not isinstance(v, list))


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_config_of_a_unet_makes_the_one_that_from_unet_makes(preset):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    unet = PUBLISHED[preset]
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel.from_config(unet.to_json())
        made = diffusers.ControlNetModel.from_unet(network, load_weights_from_unet=False)
    assert ControlNetConfig.from_json(dict(made.config))[0] == ControlNetConfig.of_unet(unet)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"controlnet_conditioning_channel_order": "gbr"}, "one of .'rgb', 'bgr'"),
        ({"conditioning_embedding_out_channels": [1] * 10}, "1 to 9 widths"),
        ({"conditioning_embedding_out_channels": [0]}, "1 to 4,096"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type = 'UNetMidBlock2D'"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types"),
        ({"class_embed_type": "projection"}, "class_embed_type"),
        ({"lora_controlnet": 1}, "unknown field"),
    ],
)
def test_configs_that_are_not_honoured_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        ControlNetConfig.from_json(ControlNetConfig().to_json() | changes)


def test_a_condition_of_another_size_is_refused(reference):
    (xt, t, context, condition), _ = inputs(reference, SD1)
    graph, abstract = weights.abstract(ControlNet, SD1)
    with pytest.raises(ValueError, match="expected 2 times their height and width"):
        jax.eval_shape(
            lambda p: weights.merge(graph, p)(xt, t, context, condition[:, 1:]), abstract
        )


def test_a_unet_with_a_fresh_network_says_the_same_to_the_bit(reference):
    """FT-50, operation by operation: two programs may round differently."""
    xt, t, context, condition = inputs(reference, SD1)[0]
    _, abstract = weights.abstract(UNet, SD1.unet)
    rng = np.random.default_rng(0)
    params = {p: jnp.asarray(rng.normal(size=v.shape), v.dtype) for p, v in abstract.items()}
    control = weights.init(ControlNet, SD1, jax.random.key(0))
    unet = weights.merge(weights.abstract(UNet, SD1.unet)[0], params)
    network = weights.merge(weights.abstract(ControlNet, SD1)[0], control)
    with jax.disable_jit():
        residuals = network(xt, t, context, condition)
        plain = unet(xt, t, context)
        steered = unet(xt, t, context, residuals=residuals)
    assert not any(np.any(x) for x in (*residuals.down, residuals.mid))
    assert np.any(plain)
    np.testing.assert_array_equal(plain, steered)
