"""The UNet against diffusers `UNet2DConditionModel`, and its config."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.families import sdxl
from sdjax.families.sdxl import count_time_ids
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
CASES["sdxl_like"] = (
    UNetConfig(
        block_out_channels=(16, 32, 48),
        down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, UP),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=(1, 2, 3),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=10 + 6 * 8,
    ),
    (8, 6),
)
CASES["refiner_like"] = (
    UNetConfig(
        block_out_channels=(16, 24, 32, 32),
        down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
        up_block_types=(UP, CROSS_UP, CROSS_UP, UP),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=(2, 3, 4, 4),
        transformer_layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=10 + 5 * 6,
    ),
    (12, 9),
)
# Latent consistency models read the guidance scale, of SD and of SDXL.
CASES["lcm_like"] = (dataclasses.replace(SMALL, time_cond_proj_dim=14), (8, 8))
CASES["sdxl_lcm_like"] = (dataclasses.replace(CASES["sdxl_like"][0], time_cond_proj_dim=6), (8, 6))
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
# unet/config.json of stable-diffusion-xl-base-1.0 and -refiner-1.0
SDXL = SD15 | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "conv_in_kernel": 3,
    "cross_attention_dim": 2048,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "upcast_attention": None,
    "use_linear_projection": True,
}
REFINER = SDXL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": [UP, CROSS_UP, CROSS_UP, UP],
}


def inputs(reference, config, size=(8, 8), batch=2):
    """(latents, timesteps, context) as numpy; the context of SDXL is a mapping."""
    latents = reference.normal(1, batch, *size, config.in_channels)
    context = reference.normal(2, batch, 5, config.cross_attention_dim)
    if config.takes_numbers:
        rng = np.random.default_rng(4)
        time_ids = rng.integers(0, 1500, (batch, count_time_ids(config, 10))).astype(np.float32)
        pooled = reference.normal(5, batch, 10)
        context = {"context": context, "pooled": pooled, "numbers": time_ids}
    if config.time_cond_proj_dim:
        text = context if isinstance(context, dict) else {"context": context}
        context = text | {"guidance": np.linspace(1.0, 8.5, batch, dtype=np.float32)}
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
    text, extra = context["context"] if isinstance(context, dict) else context, {}
    if config.takes_numbers:
        extra = {"text_embeds": context["pooled"], "time_ids": context["numbers"]}
        extra = {"added_cond_kwargs": {k: reference.to_torch(v) for k, v in extra.items()}}
    if config.time_cond_proj_dim:
        embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        scale = reference.to_torch(context["guidance"] - 1)
        extra["timestep_cond"] = embed(None, scale, config.time_cond_proj_dim, scale.dtype)
    want = torch_unet(*(reference.to_torch(x) for x in (xt, timesteps, text)), **extra).sample
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
    [
        (SD15, 859_520_964),
        (SD21, 865_910_724),
        (INPAINTING, 859_520_964 + 5 * 9 * 320),
        (SDXL, 2_567_463_684),
        (REFINER, 2_259_526_660),
        (SD15 | {"time_cond_proj_dim": 256}, 859_520_964 + 256 * 320),
    ],
)
def test_parameters_of_published_models_are_those_of_diffusers(published, count):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config, ignored = UNetConfig.from_json(published)
    assert {"_class_name", "_diffusers_version"} <= set(ignored)
    assert set(ignored) <= {"_class_name", "_diffusers_version", "addition_embed_type_num_heads"}
    _, params = weights.abstract(UNet, config)
    sizes = {weights.weight_name(path): math.prod(p.shape) for path, p in params.items()}
    assert sum(sizes.values()) == count
    with torch.device("meta"):
        torch_unet = diffusers.UNet2DConditionModel.from_config(published)
    assert sizes == {name: value.numel() for name, value in torch_unet.state_dict().items()}


def test_presets_are_the_published_configs():
    assert UNetConfig.from_json(SDXL)[0] == sdxl.UNET_SDXL
    assert UNetConfig.from_json(REFINER)[0] == sdxl.UNET_SDXL_REFINER


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
    with pytest.raises(ValueError, match="remat = 'blocks'.*'block', 'attention', 'full'.*dots"):
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
    odd = SD15 | {
        "class_embed_type": "projection",
        "dual_cross_attention": True,
        "invented": [1, 2],
        "layers_per_block": "two",
        "only_cross_attention": [True, False, False, False],
        "resnet_time_scale_shift": "scale_shift",
        "use_linear_projection": None,
    }
    with pytest.raises(ConfigError) as error:
        UNetConfig.from_json(odd, "some/unet/config.json")
    message = str(error.value)
    assert message.startswith("some/unet/config.json")
    for field in odd.keys() - SD15.keys() | {"layers_per_block"}:
        assert f"{field} = {odd[field]!r}" in message
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
        ("addition_embed_type", "text"),
        ("addition_time_embed_dim", 256),
        ("projection_class_embeddings_input_dim", 2816),
    ],
)
def test_invalid_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} = .*: expected"):
        UNetConfig(**{field: value})
    if isinstance(value, (int, float)):
        with pytest.raises(ConfigError, match=f"config.json: .*\n  {field} = "):
            UNetConfig.from_json({field: value})


@pytest.mark.parametrize("widths", [(None, 2816), (256, None), (255, 2816), (256, 256)])
def test_added_embeddings_need_both_of_their_widths(widths):
    with pytest.raises(ValueError, match="_dim = .*: expected"):
        dataclasses.replace(
            SMALL,
            addition_embed_type="text_time",
            addition_time_embed_dim=widths[0],
            projection_class_embeddings_input_dim=widths[1],
        )


def test_time_ids_are_what_the_pooled_text_leaves_room_for():
    assert count_time_ids(sdxl.UNET_SDXL, 1280) == 6
    assert count_time_ids(sdxl.UNET_SDXL_REFINER, 1280) == 5
    with pytest.raises(ValueError, match="projection_class_embeddings_input_dim = 2816.*1000"):
        count_time_ids(sdxl.UNET_SDXL, 1000)


def test_context_without_numbers_is_refused(reference):
    config, size = CASES["sdxl_like"]
    graphdef, abstract = weights.abstract(UNet, config)
    xt, timesteps, context = inputs(reference, config, size)
    with pytest.raises(ValueError, match="text_time.*pooled.*got an array"):
        jax.eval_shape(
            lambda p: weights.merge(graphdef, p)(xt, timesteps, context["context"]), abstract
        )


def test_odd_first_width_is_refused():
    with pytest.raises(ValueError, match="block_out_channels.*even"):
        UNetConfig(
            block_out_channels=(5,),
            norm_num_groups=5,
            down_block_types=(DOWN,),
            up_block_types=(UP,),
            attention_head_dim=1,
        )
