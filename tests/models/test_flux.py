"""FLUX.1's transformer against diffusers `FluxTransformer2DModel`, and its config."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import weights
from sdjax.models.flux.network import Flux, FluxConfig, pack, unpack
from tests.models.flops import flops
from tests.models.waves import filled, summary, wave

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
    "schnell": (
        dataclasses.replace(SMALL, guidance_embeds=False, num_layers=1), (6, 2), None, "block",
    ),
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
# transformer/config.json of the releases.
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


def random_params(config, seed=0):
    """Parameters with nothing at zero or one."""
    _, abstract = weights.abstract(Flux, config)
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(0.2 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {path: draw(value.shape) for path, value in abstract.items()}


@pytest.mark.parametrize("release", RELEASES)
def test_parameters_of_releases_are_those_of_diffusers(release):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    published, count = RELEASES[release]
    config, ignored = FluxConfig.from_json(published)
    assert ignored == ["_class_name", "_diffusers_version"]
    _, params = weights.abstract(Flux, config)
    shapes = weights.tensor_shapes(params)
    assert sum(map(math.prod, shapes.values())) == count
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel.from_config(published)
    assert shapes == {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("side, length, expected", [
    (64, 256, 17_686_253_273_088), (64, 512, 21_502_600_151_040),
    (128, 256, 69_466_647_429_120), (128, 512, 74_384_653_418_496),
])  # fmt: skip
def test_products_of_dev_are_those_of_its_blocks(side, length, expected):
    """Blocks (24 N d^2 + 4 N^2 d) and their modulations; torch's counter gives the same numbers."""
    graph, params = weights.abstract(Flux, FluxConfig(), dtype=jnp.bfloat16)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    context = {"context": shape(1, length, 4096), "pooled": shape(1, 768), "guidance": shape(1)}
    traced = jax.make_jaxpr(lambda p, *rest: weights.merge(graph, p)(*rest))(
        params, shape(1, side, side, 16), shape(1), context
    )
    assert flops(traced.jaxpr) == expected


def test_bfloat16_stays_close_to_float32(reference):
    config = CASES["dev"][0]
    args, params = inputs(reference, config, (4, 6)), random_params(config)
    args[1][:], args[2]["guidance"][:] = (750.0, 12.5), (3.5, 1.0)
    outs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, _ = weights.abstract(Flux, config, dtype=dtype)
        outs.append(reference.jit(weights.merge(graphdef, params))(*args))
    assert outs[1].dtype == jnp.float32
    assert 1e-6 < reference.error(outs[1], outs[0]) < 0.04


def test_bfloat16_tells_timesteps_and_guidance_apart(reference):
    """bfloat16 itself has 498 and 500, 3.484 and 3.5, and nothing between."""
    config = CASES["dev"][0]
    latents, timesteps, context = inputs(reference, config, (2, 2))
    graphdef, _ = weights.abstract(Flux, config, dtype=jnp.bfloat16)
    run = reference.jit(weights.merge(graphdef, random_params(config)))
    base = run(latents, timesteps * 0 + 499.0, context | {"guidance": np.full(2, 3.5, np.float32)})
    other = run(latents, timesteps * 0 + 499.5, context | {"guidance": np.full(2, 3.5, np.float32)})
    guided = run(
        latents, timesteps * 0 + 499.0, context | {"guidance": np.full(2, 3.502, np.float32)}
    )
    assert np.abs(other - base).max() > 0 and np.abs(guided - base).max() > 0


def test_rematerialisation_stores_less(reference):
    latents, timesteps, context = inputs(reference, SMALL, (4, 6))
    stored = {}
    for remat in ("none", "block", "full", "attention", "dots_saveable"):
        graphdef, params = weights.abstract(Flux, SMALL, remat=remat)

        def loss(p, graphdef=graphdef):
            return jnp.square(weights.merge(graphdef, p)(latents, timesteps, context)).mean()

        residuals = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))  # noqa: B023
        stored[remat] = sum(math.prod(r.shape) for r in residuals)
    assert stored["full"] == stored["block"] < stored["dots_saveable"] < stored["none"]
    with pytest.raises(ValueError, match="remat = 'blocks'.*'block', 'attention', 'full'.*dots"):
        weights.abstract(Flux, SMALL, remat="blocks")


def test_starts_with_identity_blocks_and_no_prediction(reference):
    config = dataclasses.replace(SMALL, num_layers=1, num_single_layers=1)
    params = reference.jit(lambda key: weights.init(Flux, config, key))(jax.random.key(0))
    zero = {path for path, value in params.items() if not np.any(value)}
    kernels = {path for path in zero if not path.endswith(".bias")}
    gates = (".norm1.linear.kernel", ".norm1_context.linear.kernel", ".norm.linear.kernel")
    ends = {"norm_out.linear.kernel", "proj_out.kernel"}
    assert kernels == ends | {path for path in params if path.endswith(gates)}
    graphdef, _ = weights.abstract(Flux, config)
    assert not np.any(
        reference.jit(weights.merge(graphdef, params))(*inputs(reference, config, (2, 4)))
    )


def test_an_output_norm_with_swapped_halves_predicts_something_else(reference):
    """Files of the original code have shift before scale."""
    graphdef, _ = weights.abstract(Flux, SMALL)
    args, params = inputs(reference, SMALL, (2, 4)), random_params(SMALL)
    run = reference.jit(lambda params: weights.merge(graphdef, params)(*args))
    swapped = {
        path: jnp.roll(value, SMALL.width, axis=-1) if path.startswith("norm_out") else value
        for path, value in params.items()
    }
    assert reference.error(run(swapped), run(params)) > 0.1


# ---- golden numbers of diffusers 0.42 ------------------------------------------------------------


@pytest.mark.parametrize("guided, total, squares, first", [
    (False, -0.333875, 9.243527, [0.087207, -0.162437, 0.122532, -0.179934]),
    (True, 1.654351, 7.080111, [-0.031701, -0.015245, -0.052441, 0.022224]),
], ids=["schnell", "dev"])  # fmt: skip
def test_deterministic_weights_give_the_recorded_prediction(
    guided, total, squares, first, reference
):
    """Weights 0.05 cos(0.1 k + j) of tensor j in the order of names, 1 more for scales of norms."""
    config = dataclasses.replace(SMALL, num_single_layers=2, guidance_embeds=guided)
    graphdef, abstract = weights.abstract(Flux, config)
    tensors = filled(abstract)
    assert sum(t.size for t in tensors.values()) == (131_536 if guided else 122_256)
    params = weights.from_diffusers(tensors, abstract)
    context = {"context": wave(1, 2, 5, 24), "pooled": wave(2, 2, 20)}
    context |= {"guidance": np.array([3.5, 1.0], np.float32)} if guided else {}
    latents = np.asarray(unpack(jnp.asarray(wave(0, 2, 6, 16)), 4, 6))
    timesteps = np.array([750.0, 12.5], np.float32)
    out = reference.jit(weights.merge(graphdef, params))(latents, timesteps, context)
    # The numbers have six decimals; a phase of 3,500 is known to 1e-4.
    found = summary(pack(out))
    np.testing.assert_allclose(found[2:], first, atol=2e-6)
    np.testing.assert_allclose(found[:2], [total, squares], atol=2e-5)
