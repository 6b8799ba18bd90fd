"""Progressive distillation against torch, its stages, and runs that diffusers draws with."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.reading import read_any
from sdjax.config import resolve
from sdjax.config_model import method_of_run, model_of_run
from sdjax.diffusion.losses import NOISE, example_keys, fold_keys, normal_like
from sdjax.errors import UserError
from sdjax.formats.scheduler_json import scheduler_from_diffusers
from sdjax.methods.denoise import latent_diffusion
from sdjax.methods.distil import progressive
from sdjax.methods.method import COPY, Draw, Method, Setup
from sdjax.models import weights
from sdjax.models.config import ConfigError
from sdjax.models.params import component
from sdjax.sampling.generate import settings_of
from sdjax.train import loop
from tests.methods.runs import (
    assert_same_state,
    begun_from,
    on_devices,
    rows,
    state_of,
    to_torch,
    torch_unet,
)

B = 4


@pytest.fixture
def config(tiny_config, tiny_model):
    c = begun_from(tiny_config, tiny_model, "progressive")
    c.objective.caption_dropout = 0.0
    c.method.update(steps=(4, 2), stage_steps=2, guidance_width=10)
    c.sample.sampler.update(steps=2, spacing="trailing", distilled=True)
    c.sample.guidance = 1.0
    c.optim.groups = ()
    c.ema.profiles = ()
    c.train.steps = 6
    return c


def bound(config):
    """(assembled, method, every parameter as at the start) of a recipe."""
    assembled = assemble(resolve(config))
    method = method_of_run(assembled.config, assembled.tokenizers)
    loaded = method.init(jax.random.key(0)) | assembled.params
    return assembled, method, {path: jnp.asarray(value) for path, value in loaded.items()}


def batch_of(assembled, rng):
    image = rng.uniform(-1, 1, (B, 16, 16, 3)).astype(np.float32)
    words = next(iter(assembled.tokenizers))
    tokens = assembled.tokenizers[words].encode(["a", "b", "c", "d"])
    return {"image": jnp.asarray(image), words: jnp.asarray(tokens)}


def of_torch(assembled, every, batch, draw):
    """What both are given: x0, noise, text, the empty text."""
    model = model_of_run(assembled.config, assembled.tokenizers)
    setup = Setup(
        config=assembled.config.method, model=model, objective=assembled.config.objective,
        data=assembled.config.data, sample=assembled.config.sample, dtype="float32",
        remat="none", adopted=True,
    )  # fmt: skip
    ours = latent_diffusion(setup)
    x0 = ours.latents(every, batch, draw.keys)
    noise = normal_like(fold_keys(draw.keys, NOISE), x0)
    null = ours.conditioner.drop(every, batch, draw.keys, 1.0)
    texts = [ours.context(every, one, x0) for one in (batch, {**batch, **null})]
    texts = [text["context"] if isinstance(text, dict) else text for text in texts]
    return model, to_torch(x0), to_torch(noise), *(torch.from_numpy(np.array(t)) for t in texts)


@pytest.mark.parametrize(
    ("prediction", "guided", "stage", "weighting"),
    [
        ("v_prediction", True, 0, "truncated_snr"),
        ("v_prediction", True, 2, "snr_plus_one"),
        ("epsilon", True, 1, "truncated_snr"),
        ("v_prediction", False, 0, "truncated_snr"),
    ],
)
def test_the_loss_and_its_gradient_are_those_of_torch(prediction, guided, stage, weighting, config):
    """The teacher's steps are those of diffusers' DDIMScheduler."""
    config.init_prediction_type = prediction
    config.method.weighting = weighting
    if not guided:
        config.method.guidance = ()
    assembled, method, every = bound(config)
    rng = np.random.default_rng(1)
    trained = {
        p: v + 0.02 * rng.normal(size=v.shape).astype(np.float32)
        for p, v in every.items()
        if p.startswith("unet.")
    }
    # As at the start in the stage for guidance, whose teacher reads no scale.
    moved = 1.0 if guided and stage == 0 else 1.05
    copy = {p: every[p] if moved == 1.0 else v * moved for p, v in trained.items()}
    frozen = {p: v for p, v in every.items() if p not in trained}
    batch, positions = batch_of(assembled, rng), jnp.arange(B)
    key = jax.random.key(1)
    draw = Draw(key, example_keys(key, positions), positions, B, copies=jnp.int32(stage))

    @jax.jit
    def run(trained):
        def mean(trained):
            loss, aux = method.phases[0].loss(trained, frozen, {COPY: copy}, batch, draw)
            return loss.mean(), (loss, aux)

        return jax.grad(mean, has_aux=True)(trained)

    gradients, (loss, aux) = run(trained)
    model, x0, noise, text, nothing = of_torch(assembled, every, batch, draw)
    uniform = jax.vmap(jax.random.uniform)(fold_keys(draw.keys, progressive.GUIDANCE_STREAM))
    scale = 3.0 + 12.0 * torch.from_numpy(np.array(uniform)).view(-1, 1, 1, 1)
    t = torch.from_numpy(np.array(aux["timesteps"])).long()
    assert (np.asarray(aux["stage"]) == stage).all()

    scheduler = diffusers.DDIMScheduler.from_pretrained(
        config.init_from, subfolder="scheduler", timestep_spacing="trailing",
        prediction_type=prediction, clip_sample=False,
    )  # fmt: skip
    alphas = scheduler.alphas_cumprod.double()
    alpha, sigma = alphas.sqrt()[t].view(-1, 1, 1, 1), (1 - alphas).sqrt()[t].view(-1, 1, 1, 1)
    embedded = {}
    if guided:
        embedded["timestep_cond"] = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            None, scale.view(-1) - 1, 10, torch.float32
        )

    def to_x0(out, x):
        if prediction == "epsilon":
            return (x - sigma * out) / alpha
        return alpha * x - sigma * out

    xt = (alpha * x0 + sigma * noise).float()
    student = torch_unet(model.denoiser, trained)
    with torch.no_grad():
        if guided and stage == 0:
            plain = dataclasses.replace(model.denoiser, time_cond_proj_dim=None)
            gone = {p: v for p, v in copy.items() if "cond_proj" not in p}
            teacher = torch_unet(plain, gone)
            said, unsaid = (teacher(xt, t, encoder_hidden_states=c).sample for c in (text, nothing))
            wanted = to_x0(unsaid + scale * (said - unsaid), xt)
        else:
            steps = (4, 2)[stage - guided]
            assert set(t.tolist()) <= {1000 * (i + 1) // steps - 1 for i in range(steps)}
            scheduler.set_timesteps(2 * steps)
            teacher = torch_unet(model.denoiser, copy)
            z, at = xt, t
            for _ in range(2):
                out = teacher(z, at, encoder_hidden_states=text, **embedded).sample
                each = [scheduler.step(o[None], int(i), x[None]).prev_sample
                        for o, i, x in zip(out, at, z, strict=True)]  # fmt: skip
                z, at = torch.cat(each), at - 500 // steps
            before = torch.where(at < 0, alphas[0], alphas[at]).view(-1, 1, 1, 1)
            end_alpha, ratio = before.sqrt(), (1 - before).sqrt() / sigma
            wanted = (z - ratio * xt) / (end_alpha - ratio * alpha)
    found = to_x0(student(xt, t, encoder_hidden_states=text, **embedded).sample, xt)
    snr = (alpha / sigma) ** 2
    weight = snr.clamp(min=1) if weighting == "truncated_snr" else snr + 1
    theirs = (weight * (found - wanted) ** 2).mean(dim=(1, 2, 3))
    theirs.mean().backward()

    np.testing.assert_allclose(loss, theirs.detach(), rtol=1e-4)
    mine = weights.to_diffusers(component({p: np.asarray(g) for p, g in gradients.items()}, "unet"))
    for name, parameter in student.named_parameters():
        size = max(np.abs(parameter.grad.numpy()).max(), 1e-6)
        np.testing.assert_allclose(
            mine[name] / size, parameter.grad / size, atol=1e-3, rtol=0, err_msg=name
        )


def test_no_gradient_reaches_the_teacher(config):
    """D9: of the copy the loss depends, but not its gradient's way."""
    assembled, method, every = bound(config)
    batch, positions = batch_of(assembled, np.random.default_rng(0)), jnp.arange(B)
    key = jax.random.key(1)
    draw = Draw(key, example_keys(key, positions), positions, B, copies=jnp.int32(1))
    trained = {p: v for p, v in every.items() if p.startswith("unet.")}

    @jax.jit
    def grown(factor):
        copy = {p: v * factor for p, v in trained.items()}
        return method.phases[0].loss(trained, every, {COPY: copy}, batch, draw)[0].mean()

    assert grown(1.0) != grown(1.1) and jax.grad(grown)(1.1) == 0


