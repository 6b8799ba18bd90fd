"""Adapters by Diffusion-DPO: against torch with PEFT in every family, and runs without a copy."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from sdjax.checkpoints.adapters import with_loras
from sdjax.checkpoints.reading import read_any
from sdjax.config import resolve
from sdjax.config_model import blank_method, method_of_run, model_of_run
from sdjax.diffusion.losses import NOISE, example_keys, fold_keys, normal_like
from sdjax.errors import UserError
from sdjax.families.conditioning import blank_tokenizers
from sdjax.families.registry import model_of
from sdjax.methods import dpo
from sdjax.methods.adapted import DPOAdaptersConfig
from sdjax.methods.adapter_files import adapter_of
from sdjax.methods.method import Draw, Setup
from sdjax.models import weights
from sdjax.models.adapters.networks import MARK
from sdjax.models.params import component
from sdjax.train import loop
from tests.methods.runs import begun_from, broken_off, to_torch
from tests.methods.test_dpo import pairs  # noqa: F401
from tests.methods.test_inputs_of_families import recipe
from tests.models.test_flux import run_diffusers as run_flux
from tests.train.test_loop import assert_same_run

B = 3
BETA = 40.0  # rounding of the errors, 1e-7, becomes 2e-6 in the logit
CLASSES = {
    "sd": diffusers.UNet2DConditionModel, "sdxl": diffusers.UNet2DConditionModel,
    "sd3": diffusers.SD3Transformer2DModel, "flux": diffusers.FluxTransformer2DModel,
}  # fmt: skip


def small(family, prediction):
    """The recipe with a denoiser of milliseconds, on moments and features."""
    c = recipe(family, "dpo_adapters", name="encoded", path="x", text_embeddings=True)
    if family in ("sd", "sdxl"):
        c.model.unet.update(block_out_channels=(8, 16), norm_num_groups=4, sample_size=4)
        c.objective.prediction_type = prediction
        c.schedule.zero_terminal_snr = False
    else:
        c.model.transformer.update(num_layers=2, num_attention_heads=2, attention_head_dim=16)
    if family == "sd3":
        c.model.transformer.caption_projection_dim = 32
    if family == "flux":
        c.model.transformer.update(num_single_layers=2, axes_dims_rope=(4, 6, 6))
    c.data.resolution = 32
    c.objective.caption_dropout = 0.0
    c.method.update(rank=3, alpha=6.0, beta=BETA, targets=("transformer",))
    return c


@pytest.fixture
def config(tiny_config, tiny_model, pairs):  # noqa: F811
    c = begun_from(tiny_config, tiny_model, "dpo_adapters")
    c.data.update(
        name="image_text_folder", path=str(pairs), eval_split="train", flip=True, crop="random",
        images=({"name": "rejected"},),
    )  # fmt: skip
    c.objective.caption_dropout = 0.0
    c.optim.update(groups=(), learning_rate=1e-2)
    c.method.update(rank=2, targets=("attention",))
    c.train.export = True
    return c


def drawn(abstract, rng):
    """Values for shapes: of parameters, factors and batches."""

    def one(path, v):
        if jnp.issubdtype(v.dtype, jnp.integer):
            return rng.integers(0, 30, v.shape).astype(v.dtype)
        size = np.prod(v.shape[:-1]) ** -0.5 if "." in path else 1.0  # of a kernel, its fan-in
        return (rng.normal(size=v.shape) * size).astype(np.float32)

    return {path: jnp.asarray(one(path, v)) for path, v in abstract.items()}


def torch_denoiser(model, params, factors):
    """The network of diffusers with a LoRA of PEFT, and {path of a layer: its module there}."""
    name = model.family.denoiser
    network = CLASSES[model.family.name].from_config(model.denoiser.to_json())
    own = {path: np.asarray(v) for path, v in component(params, name).items() if MARK not in path}
    tensors = weights.to_diffusers(own)
    buffers = {"pos_embed.pos_embed"} - tensors.keys()
    state = {key: torch.from_numpy(np.array(v)) for key, v in tensors.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert set(missing) <= buffers and not unexpected
    adapter = adapter_of(model, factors)
    layers = [path.partition(".")[2] for path in adapter]
    network.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=layers))
    modules = {f"{name}.{path}": network.get_submodule(path) for path in layers}
    for path, module in modules.items():
        for part, key in ((module.lora_A, "lora_down"), (module.lora_B, "lora_up")):
            value = torch.from_numpy(np.array(adapter[path].factors[key]))
            part["default"].weight.data = value.reshape(part["default"].weight.shape)
    return network, modules


def predict(family, network, xt, t, context):
    """The prediction of torch, [2B, C, h, w]."""
    context = context if isinstance(context, dict) else {"context": context}
    given = {name: np.concatenate([np.asarray(value)] * 2) for name, value in context.items()}
    tensors = {name: torch.from_numpy(value).float() for name, value in given.items()}
    text = tensors["context"]
    if family == "sd":
        return network(xt, t, text).sample
    if family == "sdxl":
        added = {"time_ids": tensors["numbers"], "text_embeds": tensors["pooled"]}
        return network(xt, t, text, added_cond_kwargs=added).sample
    if family == "sd3":
        return network(
            hidden_states=xt, timestep=t, encoder_hidden_states=text,
            pooled_projections=tensors["pooled"],
        ).sample  # fmt: skip
    x = xt.permute(0, 2, 3, 1).numpy()
    return run_flux(diffusers, network.double(), x, t.numpy(), given).permute(0, 3, 1, 2).float()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "prediction"),
    [("sd", "v_prediction"), ("sdxl", "epsilon"), ("sd3", ""), ("flux", "")],
)
def test_the_loss_and_its_gradients_are_those_of_the_script(family, prediction):
    """diffusers, train_diffusion_dpo_sdxl.py of examples/research_projects, in torch."""
    config = resolve(small(family, prediction))
    tokenizers = blank_tokenizers(model_of(config.model))
    model, method = model_of_run(config, tokenizers), method_of_run(config, tokenizers)
    rng = np.random.default_rng(1)
    params = drawn(method.abstract, rng)
    params |= {p: np.asarray(v) for p, v in method.init(jax.random.key(0)).items() if "pos_" in p}
    trained = {p: v for p, v in params.items() if method.trainable(p)}
    frozen = {p: v for p, v in params.items() if p not in trained}
    assert trained and all(MARK in path for path in trained)
    shapes = {n: jax.ShapeDtypeStruct((B, *v.shape), v.dtype) for n, v in method.example.items()}
    batch, positions = drawn(shapes, rng), jnp.arange(B)
    draw = Draw(jax.random.key(1), example_keys(jax.random.key(1), positions), positions, B)

    def mean(trained):
        loss, aux = method.phases[0].loss(trained, frozen, {}, batch, draw)
        return loss.mean(), (loss, aux)

    run = jax.jit(
        jax.grad(mean, has_aux=True), compiler_options={"xla_backend_optimization_level": 0}
    )
    gradients, (loss, aux) = run(trained)
    start = {p: jnp.zeros_like(v) if p.endswith("adapter.B") else v for p, v in trained.items()}
    _, (first, first_aux) = run(start)
    np.testing.assert_allclose(first, np.log(2), atol=2e-5)  # FT-42

    setup = Setup(
        config=config.method, model=model, objective=config.objective, data=config.data,
        sample=config.sample, dtype="float32", remat="none", adopted=True,
    )  # fmt: skip
    ours = dpo.latent_diffusion(setup)
    pair = [ours.latents(params, b, draw.keys) for b in (batch, dpo._rejected(batch))]
    context = ours.context(params, batch, pair[0])
    latents = torch.cat([to_torch(x0) for x0 in pair])
    noise = to_torch(normal_like(fold_keys(draw.keys, NOISE), pair[0])).repeat(2, 1, 1, 1)
    timesteps = torch.from_numpy(np.array(aux["timesteps"])).repeat(2)

    network, modules = torch_denoiser(model, params, trained)
    if family in ("sd", "sdxl"):
        table = diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        timesteps = timesteps.long()
        noisy = table.add_noise(latents, noise, timesteps)
        velocity = table.get_velocity(latents, noise, timesteps)
        target = noise if prediction == "epsilon" else velocity
    else:
        level = (timesteps / 1000).view(-1, 1, 1, 1)
        noisy, target = (1 - level) * latents + level * noise, noise - latents
    model_pred = predict(family, network, noisy, timesteps, context)
    losses = torch.nn.functional.mse_loss(model_pred, target, reduction="none").mean((1, 2, 3))
    win, lose = losses.chunk(2)
    network.disable_adapters()
    with torch.no_grad():
        ref_pred = predict(family, network, noisy, timesteps, context)
        ref = torch.nn.functional.mse_loss(ref_pred, target, reduction="none").mean((1, 2, 3))
    network.enable_adapters()
    ref_win, ref_lose = ref.chunk(2)
    inside = -0.5 * BETA * ((win - lose) - (ref_win - ref_lose))
    theirs = -1 * torch.nn.functional.logsigmoid(inside)
    theirs.mean().backward()

    assert inside.abs().min() > 1e-2
    np.testing.assert_allclose(aux["win_loss"], win.detach(), rtol=1e-4)
    np.testing.assert_allclose(first_aux["lose_loss"], ref_lose, rtol=1e-4)
    np.testing.assert_allclose(loss, theirs.detach(), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(aux["accuracy"], inside.detach() > 0)
    mine = adapter_of(model, {path: np.asarray(g) for path, g in gradients.items()})
    largest = max(np.abs(v).max() for layer in mine.values() for v in layer.factors.values())
    assert largest > 1e-4 and mine.keys() == modules.keys()
    for path, module in modules.items():
        for part, key in ((module.lora_A, "lora_down"), (module.lora_B, "lora_up")):
            weight = part["default"].weight
            unread = weight.grad is None  # the words after SD3's last block
            want = np.zeros(weight.shape, np.float32) if unread else weight.grad.numpy()
            got = mine[path].factors[key].reshape(want.shape)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * largest, err_msg=path)


def test_a_run_keeps_no_copy_and_resumes_to_the_bit(config, tmp_path, tiny_model):
    whole = tmp_path / "whole"
    assert loop.run(resolve(config), str(whole)) == loop.DONE
    references = json.loads((whole / "frozen.json").read_text())
    assert set(references) == {"unet", "vae", "text_encoder"}
    assert not (whole / "frozen.safetensors").exists()
    broken = broken_off(whole, tmp_path / "broken", 1)
    assert loop.run(resolve(config), str(broken)) == loop.DONE
    assert_same_run(whole, broken)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    # Both passes are the base; jax 0.12 rounds them differently, which counts times beta / 2.
    rtol = 1e-5 if jax.__version_info__ < (0, 12) else 2e-4
    np.testing.assert_allclose(rows[0]["train/loss"], np.log(2), rtol=rtol)
    assert abs(rows[-1]["train/loss"] - np.log(2)) > 1e-4
    base, read = read_any(tiny_model), read_any(whole)
    merged = with_loras(base, [str(whole / "adapter")])
    changed = {p for p, v in read.params.items() if np.any(v != base.params[p])}
    assert changed and all(".attn" in path for path in changed)
    for path, value in read.params.items():
        np.testing.assert_allclose(merged.params[path], value, atol=1e-6, err_msg=path)


def test_dropped_adapters_leave_the_reference_whole(config):
    """The errors of the reference are those of the base, whatever of the policy is dropped."""
    config.method.module_dropout = 0.5
    method = blank_method(resolve(config))
    assert not any("reference" in path for path in method.abstract)
    assert {path for path in method.abstract if method.trainable(path)} == {
        path for path in method.abstract if MARK in path
    }


def test_fields_of_both_methods_are_checked(config):
    for field, value in (("kind", "ia3"), ("loss", "log"), ("beta", 0.0)):
        with pytest.raises(ValueError, match=f"method.{field} is {value!r}"):
            DPOAdaptersConfig(**{field: value})
    with pytest.raises(ValueError, match="the model and its reference read the same text"):
        DPOAdaptersConfig(text_targets=("attention",))
    resolved = resolve(config)
    other = dataclasses.replace(resolved.objective, offset_noise=0.1)
    with pytest.raises(UserError, match="but method 'dpo_adapters' compares plain squared errors"):
        blank_method(dataclasses.replace(resolved, objective=other))
