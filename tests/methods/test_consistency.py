"""Latent consistency distillation against torch, and a run that diffusers draws with."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler

from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.reading import read_any
from sdjax.config import resolve
from sdjax.config_model import method_of_run, model_of_run
from sdjax.diffusion.losses import NOISE, example_keys, fold_keys, normal_like
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.registry import FAMILIES, model_of
from sdjax.methods.adapter_rules import changes
from sdjax.methods.distil import consistency
from sdjax.methods.distil.consistency_lora import LCMLoRAConfig
from sdjax.methods.method import Draw
from sdjax.models import weights
from sdjax.models.adapters.networks import MARK
from sdjax.models.config import ConfigError
from sdjax.models.params import component
from sdjax.train import loop
from tests.methods.runs import begun_from, broken_off, to_torch, torch_unet
from tests.train.test_loop import assert_same_run

B = 4


@pytest.fixture
def config(tiny_config, tiny_model):
    c = begun_from(tiny_config, tiny_model, "lcm")
    c.objective.caption_dropout = 0.0
    c.method.guidance_width = 10
    c.sample.sampler.update(name="lcm", steps=2)
    c.sample.guidance = 1.0
    c.optim.groups = ()
    c.ema.profiles = ("0.95",)
    return c


def bound(config):
    """(assembled, method, every parameter as at the start) of a recipe."""
    assembled = assemble(resolve(config))
    method = method_of_run(assembled.config, assembled.tokenizers)
    loaded = method.init(jax.random.key(0)) | assembled.params | method.start(assembled.params)
    return assembled, method, {path: jnp.asarray(value) for path, value in loaded.items()}


def batch_of(assembled, rng):
    image = rng.uniform(-1, 1, (B, 16, 16, 3)).astype(np.float32)
    words = next(iter(assembled.tokenizers))
    tokens = assembled.tokenizers[words].encode(["a", "b", "c", "d"])
    return {"image": jnp.asarray(image), words: jnp.asarray(tokens)}


def test_the_differences_are_those_of_the_paper():
    """D8: huber(0) = 0, huber(1) = .9990005 and huber(1e-3) = 4.142e-4 with c = 1e-3."""
    a = jnp.array([[0.0], [1.0], [1e-3]])
    found = consistency.difference("huber", a, jnp.zeros_like(a), 1e-3)
    np.testing.assert_allclose(found, [0, 0.9990005, 4.142e-4], rtol=1e-4)
    found = consistency.difference("l2", a, jnp.zeros_like(a), 1e-3)
    np.testing.assert_allclose(found, [0, 1, 1e-6], rtol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_and_its_gradient_are_those_of_the_script(prediction, config):
    """diffusers, examples/consistency_distillation/train_lcm_distill_sd_wds.py, in torch."""
    config.init_prediction_type = prediction
    assembled, method, every = bound(config)
    rng = np.random.default_rng(1)
    moved = {p: v + 0.02 * rng.normal(size=v.shape).astype(np.float32) for p, v in every.items()}
    trained = {p: v for p, v in moved.items() if p.startswith("unet.")}
    averages = {"0.95": {p: v * 1.05 for p, v in trained.items()}}
    frozen = {p: v for p, v in every.items() if not p.startswith("unet.")}
    batch, positions = batch_of(assembled, rng), jnp.arange(B)
    draw = Draw(jax.random.key(1), example_keys(jax.random.key(1), positions), positions, B)

    @jax.jit
    def run(trained):
        def mean(trained):
            loss, aux = method.phases[0].loss(trained, frozen, averages, batch, draw)
            return loss.mean(), (loss, aux)

        return jax.grad(mean, has_aux=True)(trained)

    gradients, (loss, aux) = run(trained)

    # What both are given: latents, noise, points of the grid, scales, text.
    model = model_of_run(assembled.config, assembled.tokenizers)
    ours = consistency.latent_diffusion(
        consistency.Setup(
            config=assembled.config.method, model=model, objective=assembled.config.objective,
            data=assembled.config.data, sample=assembled.config.sample, dtype="float32",
            remat="none", adopted=True,
        )
    )  # fmt: skip
    x0 = ours.latents(every, batch, draw.keys)
    noise = to_torch(normal_like(fold_keys(draw.keys, NOISE), x0))
    text = ours.context(every, batch, x0)["context"]
    null = ours.conditioner.drop(every, batch, draw.keys, 1.0)
    uncond = ours.context(every, {**batch, **null}, x0)["context"]
    text, uncond = (torch.from_numpy(np.array(value)) for value in (text, uncond))
    uniform = jax.vmap(jax.random.uniform)(fold_keys(draw.keys, consistency.GUIDANCE_STREAM))
    w = torch.from_numpy(np.array(6.0 + 10.0 * uniform)) - 1  # 5 to 15
    start = torch.from_numpy(np.array(aux["timesteps"])).long()
    assert set((start % 20).tolist()) == {19}
    end = (start - 20).clamp(min=0)

    scheduler = diffusers.DDPMScheduler.from_config(
        json.loads((diffusers_scheduler(config)).read_text()), clip_sample=False
    )
    alphas = scheduler.alphas_cumprod.double()
    alpha, sigma = alphas.sqrt(), (1 - alphas).sqrt()

    def at(table, t):
        return table[t].view(-1, 1, 1, 1).float()

    def both(out, x, t):
        a, s = at(alpha, t), at(sigma, t)
        if prediction == "epsilon":
            return (x - s * out) / a, out
        return a * x - s * out, a * out + s * x

    def consistent(unet, x, t):
        embedded = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, w, 10, torch.float32
        )
        out = unet(x, t, timestep_cond=embedded, encoder_hidden_states=text).sample
        scaled = 10.0 * t.view(-1, 1, 1, 1).double()
        skip, weight = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return skip.float() * x + weight.float() * both(out, x, t)[0]

    student = torch_unet(model.denoiser, trained)
    target = torch_unet(model.denoiser, averages["0.95"])
    plain = dataclasses.replace(model.denoiser, time_cond_proj_dim=None)
    teacher = torch_unet(plain, frozen, consistency.TEACHER)
    xt = at(alpha, start) * to_torch(x0) + at(sigma, start) * noise
    with torch.no_grad():
        said = both(teacher(xt, start, encoder_hidden_states=text).sample, xt, start)
        unsaid = both(teacher(xt, start, encoder_hidden_states=uncond).sample, xt, start)
        scale = w.view(-1, 1, 1, 1)
        pred_x0, pred_eps = (s + scale * (s - u) for s, u in zip(said, unsaid, strict=True))
        before = at(alpha, end) * pred_x0 + at(sigma, end) * pred_eps
        wanted = consistent(target, before, end)
    found = consistent(student, xt, start)
    theirs = (((found - wanted) ** 2 + 0.001**2).sqrt() - 0.001).mean(dim=(1, 2, 3))
    theirs.mean().backward()

    np.testing.assert_allclose(loss, theirs.detach(), rtol=2e-5)
    mine = weights.to_diffusers(component({p: np.asarray(g) for p, g in gradients.items()}, "unet"))
    for name, parameter in student.named_parameters():
        size = max(np.abs(parameter.grad.numpy()).max(), 1e-6)
        # x0 from eps multiplies what rounding leaves by up to 15, and the loss its slope by 1 / c.
        grad = parameter.grad / size
        np.testing.assert_allclose(mine[name] / size, grad, atol=1e-3, rtol=0, err_msg=name)


def diffusers_scheduler(config):
    """The scheduler's file of the folder that a recipe begins from."""
    from pathlib import Path

    return Path(config.init_from) / "scheduler" / "scheduler_config.json"