@pytest.mark.slow
def test_stages_their_copies_and_a_kill_at_their_boundary(config, tmp_path):
    """Three stages of two steps, on 8 devices; killed after the checkpoint of a boundary."""
    config.train.update(keep_last=9)
    config.data.batch_size = 8
    whole = on_devices(config, tmp_path / "whole")
    assert [row["train/stage"] for _, row in sorted(rows(whole).items())] == [0, 0, 1, 1, 2, 2]
    states = {step: state_of(whole, step) for step in range(1, 7)}
    names = [name.removeprefix("params/") for name in states[1] if name.startswith("params/")]
    for step, taken in ((3, 2), (5, 4), (6, 4)):
        for name in names:
            np.testing.assert_array_equal(
                states[step][f"copy/{name}"], states[taken][f"params/{name}"], err_msg=name
            )
    moved = "unet.conv_in.kernel"
    assert not np.array_equal(states[1][f"copy/{moved}"], states[1][f"params/{moved}"])
    np.testing.assert_array_equal(
        states[1][f"copy/{moved}"], read_any(config.init_from).params[moved]
    )

    killed = on_devices(config, tmp_path / "killed", kill=3)
    assert max(rows(killed), default=0) < 3
    on_devices(config, killed)
    assert_same_state(whole, killed, 6)
    other = rows(on_devices(config, tmp_path / "split", mesh="2,4"))
    for step, row in rows(whole).items():
        for name in ("train/loss", "train/grad_norm"):  # of networks that are nearly equal
            np.testing.assert_allclose(row[name], other[step][name], rtol=3e-4)


