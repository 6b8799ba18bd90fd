"""What FLUX.1's transformer reads: tokens, positions, the config, and what is refused."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import weights
from sdjax.models.config import ConfigError
from sdjax.models.flux import rope
from sdjax.models.flux.network import Flux, FluxConfig, mask_channels, pack, unpack
from tests.models.test_flux import CASES, DEV, SMALL, inputs, packed


def test_tokens_are_those_of_diffusers_and_back():
    latents = np.arange(384, dtype=np.float32).reshape(1, 16, 4, 6).transpose(0, 2, 3, 1)
    tokens = np.asarray(pack(jnp.asarray(latents)))
    assert tokens.shape == (1, 6, 64)
    np.testing.assert_array_equal(tokens[0, 0, :8], [0, 1, 6, 7, 24, 25, 30, 31])
    np.testing.assert_array_equal(tokens[0, 1, :4], [2, 3, 8, 9])
    np.testing.assert_array_equal(tokens[0, 3, :4], [12, 13, 18, 19])
    np.testing.assert_array_equal(unpack(tokens, 4, 6), latents)
    one = unpack(jnp.arange(64.0).reshape(1, 1, 64), 2, 2)
    np.testing.assert_array_equal(one[0, :, :, 0].ravel(), [0, 1, 2, 3])
    np.testing.assert_array_equal(one[0, :, :, 1].ravel(), [4, 5, 6, 7])
    diffusers = pytest.importorskip("diffusers")
    np.testing.assert_array_equal(tokens, packed(diffusers, latents).numpy())


def test_latents_of_odd_sides_are_refused_in_words(reference):
    for size, kontext in (((3, 4), None), ((4, 65), None), ((4, 6), (5, 4))):
        args = inputs(reference, SMALL, size, kontext)
        graphdef, params = weights.abstract(Flux, SMALL)
        what = (
            "the reference's latents of 5 x 4" if kontext else f"latents of {size[0]} x {size[1]}"
        )
        with pytest.raises(ValueError, match=f"^{what}: .*even.*multiples of 16 pixels"):
            jax.eval_shape(lambda p: weights.merge(graphdef, p)(*args), params)  # noqa: B023


def test_mask_channels_are_those_of_the_fill_pipeline():
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    mask = np.random.default_rng(0).integers(0, 2, (2, 32, 48, 1)).astype(np.float32)
    fill = types.SimpleNamespace(
        vae_scale_factor=8,
        vae=types.SimpleNamespace(config=diffusers.AutoencoderKL(shift_factor=0.1).config),
        _pack_latents=diffusers.FluxFillPipeline._pack_latents,
    )
    latents = torch.zeros(2, 16, 4, 6)
    want, _ = diffusers.FluxFillPipeline.prepare_mask_latents(
        fill,
        torch.tensor(mask)[..., 0][:, None],
        latents,
        2,
        16,
        1,
        32,
        48,
        torch.float32,
        "cpu",
        None,
    )
    np.testing.assert_array_equal(pack(mask_channels(jnp.asarray(mask), 8)), want.numpy())


def test_rotations_are_those_of_diffusers():
    transformer_flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    import torch

    dims = (16, 56, 56)
    cos, sin = rope.joined(
        rope.origin(512, dims), rope.grid(0, 64, 64, dims), rope.grid(1, 8, 12, dims)
    )
    grid = lambda k, h, w: np.stack(np.meshgrid([k], range(h), range(w), indexing="ij"), -1)  # noqa: E731
    places = [np.zeros((512, 3)), grid(0, 64, 64).reshape(-1, 3), grid(1, 8, 12).reshape(-1, 3)]
    module = transformer_flux.FluxPosEmbed(theta=10_000, axes_dim=dims)
    want = module(torch.tensor(np.concatenate(places)))
    for ours, theirs in zip((cos, sin), want, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-7)
    x = np.random.default_rng(0).normal(size=(2, cos.shape[0], 2, 128)).astype(np.float32)
    turned = embeddings.apply_rotary_emb(torch.tensor(x), want, sequence_dim=1).numpy()
    np.testing.assert_allclose(rope.rotate(jnp.asarray(x), (cos, sin)), turned, atol=2e-6)


def test_rotations_are_the_recorded_ones():
    dims = (16, 56, 56)
    cos, sin = map(np.asarray, rope.joined(rope.origin(512, dims), rope.grid(0, 64, 64, dims)))
    assert cos.shape == (4608, 128)
    assert cos.sum(dtype=np.float64) == pytest.approx(396_946.172, abs=2e-3)
    assert sin.sum(dtype=np.float64) == pytest.approx(75_974.984, abs=2e-3)
    at, corner = 512 + 5 * 64 + 7, -1
    near = dict(abs=1e-6)
    assert cos[at, [16, 17, 18, 72, 74, 127]] == pytest.approx(
        [0.283662, 0.283662, -0.897453, 0.753902, 0.319698, 0.9999995], **near
    )
    assert sin[at, [16, 18, 72, 74, 127]] == pytest.approx(
        [-0.958924, -0.441111, 0.656987, -0.947519, 0.00097265], **near
    )
    assert np.all(cos[at, :16] == 1) and np.all(sin[at, :16] == 0)
    assert (cos[corner, 16], sin[corner, 16]) == pytest.approx((0.985897, 0.167356), **near)
    x = jnp.arange(128, dtype=jnp.float32).reshape(1, 1, 1, 128) / 128
    y = np.asarray(rope.rotate(x, (cos[at : at + 1], sin[at : at + 1]))).ravel()
    assert y[:2] == pytest.approx([0, 0.0078125], **near)
    assert y[16:20] == pytest.approx([0.162815, -0.082192, -0.060727, -0.195247], **near)
    assert y[72:76] == pytest.approx([0.049382, 0.799515, 0.740013, -0.360462], **near)
    assert y.sum(dtype=np.float64) == pytest.approx(51.4244882, abs=1e-5)
    cos, sin = map(np.asarray, rope.grid(1, 6, 8, dims))  # the reference of FLUX.1-Kontext
    assert cos[5 * 8 + 7, [0, 2]] == pytest.approx([0.540302, 0.950415], **near)
    assert sin[5 * 8 + 7, [0, 2]] == pytest.approx([0.841471, 0.310984], **near)


def test_config_survives_json_and_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for config, *_ in CASES.values():
        data = json.loads(json.dumps(config.to_json()))
        assert FluxConfig.from_json(data)[0] == config
        saved = json.loads(diffusers.FluxTransformer2DModel.from_config(data).to_json_string())
        assert FluxConfig.from_json(saved)[0] == config


def test_absent_fields_take_the_defaults_of_diffusers():
    assert FluxConfig.from_json({})[0] == FluxConfig(guidance_embeds=False)
    assert FluxConfig.from_json(DEV)[0] == FluxConfig()


def test_every_unsupported_field_is_named_with_its_value():
    odd = DEV | {"patch_size": 2, "invented": [1, 2], "num_layers": "two", "guidance_embeds": None}
    with pytest.raises(ConfigError) as error:
        FluxConfig.from_json(odd, "some/transformer/config.json")
    message = str(error.value)
    assert message.startswith("some/transformer/config.json")
    for field in ("patch_size", "invented", "num_layers", "guidance_embeds"):
        assert f"{field} = {odd[field]!r}" in message
    assert "in_channels" not in message


@pytest.mark.parametrize("field, value", [
    ("in_channels", 0), ("in_channels", 66), ("out_channels", 65), ("out_channels", 128),
    ("num_layers", 0), ("num_single_layers", 0), ("attention_head_dim", 0),
    ("attention_head_dim", 64), ("num_attention_heads", 0), ("joint_attention_dim", 0),
    ("pooled_projection_dim", 0), ("axes_dims_rope", (64, 64)), ("axes_dims_rope", (15, 57, 56)),
    ("axes_dims_rope", (16, 56, 58)),
])  # fmt: skip
def test_invalid_fields_are_named(field, value):
    named = "axes_dims_rope" if (field, value) == ("attention_head_dim", 64) else field
    with pytest.raises(ValueError, match=f"{named} = .*: expected"):
        FluxConfig(**{field: value})


@pytest.mark.parametrize("case, change, message", [
    ("dev", {"guidance": None}, "guidance_embeds = True.*takes .'context', 'guidance', 'pooled'"),
    ("dev", {"channels": np.zeros((2, 4, 6, 16))}, "in_channels = 16.*takes"),
    ("fill", {"channels": None}, "in_channels = 96 and out_channels = 16.*'channels'"),
    ("fill", {"channels": np.zeros((2, 4, 6, 16))}, r"channels \(2, 4, 6, 16\): expected .*20"),
    ("kontext", {"reference": np.zeros((2, 4, 6, 16))}, "reference .*: expected .*4"),
    ("schnell", {"guidance": np.zeros(2)}, "guidance_embeds = False"),
])  # fmt: skip
def test_a_context_that_does_not_fit_is_refused(case, change, message, reference):
    config = CASES[case][0]
    latents, timesteps, context = inputs(reference, config, (4, 6))
    context = {k: v for k, v in (context | change).items() if v is not None}
    graphdef, params = weights.abstract(Flux, config)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: weights.merge(graphdef, p)(latents, timesteps, context), params)


def test_latents_of_other_channels_are_refused(reference):
    _, timesteps, context = inputs(reference, SMALL, (4, 6))
    graphdef, params = weights.abstract(Flux, SMALL)
    with pytest.raises(ValueError, match=r"latents \(2, 4, 6, 16\): expected 4 channels"):
        jax.eval_shape(
            lambda p: weights.merge(graphdef, p)(np.zeros((2, 4, 6, 16)), timesteps, context),
            params,
        )