def test_the_student_starts_as_the_teacher_whatever_the_guidance(config):
    """D4: to the bit, since the new layer is zero."""
    assembled, method, every = bound(config)
    kernel = every["unet.time_embedding.cond_proj.kernel"]
    assert kernel.shape[0] == 10 and not kernel.any()
    teacher = component(every, consistency.TEACHER)
    student = component(every, "unet")
    assert set(student) - set(teacher) == {"time_embedding.cond_proj.kernel"}
    for path, value in teacher.items():
        np.testing.assert_array_equal(student[path], value)
    rng = np.random.default_rng(0)
    batch, positions = batch_of(assembled, rng), jnp.arange(B)
    keys = example_keys(jax.random.key(1), positions)
    found = method.validate(every, batch, keys, np.array([10.0, 600.0]))
    changed = {**every, "unet.time_embedding.cond_proj.kernel": kernel + 0.1}
    assert found.shape == (B, 2) and np.isfinite(found).all()
    assert np.abs(method.validate(changed, batch, keys, np.array([600.0])) - found[:, 1:]).max() > 0


def test_a_run_resumes_to_the_bit_and_diffusers_draws_with_it(config, tmp_path, tiny_model):
    config.train.update(export=True)
    whole = tmp_path / "whole"
    assert loop.run(resolve(config), str(whole)) == loop.DONE
    references = json.loads((whole / "frozen.json").read_text())
    assert references["teacher"]["network"] == "unet"
    assert references["teacher"]["path"] == str(tiny_model)
    assert not (whole / "frozen.safetensors").exists()
    broken = broken_off(whole, tmp_path / "broken", 1)
    assert loop.run(resolve(config), str(broken)) == loop.DONE
    assert_same_run(whole, broken)

    folder = whole / "diffusers"
    for name in ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"):
        pipeline = getattr(diffusers, name).from_pretrained(folder)
        assert isinstance(pipeline.scheduler, LCMScheduler)
        assert pipeline.unet.config.time_cond_proj_dim == 10
    found = read_any(folder)
    assert found.sampler.name == "lcm" and found.sampler.steps == 4
    assert found.family.reads_guidance(found.networks) and not found.unsupported_sampler
    run = read_any(whole)
    assert run.networks["unet"].time_cond_proj_dim == 10
    assert {p.split(".")[0] for p in run.params} == {"unet", "vae", "text_encoder"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.objective.update(weighting="min_snr"), "objective.weighting is 'min_snr'"),
        (lambda c: c.sample.sampler.update(name="ddim"), "sample.sampler is 'ddim'"),
        (lambda c: c.method.update(original_steps=25), "method.original_steps = 25"),
    ],
)
def test_another_objective_or_sampler_is_refused(change, words, config):
    change(config)
    with pytest.raises(UserError, match=words):
        bound(config)