@pytest.mark.parametrize("guided", [True, False])
def test_a_run_says_how_it_is_drawn(guided, config, tmp_path):
    """Of the workdir and of the folder it writes, and diffusers takes the same timesteps."""
    config.train.update(export=True, steps=5)
    if not guided:
        config.method.guidance = ()
    assert loop.run(resolve(config), str(tmp_path / "run")) == loop.DONE
    folder = tmp_path / "run" / "diffusers"
    for found in (read_any(folder), read_any(tmp_path / "run")):
        sampler = found.sampler
        assert (sampler.name, sampler.steps, sampler.spacing) == ("ddim", 2, "trailing")
        assert sampler.distilled and settings_of(found).guidance == 1.0
        assert found.family.reads_guidance(found.networks) == guided
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline.scheduler, diffusers.DDIMScheduler)
    pipeline.scheduler.set_timesteps(2)
    assert pipeline.scheduler.timesteps.tolist() == [999, 499]
    assert pipeline.unet.config.get("time_cond_proj_dim") == (10 if guided else None)
    assert not json.loads((tmp_path / "run" / "frozen.json").read_text()).get("teacher")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.objective.update(weighting="min_snr"), "objective.weighting is 'min_snr'"),
        (lambda c: c.sample.sampler.update(name="euler"), "sample.sampler.name is 'euler'"),
        (lambda c: c.sample.sampler.update(steps=4), "sample.sampler.steps is 4; .* with 2"),
        (lambda c: c.sample.sampler.update(spacing="leading"), "spacing is 'leading'"),
        (lambda c: c.sample.sampler.update(distilled=False), "distilled is False"),
        (
            lambda c: (c.method.update(steps=(6, 3)), c.sample.sampler.update(steps=3)),
            "ends with 3, which does not divide the 1000",
        ),
        (
            lambda c: (c.method.update(steps=(1000, 500)), c.sample.sampler.update(steps=500)),
            "expected at most 1000",
        ),
    ],
)
def test_another_objective_or_sampler_is_refused(change, words, config):
    change(config)
    with pytest.raises(UserError, match=words):
        bound(config)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", (), "method.steps is"),
        ("steps", (8, 2), "each half of the one before"),
        ("steps", (0,), "method.steps is"),
        ("stage_steps", 0, "method.stage_steps is 0"),
        ("guidance", (3.0,), "two scales of 1 or more"),
        ("guidance_width", 7, "expected an even number"),
        ("weighting", "snr", "expected one of truncated_snr, snr_plus_one"),
    ],
)
def test_fields_out_of_their_range_are_named(field, value, words, config):
    config.method[field] = value
    with pytest.raises(ConfigError, match=words):
        resolve(config)


def test_a_run_that_ends_before_its_last_stage_is_refused(config, tmp_path):
    config.train.steps = 4
    with pytest.raises(ConfigError, match="train.steps is 4, but the last stage .* after 4"):
        loop.run(resolve(config), str(tmp_path / "run"))


def test_copies_are_taken_at_rising_updates():
    nothing = lambda *args: None  # noqa: E731
    with pytest.raises(ValueError, match="copied_at is"):
        Method({}, nothing, (), {}, nothing, None, nothing, nothing, copied_at=(4, 2))


def test_a_distilled_model_is_not_distilled_without_guidance(config, tmp_path):
    from sdjax.formats.diffusers_folder import write_diffusers

    assembled, _, every = bound(config)
    params = {p: np.asarray(v) for p, v in every.items()}
    write_diffusers(
        tmp_path / "distilled", model_of_run(assembled.config, assembled.tokenizers, params)
    )
    config.init_from, config.method.guidance = str(tmp_path / "distilled"), ()
    with pytest.raises(UserError, match="distilled already"):
        bound(config)


def test_a_strangers_number_of_steps_is_checked():
    file = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    read = scheduler_from_diffusers(file | {"_distilled_steps": 2}).sampler
    assert (read.steps, read.distilled) == (2, True)
    for wrong in ("2", 0, True, 10**9):
        with pytest.raises(ValueError, match="steps"):
            scheduler_from_diffusers(file | {"_distilled_steps": wrong})
