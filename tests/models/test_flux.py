"""FLUX.1's transformer against diffusers `FluxTransformer2DModel`, and its config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import weights
from sdjax.models.flux import Flux, FluxConfig

SMALL = FluxConfig(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    axes_dims_rope=(4, 6, 6),
)
# Each config with the sides of the latents and of a reference's, and `remat`.
CASES = {
    "dev": (SMALL, (4, 6), None, "none"),
    "schnell": (dataclasses.replace(SMALL, guidance_embeds=False, num_layers=1), (6, 2), None, "block"),
    "fill": (dataclasses.replace(SMALL, in_channels=96, out_channels=16), (2, 10), None, "none"),
    "control": (
        dataclasses.replace(SMALL, in_channels=32, out_channels=16, axes_dims_rope=(2, 4, 10)),
        (8, 4), None, "full",
    ),
    "kontext": (
        dataclasses.replace(SMALL, out_channels=16, num_single_layers=1), (4, 6), (8, 2),
        "dots_saveable",
    ),
}  # fmt: skip
# transformer/config.json of the releases (families.md of diffusers' converters).
DEV = {
    "_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0",
    "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": True,
    "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19,
    "num_single_layers": 38, "out_channels": None, "patch_size": 1, "pooled_projection_dim": 768,
}  # fmt: skip
RELEASES = {
    "dev": (DEV, 11_901_408_320),
    "schnell": (DEV | {"guidance_embeds": False}, 11_891_178_560),
    "fill": (DEV | {"in_channels": 384, "out_channels": 64}, 11_902_391_360),
    "control": (DEV | {"in_channels": 128, "out_channels": 64}, 11_901_604_928),
}


def inputs(reference, config, size, kontext=None, batch=2):
    """(latents, timesteps, context) as numpy.

    The timesteps and the guidance are small: phases of 3,500 radians are known to 1e-4 in float32.
    """
    latents = reference.normal(1, batch, *size, config.latent_channels)
    context = {
        "context": reference.normal(2, batch, 5, config.joint_attention_dim),
        "pooled": reference.normal(3, batch, config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        context["guidance"] = np.array([0.035, 0.01], np.float32)
    if config.added_channels:
        context["channels"] = reference.normal(4, batch, *size, config.added_channels)
    if kontext:
        context["reference"] = reference.normal(5, batch, *kontext, config.latent_channels)
    return latents, np.array([75.0, 12.5], np.float32), context


def packed(pipelines, latents):
    """The tokens of latents [B, H, W, C] by diffusers."""
    import torch

    x = torch.tensor(latents).permute(0, 3, 1, 2)
    b, c, h, w = x.shape
    return pipelines.FluxPipeline._pack_latents(x, b, c, h, w).double()


def ids(pipelines, latents, index=0):
    """The positions of their tokens by diffusers."""
    found = pipelines.FluxPipeline._prepare_latent_image_ids(
        1, latents.shape[1] // 2, latents.shape[2] // 2, "cpu", None
    )
    found[..., 0] = index
    return found


def run_diffusers(pipelines, model, latents, timesteps, context):
    """The prediction [B, H, W, C], as a torch tensor, by the steps of the pipelines."""
    import torch

    tokens, positions = [packed(pipelines, latents)], [ids(pipelines, latents)]
    if "channels" in context:  # each packed alone, as pipeline_flux_fill.py does
        own, channels = latents.shape[-1], context["channels"]
        cuts = [channels[..., :own], channels[..., own:]]
        more = [packed(pipelines, part) for part in cuts if part.shape[-1]]
        tokens = [torch.cat([*tokens, *more], dim=2)]
    if "reference" in context:
        tokens.append(packed(pipelines, context["reference"]))
        positions.append(ids(pipelines, context["reference"], index=1))
    guidance = context.get("guidance")
    out = model(
        hidden_states=torch.cat(tokens, dim=1),
        encoder_hidden_states=torch.tensor(context["context"]).double(),
        pooled_projections=torch.tensor(context["pooled"]).double(),
        timestep=torch.tensor(timesteps).double() / 1000,
        guidance=None if guidance is None else torch.tensor(guidance).double(),
        img_ids=torch.cat(positions),
        txt_ids=torch.zeros(context["context"].shape[1], 3),
    ).sample[:, : tokens[0].shape[1]]
    height, width = latents.shape[1:3]
    out = pipelines.FluxPipeline._unpack_latents(out, 8 * height, 8 * width, 8)
    return out.permute(0, 2, 3, 1)


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers_forward_and_every_gradient(case, reference):
    diffusers = pytest.importorskip("diffusers")
    config, size, kontext, remat = CASES[case]
    model = diffusers.FluxTransformer2DModel.from_config(config.to_json())
    model = reference.randomised(model)
    latents, timesteps, context = inputs(reference, config, size, kontext)
    want = run_diffusers(diffusers, model, latents, timesteps, context)
    cotangent = reference.normal(6, *latents.shape)
    (want * reference.to_torch(cotangent).permute(0, 2, 3, 1)).sum().backward()

    graphdef, abstract = weights.abstract(Flux, config, remat=remat)
    params = weights.from_diffusers(reference.tensors(model), abstract)

    @reference.jit
    def run(params):
        out, pullback = jax.vjp(
            lambda p: weights.merge(graphdef, p)(latents, timesteps, context), params
        )
        return out, pullback(jnp.asarray(cotangent))[0]

    out, gradients = run(params)
    assert out.dtype == jnp.float32
    assert reference.error(out, want.detach().numpy()) <= 2e-5
    gradients = weights.to_diffusers(gradients)
    errors = {
        name: reference.error(gradients.pop(name), p.grad.numpy())
        for name, p in model.named_parameters()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 2e-5, f"{worst}: {errors[worst]}"
    assert not gradients