def test_several_averages_leave_the_target_open(config):
    assembled, method, every = bound(config)
    batch, positions = batch_of(assembled, np.random.default_rng(0)), jnp.arange(B)
    draw = Draw(jax.random.key(1), example_keys(jax.random.key(1), positions), positions, B)
    with pytest.raises(UserError, match=r"ema.profiles has the averages 0.95, 0.99, .* of one"):
        method.phases[0].loss(every, {}, {"0.99": every, "0.95": every}, batch, draw)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("guidance", (3.0, 2.0), "method.guidance is"),
        ("guidance", (0.5, 2.0), "two scales of 1 or more"),
        ("loss", "l1", "expected one of huber, l2"),
        ("huber_c", 0.0, "method.huber_c is 0.0"),
        ("guidance_width", 7, "expected an even number"),
    ],
)
def test_fields_out_of_their_range_are_named(field, value, words, config):
    config.method[field] = value
    with pytest.raises(ConfigError, match=words):
        resolve(config)


def test_a_distilled_model_is_no_teacher(config, tmp_path):
    from sdjax.formats.diffusers_folder import write_diffusers

    assembled, _, every = bound(config)
    params = {p: np.asarray(v) for p, v in every.items() if not p.startswith("teacher.")}
    model = model_of_run(assembled.config, assembled.tokenizers, params)
    write_diffusers(tmp_path / "distilled", model)
    config.init_from = str(tmp_path / "distilled")
    with pytest.raises(ConfigError, match="was distilled already"):
        assemble(resolve(config))


@pytest.mark.parametrize(
    "family, modules, parameters", [("sd", 278, 67_252_224), ("sdxl", 788, 196_751_360)]
)
def test_the_layers_of_a_lora_are_those_of_the_releases(family, modules, parameters):
    """D14: rank 64, of latent-consistency/lcm-lora-sdv1-5 and -sdxl."""
    model = model_of(FAMILIES[family].presets["base"])
    model = dataclasses.replace(model, changes=changes(LCMLoRAConfig(), model.family))
    found = {p: v for p, v in bind(model, ("unet",)).abstract.items() if MARK in p}
    assert len({path.split(MARK)[0] for path in found}) == modules
    assert sum(value.size for value in found.values()) == parameters


def test_a_lora_begins_with_the_loss_of_its_teacher_and_alone_is_trained(
    config, tiny_config, tiny_model, tmp_path
):
    """Student and teacher are one at the start of both methods, so their first losses are equal."""
    with_lora = begun_from(tiny_config, tiny_model, "lcm_lora")
    for group in ("objective", "sample", "ema"):
        with_lora[group] = config[group]
    with_lora.method.rank = 2
    with_lora.optim.groups = ()
    with_lora.train.update(export=True)
    losses = []
    for each in (config, with_lora):
        assembled, method, every = bound(each)
        batch, positions = batch_of(assembled, np.random.default_rng(1)), jnp.arange(B)
        draw = Draw(jax.random.key(1), example_keys(jax.random.key(1), positions), positions, B)
        phase = method.phases[0]
        trained = {p: v for p, v in every.items() if phase.trains(p)}
        frozen = {p: v for p, v in every.items() if p not in trained}
        losses.append(jax.jit(phase.loss)(trained, frozen, {}, batch, draw)[0])
    assert all(MARK in path for path in trained) and len(trained) > 20
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)

    assert loop.run(resolve(with_lora), str(tmp_path / "run")) == loop.DONE
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").exists()
    references = json.loads((tmp_path / "run" / "frozen.json").read_text())
    assert references["unet"]["path"] == str(tiny_model) and "teacher" not in references
    assert read_any(tmp_path / "run").sampler.name == "lcm"


def test_a_lora_that_would_change_the_text_is_refused():
    with pytest.raises(ValueError, match="teacher and student read the same text"):
        LCMLoRAConfig(text_targets=("attention",))
