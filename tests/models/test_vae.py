"""The autoencoder against diffusers `AutoencoderKL`, and its config."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.families import sdxl
from sdjax.models import weights
from sdjax.models.config import ConfigError
from sdjax.models.vae import VAE, VAEConfig, sample_moments, scale_latents, unscale_latents


def shape(*widths, **kw):
    """A small config of the given widths."""
    kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    kinds = {field: (kind,) * len(widths) for field, kind in kinds.items()}
    return VAEConfig(
        block_out_channels=widths, norm_num_groups=8, layers_per_block=1, **kinds, **kw
    )


SMALL = shape(16, 32)
# Each config with an image size.
CASES = {
    "two_levels": (dataclasses.replace(SMALL, layers_per_block=2), (8, 12)),
    "one_level": (shape(16, latent_channels=3), (5, 4)),
    "three_levels_odd_sizes": (shape(16, 24, 32, in_channels=1, out_channels=2), (11, 14)),
    "sd3_and_flux_like": (
        shape(16, 32, 24, 24, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
              scaling_factor=0.3611, shift_factor=0.1159), (16, 24)
    ),
    "no_attention": (shape(16, 16, mid_block_add_attention=False, latent_channels=16), (8, 8)),
}  # fmt: skip
# Published config: vae/config.json of SD1.5.
SD15 = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


# vae/config.json of SD3 and FLUX.1, which have the same shape.
SIXTEEN = SD15 | {
    "force_upcast": True, "latent_channels": 16, "latents_mean": None, "latents_std": None,
    "mid_block_add_attention": True, "sample_size": 1024, "use_post_quant_conv": False,
    "use_quant_conv": False,
}  # fmt: skip
SD3 = SIXTEEN | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX = SIXTEEN | {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def random_params(config):
    """Fresh parameters, biases and scales moved off zero and one."""
    params = weights.init(VAE, config, jax.random.key(0))
    rng = np.random.default_rng(0)
    return {
        path: value + 0.2 * rng.normal(size=value.shape).astype(np.float32)
        if value.ndim == 1
        else value
        for path, value in params.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers_forward_and_every_gradient(case, reference):
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    config, size = CASES[case]
    torch_vae = reference.randomised(diffusers.AutoencoderKL.from_config(config.to_json()))
    images = reference.normal(0, 2, *size, config.in_channels)
    posterior = torch_vae.encode(reference.to_torch(images)).latent_dist
    moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
    latents = reference.normal(1, *reference.from_torch(posterior.mean).shape)
    decoded = torch_vae.decode(reference.to_torch(latents)).sample
    want = [reference.from_torch(x) for x in (moments, decoded)]
    cotangents = [reference.normal(2 + i, *x.shape) for i, x in enumerate(want)]
    torch.autograd.backward([moments, decoded], [reference.to_torch(c) for c in cotangents])

    graphdef, abstract = weights.abstract(VAE, config)
    params = weights.from_diffusers(reference.tensors(torch_vae), abstract)

    @reference.jit
    def run(params):
        def both(params):
            vae = weights.merge(graphdef, params)
            return vae.encode(images), vae.decode(latents)

        out, pullback = jax.vjp(both, params)
        return out, pullback(tuple(map(jnp.asarray, cotangents)))[0]

    out, gradients = run(params)
    for ours, theirs in zip(out, want, strict=True):
        assert ours.dtype == jnp.float32
        assert reference.error(ours, theirs) <= 2e-5
    gradients = weights.to_diffusers(gradients)
    errors = {
        name: reference.error(gradients.pop(name), p.grad.numpy())
        for name, p in torch_vae.named_parameters()
        # Softmax does not see what is added to all keys alike: this gradient is zero.
        if not name.endswith("to_k.bias")
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 2e-5, f"{worst}: {errors[worst]}"
    assert all(name.endswith("to_k.bias") for name in gradients)
    for gradient in gradients.values():
        assert np.abs(gradient).max() < 1e-4


@pytest.mark.parametrize("published, count", [(SD15, 83_653_863), (FLUX, 83_819_683)])
def test_parameter_count_and_names_of_published_models(published, count):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config, ignored = VAEConfig.from_json(published)
    assert config.downscale == 8
    assert set(ignored) <= {"_class_name", "_diffusers_version", "force_upcast"}
    _, params = weights.abstract(VAE, config)
    assert sum(math.prod(p.shape) for p in params.values()) == count
    with torch.device("meta"):
        torch_vae = diffusers.AutoencoderKL.from_config(published)
    assert weights.tensor_shapes(params) == {
        name: tuple(value.shape) for name, value in torch_vae.state_dict().items()
    }


def test_the_default_is_the_published_config():
    assert VAEConfig.from_json(SD15)[0] == VAEConfig()


@pytest.mark.parametrize("published, first", [(SD3, 2.967793), (FLUX, 0.680349)])
def test_sixteen_channels_are_shifted_before_they_are_scaled(published, first):
    config, ignored = VAEConfig.from_json(published)
    neutral = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
    assert config.to_json() | neutral == {
        k: v for k, v in published.items() if k not in ignored
    } | {"_class_name": "AutoencoderKL"}
    z = np.full((1, 1, 1, 16), 2.0, np.float32)
    np.testing.assert_allclose(scale_latents(z, config), first, rtol=1e-6)
    np.testing.assert_allclose(unscale_latents(scale_latents(z, config), config), z, rtol=1e-6)


def test_the_preset_of_sdxl_is_the_published_config():
    """stabilityai/stable-diffusion-xl-base-1.0, vae/config.json: that of SD1 but for these."""
    published = SD15 | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
    config, ignored = VAEConfig.from_json(published)
    assert config == sdxl.VAE_SDXL and "force_upcast" in ignored
    z = np.full((1, 1, 1, 4), 2.0, np.float32)
    np.testing.assert_allclose(scale_latents(z, config), 0.2605, rtol=1e-6)
    np.testing.assert_allclose(unscale_latents(scale_latents(z, config), config), z, rtol=1e-6)


def test_moments_are_mean_then_clamped_log_variance(reference):
    graphdef, _ = weights.abstract(VAE, SMALL)
    params = random_params(SMALL)
    bias = jnp.asarray([-50.0, -40, 40, 50, -50, -40, 40, 50])
    vae = weights.merge(graphdef, params | {"quant_conv.bias": bias})
    moments = np.asarray(reference.jit(vae.encode)(reference.normal(0, 1, 8, 8, 3)))
    assert moments.shape == (1, 4, 4, 8)
    assert moments[..., :4].min() < -40 and moments[..., :4].max() > 40
    np.testing.assert_array_equal(moments[..., 4:6], -30)
    np.testing.assert_array_equal(moments[..., 6:], 20)


def test_samples_and_scaling_equal_diffusers(reference):
    distributions = pytest.importorskip("diffusers.models.autoencoders.vae")
    moments, noise = reference.normal(0, 2, 3, 4, 8), reference.normal(1, 2, 3, 4, 4)
    posterior = distributions.DiagonalGaussianDistribution(reference.to_torch(moments))
    want = reference.from_torch(posterior.mean + posterior.std * reference.to_torch(noise))
    z = sample_moments(moments, noise)
    assert reference.error(z, want) < 1e-6
    np.testing.assert_array_equal(sample_moments(moments, 0 * noise), moments[..., :4])

    assert reference.error(scale_latents(z, VAEConfig()), 0.18215 * want) < 1e-6
    sd3 = VAEConfig(scaling_factor=1.5305, shift_factor=0.0609)
    assert reference.error(scale_latents(z, sd3), (want - 0.0609) * 1.5305) < 1e-6
    assert reference.error(unscale_latents(scale_latents(z, sd3), sd3), want) < 1e-6


def test_bfloat16_stays_close_to_float32_and_finite_on_flat_images(reference):
    params = random_params(SMALL)
    images = np.stack([reference.normal(0, 8, 8, 3), np.ones((8, 8, 3)), -np.ones((8, 8, 3))])
    outs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, _ = weights.abstract(VAE, SMALL, dtype=dtype)
        vae = weights.merge(graphdef, params)
        moments = reference.jit(vae.encode)(images)
        outs.append((moments, reference.jit(vae.decode)(moments[..., :4])))
    for exact, close in zip(*outs, strict=True):
        assert close.dtype == jnp.float32
        assert np.isfinite(np.asarray(close)).all()
        assert 1e-6 < reference.error(close, exact) < 0.05


def test_rematerialisation_changes_memory_but_no_result(reference):
    params = random_params(shape(16))
    images = reference.normal(0, 2, 6, 6, 3)
    results, stored = {}, {}
    for remat in ("none", "block", "full"):
        graphdef, _ = weights.abstract(VAE, shape(16), remat=remat)

        def loss(p, graphdef=graphdef):
            vae = weights.merge(graphdef, p)
            return jnp.square(vae.decode(vae.encode(images)[..., :4])).mean()

        residuals = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))  # noqa: B023
        stored[remat] = sum(math.prod(r.shape) for r in residuals)
        results[remat] = reference.jit(jax.value_and_grad(loss))(params)
    assert stored["full"] < stored["block"] < stored["none"]
    value, gradients = results.pop("none")
    for other_value, other in results.values():
        assert abs(other_value - value) <= 1e-6 * value
        for path, gradient in gradients.items():
            if not path.endswith("to_k.bias"):
                assert reference.error(other[path], gradient) <= 1e-5, path


def test_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="remat = 'all'"):
        weights.abstract(VAE, SMALL, remat="all")


def test_config_survives_json_and_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for config in (SMALL, shape(8, 16, shift_factor=0.1, scaling_factor=2, sample_size=(8, 16))):
        data = json.loads(json.dumps(config.to_json()))
        assert VAEConfig.from_json(data)[0] == config
    saved = json.loads(diffusers.AutoencoderKL.from_config(SMALL.to_json()).to_json_string())
    again, ignored = VAEConfig.from_json(saved)
    assert again == SMALL
    assert "force_upcast" in ignored


def test_absent_fields_take_the_defaults_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    config, _ = VAEConfig.from_json({"norm_num_groups": 32})
    assert config == VAEConfig.from_json(dict(diffusers.AutoencoderKL().config))[0]
    assert config.block_out_channels == (64,)


def test_every_unsupported_field_is_named_with_its_value():
    bad = SD15 | {"latents_mean": [0.1], "latents_std": [0.9], "act_fn": "relu", "tiling": True}
    with pytest.raises(ConfigError) as error:
        VAEConfig.from_json(bad, "some/vae/config.json")
    message = str(error.value)
    assert message.startswith("some/vae/config.json")
    for field in ("latents_mean", "latents_std", "act_fn", "tiling"):
        assert f"{field} = {bad[field]!r}" in message


@pytest.mark.parametrize(
    "field, value",
    [
        ("block_out_channels", ()),
        ("block_out_channels", (128, 256, 512, 500)),
        ("down_block_types", ("DownEncoderBlock2D",) * 3),
        ("up_block_types", ("AttnUpDecoderBlock2D",) * 4),
        ("in_channels", 0),
        ("out_channels", 0),
        ("latent_channels", 0),
        ("layers_per_block", 0),
        ("norm_num_groups", 0),
        ("scaling_factor", 0.0),
    ],
)
def test_invalid_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} = .*: expected"):
        VAEConfig(**{field: value})
