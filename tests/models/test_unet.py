"""The UNet against diffusers `UNet2DConditionModel`, and its config."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import blocks, weights
from sdjax.models.config import ConfigError
from sdjax.models.unet import UNet, UNetConfig

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"
SMALL = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=(CROSS_DOWN, DOWN),
    up_block_types=(UP, CROSS_UP),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=24,
    attention_head_dim=4,
)
# Each config with the latent size it runs at.
TINY = dataclasses.replace(
    SMALL, block_out_channels=(32,), down_block_types=(CROSS_DOWN,), up_block_types=(CROSS_UP,)
)
CASES = {
    "sd1_like": (
        UNetConfig(
            block_out_channels=(32, 64),
            down_block_types=(CROSS_DOWN, DOWN),
            up_block_types=(UP, CROSS_UP),
            norm_num_groups=16,
            cross_attention_dim=24,
            attention_head_dim=8,
        ),
        (8, 8),
    ),
    "sd2_like": (
        UNetConfig(
            block_out_channels=(32, 64),
            down_block_types=(CROSS_DOWN, DOWN),
            up_block_types=(UP, CROSS_UP),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=40,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            upcast_attention=True,
        ),
        (9, 7),
    ),
    "one_level": (
        UNetConfig(
            block_out_channels=(32,),
            down_block_types=(CROSS_DOWN,),
            up_block_types=(CROSS_UP,),
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=1,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-3,
        ),
        (5, 8),
    ),
    "inpainting": (
        UNetConfig(
            in_channels=9,
            block_out_channels=(16, 48, 32),
            down_block_types=(CROSS_DOWN, CROSS_DOWN, DOWN),
            up_block_types=(UP, CROSS_UP, CROSS_UP),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=24,
            attention_head_dim=(2, 3, 4),
        ),
        (10, 6),
    ),
    "four_levels": (
        UNetConfig(
            out_channels=5,
            block_out_channels=(16, 24, 32, 40),
            down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
            up_block_types=(UP, CROSS_UP, UP, CROSS_UP),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=24,
            attention_head_dim=(4, 3, 2, 5),
            transformer_layers_per_block=(1, 2, 1, 1),
            use_linear_projection=True,
        ),
        (12, 9),
    ),
}
# Published configs: unet/config.json of SD1.5, SD2.1 (768, v) and the SD1.5 inpainting model.
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
}
SD21 = SD15 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
INPAINTING = SD15 | {"in_channels": 9}


def inputs(reference, config, size=(8, 8), batch=2):
    """(latents, timesteps, context) as numpy."""
    latents = reference.normal(1, batch, *size, config.in_channels)
    context = reference.normal(2, batch, 5, config.cross_attention_dim)
    return latents, np.linspace(3.0, 990.5, batch, dtype=np.float32), context


def random_params(config, seed=0):
    """Parameters with nothing at zero or one."""
    _, abstract = weights.abstract(UNet, config)
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        noise = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            return 0.2 * noise + path.endswith("scale")
        return noise / math.sqrt(math.prod(shape[:-1]))

    return {path: jnp.asarray(draw(path, value.shape)) for path, value in abstract.items()}


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers_forward_and_every_gradient(case, reference):
    diffusers = pytest.importorskip("diffusers")
    config, size = CASES[case]
    torch_unet = diffusers.UNet2DConditionModel.from_config(config.to_json())
    torch_unet.set_default_attn_processor()
    torch_unet = reference.randomised(torch_unet)
    xt, timesteps, context = inputs(reference, config, size)
    cotangent = reference.normal(3, 2, *size, config.out_channels)
    want = torch_unet(*(reference.to_torch(x) for x in (xt, timesteps, context))).sample
    (want * reference.to_torch(cotangent)).sum().backward()

    graphdef, abstract = weights.abstract(UNet, config)
    params = weights.from_diffusers(reference.tensors(torch_unet), abstract)

    @reference.jit
    def run(params):
        out, pullback = jax.vjp(
            lambda p: weights.merge(graphdef, p)(xt, timesteps, context), params
        )
        return out, pullback(jnp.asarray(cotangent))[0]

    out, gradients = run(params)
    assert out.dtype == jnp.float32
    assert reference.error(out, reference.from_torch(want)) <= 2e-5
    gradients = weights.to_diffusers(gradients)
    errors = {
        name: reference.error(gradients.pop(name), p.grad.numpy())
        for name, p in torch_unet.named_parameters()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 2e-5, f"{worst}: {errors[worst]}"
    assert not gradients


@pytest.mark.parametrize(
    "published, count",
    [(SD15, 859_520_964), (SD21, 865_910_724), (INPAINTING, 859_520_964 + 5 * 9 * 320)],
)
def test_parameter_counts_of_published_models(published, count):
    config, ignored = UNetConfig.from_json(published)
    assert ignored == ["_class_name", "_diffusers_version"]
    _, params = weights.abstract(UNet, config)
    assert sum(math.prod(p.shape) for p in params.values()) == count


def test_parameter_names_of_sd15_are_those_of_diffusers():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        torch_unet = diffusers.UNet2DConditionModel.from_config(SD15)
    _, params = weights.abstract(UNet, UNetConfig())
    names = {weights.weight_name(path) for path in params}
    assert names == set(torch_unet.state_dict())


def test_bfloat16_stays_close_to_float32(reference):
    xt, timesteps, context = inputs(reference, TINY)
    params = random_params(TINY)
    outs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, _ = weights.abstract(UNet, TINY, dtype=dtype)
        outs.append(reference.jit(weights.merge(graphdef, params))(xt, timesteps, context))
    assert outs[1].dtype == jnp.float32
    assert 1e-6 < reference.error(outs[1], outs[0]) < 0.04


def test_bfloat16_parameters_on_request():
    _, params = weights.abstract(UNet, SMALL, param_dtype=jnp.bfloat16)
    assert {p.dtype for p in params.values()} == {jnp.dtype(jnp.bfloat16)}


def test_rematerialisation_changes_memory_but_no_result(reference):
    config = dataclasses.replace(TINY, dropout=0.3)
    xt, timesteps, context = inputs(reference, config)
    params = random_params(config)
    key = jax.random.key(5)
    results, stored = {}, {}
    for remat in ("none", "block", "full", "dots_saveable"):
        graphdef, _ = weights.abstract(UNet, config, remat=remat)

        def loss(p, graphdef=graphdef):
            out = weights.merge(graphdef, p)(xt, timesteps, context, key=key)
            return jnp.square(out).mean()

        residuals = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))  # noqa: B023
        stored[remat] = sum(math.prod(r.shape) for r in residuals)
        results[remat] = reference.jit(jax.value_and_grad(loss))(params)
    assert stored["full"] < stored["block"] < stored["dots_saveable"] < stored["none"]
    value, gradients = results.pop("none")
    for other_value, other in results.values():
        assert abs(other_value - value) <= 1e-6 * value
        for path, gradient in gradients.items():
            assert reference.error(other[path], gradient) <= 1e-5, path


def test_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="remat = 'blocks'.*'block', 'full'.*dots_saveable"):
        weights.abstract(UNet, SMALL, remat="blocks")


def test_dropout_differs_by_block_and_step_and_repeats_for_a_key(reference, monkeypatch):
    config = dataclasses.replace(SMALL, dropout=0.5)
    xt, timesteps, context = inputs(reference, config)
    graphdef, _ = weights.abstract(UNet, config)
    unet = weights.merge(graphdef, random_params(config))
    used = []
    draw = blocks.dropout

    def recording(x, rate, key):
        used.append(jax.random.key_data(key))
        return draw(x, rate, key)

    monkeypatch.setattr(blocks, "dropout", recording)

    @reference.jit
    def run(key):
        used.clear()
        return unet(xt, timesteps, context, key=key), jnp.stack(used)

    (first, keys), (again, _) = run(jax.random.key(0)), run(jax.random.key(0))
    # 2 levels of 1 layer: 2 residual blocks down, 2 in the middle, 4 up.
    assert len({tuple(key) for key in keys.tolist()}) == 8
    other_step, other_keys = run(jax.random.key(1))
    assert not {tuple(k) for k in keys.tolist()} & {tuple(k) for k in other_keys.tolist()}
    monkeypatch.undo()
    none = reference.jit(unet)(xt, timesteps, context)
    np.testing.assert_array_equal(first, again)
    assert reference.error(other_step, first) > 0.01
    assert reference.error(none, first) > 0.01


def test_starts_with_residual_branches_and_output_at_zero(reference):
    params = jax.jit(lambda key: weights.init(UNet, TINY, key))(jax.random.key(0))
    zero = {path for path, value in params.items() if not np.any(value)}
    assert {path for path in params if path.endswith(".bias")} <= zero
    kernels = {path for path in zero if not path.endswith(".bias")}
    ends = (".conv2.kernel", ".proj_out.kernel", "conv_out.kernel")
    assert kernels == {path for path in params if path.endswith(ends)}
    # U(-1/sqrt(fan_in), 1/sqrt(fan_in))
    kernel = np.asarray(params["mid_block.resnets.0.conv1.kernel"])
    bound = (9 * 32) ** -0.5
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    assert abs(kernel.std() / (bound / 3**0.5) - 1) < 0.02


def test_any_latent_size_at_least_one_pixel_at_the_coarsest_level(reference):
    graphdef, abstract = weights.abstract(UNet, CASES["four_levels"][0])
    for size in ((1, 1), (2, 3), (15, 17)):
        args = inputs(reference, CASES["four_levels"][0], size)
        out = jax.eval_shape(lambda p, args=args: weights.merge(graphdef, p)(*args), abstract)
        assert out.shape == (2, *size, 5)


def test_config_survives_json_and_diffusers():
    diffusers = pytest.importorskip("diffusers")
    config = CASES["four_levels"][0]
    data = json.loads(json.dumps(config.to_json()))
    assert UNetConfig.from_json(data)[0] == config
    saved = json.loads(diffusers.UNet2DConditionModel.from_config(data).to_json_string())
    again, ignored = UNetConfig.from_json(saved)
    assert again == config
    assert "addition_embed_type_num_heads" in ignored


def test_absent_fields_take_the_defaults_of_diffusers():
    assert UNetConfig.from_json({})[0] == UNetConfig(cross_attention_dim=1280)
    assert (
        UNetConfig.from_json({"sample_size": None, "upcast_attention": None})[0].sample_size == 64
    )


def test_every_unsupported_field_is_named_with_its_value():
    sdxl = SD15 | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "class_embed_type": "projection",
        "dual_cross_attention": True,
        "invented": [1, 2],
        "layers_per_block": "two",
        "only_cross_attention": [True, False, False, False],
        "projection_class_embeddings_input_dim": 2816,
        "resnet_time_scale_shift": "scale_shift",
        "use_linear_projection": None,
    }
    with pytest.raises(ConfigError) as error:
        UNetConfig.from_json(sdxl, "some/unet/config.json")
    message = str(error.value)
    assert message.startswith("some/unet/config.json")
    for field in sdxl.keys() - SD15.keys() | {"layers_per_block"}:
        assert f"{field} = {sdxl[field]!r}" in message
    assert "in_channels" not in message
    UNetConfig.from_json(SD15 | {"only_cross_attention": [False] * 4})


@pytest.mark.parametrize(
    "field, value",
    [
        ("block_out_channels", ()),
        ("block_out_channels", (320, 640, 1280, 1270)),
        ("down_block_types", (CROSS_DOWN,) * 3),
        ("down_block_types", (CROSS_DOWN,) * 3 + ("AttnDownBlock2D",)),
        ("up_block_types", (UP,) * 5),
        ("in_channels", 0),
        ("layers_per_block", 0),
        ("norm_num_groups", 0),
        ("cross_attention_dim", 0),
        ("dropout", 1.0),
        ("norm_eps", 0.0),
        ("attention_head_dim", (8, 8)),
        ("attention_head_dim", 7),
        ("transformer_layers_per_block", (1, 1, 1)),
        ("transformer_layers_per_block", 0),
    ],
)
def test_invalid_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} = .*: expected"):
        UNetConfig(**{field: value})
    if isinstance(value, (int, float)):
        with pytest.raises(ConfigError, match=f"config.json: .*\n  {field} = "):
            UNetConfig.from_json({field: value})


def test_odd_first_width_is_refused():
    with pytest.raises(ValueError, match="block_out_channels.*even"):
        UNetConfig(
            block_out_channels=(5,),
            norm_num_groups=5,
            down_block_types=(DOWN,),
            up_block_types=(UP,),
            attention_head_dim=1,
        )
