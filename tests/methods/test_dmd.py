"""Distribution matching distillation: its gradient, torch, its two phases, runs, and its files."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import LCMScheduler

from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.reading import read_any
from sdjax.config import resolve
from sdjax.config_model import method_of_run, model_of_run
from sdjax.diffusion.losses import example_keys, fold_keys, normal_like
from sdjax.errors import UserError
from sdjax.methods.denoise import latent_diffusion
from sdjax.methods.distil import dmd
from sdjax.methods.distil.dmd_lora import DMDLoRAConfig
from sdjax.methods.method import Draw, Setup
from sdjax.models import weights
from sdjax.models.adapters.networks import MARK
from sdjax.models.config import ConfigError
from sdjax.models.critics.head import HeadConfig, MiddleHead
from sdjax.models.params import component
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
GRID = [999, 749, 499, 249]


def recipe(tiny_config, tiny_model, method="dmd"):
    c = begun_from(tiny_config, tiny_model, method)
    c.objective.caption_dropout = 0.0
    c.sample.sampler.update(name="lcm", steps=4, original_steps=100)
    c.sample.guidance = 1.0
    c.optim.groups = ()
    c.ema.profiles = ()
    c.method.fake_updates = 3
    return c


@pytest.fixture
def config(tiny_config, tiny_model):
    return recipe(tiny_config, tiny_model)


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


def drawing_of(seed):
    key, positions = jax.random.key(seed), jnp.arange(B)
    return Draw(key, example_keys(key, positions), positions, B)


def test_the_gradient_is_that_of_the_paper():
    """D10: ((x - real) - (x - fake)) / mean |x - real|; none where both agree, or at 0 / 0."""
    rng = np.random.default_rng(0)
    x, real, fake = (jnp.asarray(rng.normal(size=(3, 2, 2, 1)), jnp.float32) for _ in range(3))
    real = real.at[2].set(x[2])  # the teacher would change nothing
    fake = fake.at[1].set(real[1]).at[2].set(x[2])
    found = dmd.matching_gradient(x, real, fake)
    with np.errstate(invalid="ignore"):
        theirs = (np.asarray(x - real) - np.asarray(x - fake)) / np.abs(np.asarray(x - real)).mean(
            axis=(1, 2, 3), keepdims=True
        )
    np.testing.assert_allclose(found[0], theirs[0], rtol=1e-5)
    assert not found[1:].any()
    # Of half of the squared distance to x - gradient, the slope times the numbers is the gradient.
    slope = jax.grad(lambda x, g: 0.5 * jnp.mean((x - jax.lax.stop_gradient(x - g)) ** 2))(x, found)
    np.testing.assert_allclose(slope * x.size, found, rtol=1e-6)


def test_a_student_of_gaussians_comes_to_its_teacher():
    """x = a z + b, with the exact x0 of both: teacher of N(0.7, 0.3^2), fake of N(b, a^2).

    An example has many numbers, so that what its gradient is divided by is nearly constant.
    """
    mean, spread, alpha, sigma = 0.7, 0.3, 0.6, 0.8

    def x0(xt, mean, spread):
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        return mean + gain * (xt - alpha * mean)

    @jax.jit
    def step(params, key):
        z, eps = jax.random.normal(key, (2, 8, 256))

        def loss(params):
            x = params["a"] * z + params["b"]
            xt = alpha * x + sigma * eps
            found = x0(xt, mean, spread), x0(xt, params["b"], params["a"])
            gradient = jax.lax.stop_gradient(dmd.matching_gradient(x, *found))
            return 0.5 * jnp.mean((x - jax.lax.stop_gradient(x - gradient)) ** 2)

        return jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params))

    params = {"a": jnp.float32(1.0), "b": jnp.float32(-1.0)}
    for key in jax.random.split(jax.random.key(0), 800):
        params = step(params, key)
    np.testing.assert_allclose([params["a"], params["b"]], [spread, mean], atol=0.05)


class TorchHead(torch.nn.Module):
    """`cls_pred_branch` of main/sd_guidance.py for SD 1.5, a middle of 8 x 8."""

    def __init__(self, width, groups):
        super().__init__()
        first = torch.nn.Conv2d(width, width, 4, stride=2, padding=1)
        second = torch.nn.Conv2d(width, width, 4, stride=4, padding=0)
        self.convs = torch.nn.ModuleList([first, second])
        self.norms = torch.nn.ModuleList([torch.nn.GroupNorm(groups, width) for _ in range(2)])
        self.out = torch.nn.Conv2d(width, 1, 1)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.nn.functional.silu(norm(conv(x)))
        return self.out(x).flatten()


@pytest.mark.parametrize(("side", "convs"), [(4, 1), (8, 2), (32, 4)])
def test_the_head_is_that_of_sd_and_of_sdxl(side, convs):
    """8 x 8 is the middle of SD 1.5 at 512 pixels, 32 x 32 that of SDXL at 1024."""
    graph, abstract = weights.abstract(MiddleHead, HeadConfig(1280, side))
    found = {path: value.shape for path, value in abstract.items()}
    for i in range(convs):
        assert found.pop(f"convs.{i}.kernel") == (4, 4, 1280, 1280)
        for name in (f"convs.{i}.bias", f"norms.{i}.scale", f"norms.{i}.bias"):
            assert found.pop(name) == (1280,)
    assert found == {"out.kernel": (1, 1, 1280, 1), "out.bias": (1,)}
    like = jax.ShapeDtypeStruct((2, side, side, 1280), jnp.float32)
    assert jax.eval_shape(lambda p, x: weights.merge(graph, p)(x), abstract, like).shape == (2,)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_losses_and_their_gradients_are_those_of_the_published_code(prediction, config):
    """tianweiy/DMD2, main/sd_guidance.py, in torch."""
    config.init_prediction_type = prediction
    config.method.update(gan_weight=0.1, head_weight=0.3)
    assembled, method, every = bound(config)
    rng = np.random.default_rng(1)
    every = {p: v + 0.02 * rng.normal(size=v.shape).astype(np.float32) for p, v in every.items()}
    batch, draw = batch_of(assembled, rng), drawing_of(1)
    last = int(jax.random.randint(jax.random.fold_in(draw.key, dmd.COUNT), (), 0, 4))
    assert last == 2  # steps are drawn before the one that is trained

    @jax.jit
    def run(every):
        found = []
        for phase in method.phases:
            own = {p: v for p, v in every.items() if phase.trains(p)}

            def mean(own, phase=phase):
                loss, aux = phase.loss({**every, **own}, {}, {}, batch, draw)
                return loss.mean(), (loss, aux)

            found.append(jax.grad(mean, has_aux=True)(own))
        return found

    (of_fake, (fake_loss, _)), (of_student, (student_loss, _)) = run(every)
    theirs = Published(assembled, every, batch, draw, last, prediction)
    torch_student, torch_fake = theirs.student_loss(), theirs.fake_loss()
    np.testing.assert_allclose(student_loss, torch_student.detach(), rtol=1e-4)
    np.testing.assert_allclose(fake_loss, torch_fake.detach(), rtol=1e-4)
    for loss, gradients, networks in (
        (torch_student, of_student, {"unet": theirs.student}),
        (torch_fake, of_fake, {"fake": theirs.fake, "head": theirs.head}),
    ):
        for network in (theirs.student, theirs.fake, theirs.head):
            network.zero_grad()
        loss.mean().backward(retain_graph=True)
        for part, network in networks.items():
            own = {p: np.asarray(g) for p, g in component(gradients, part).items()}
            mine = weights.to_diffusers(own)
            for name, parameter in network.named_parameters():
                size = max(np.abs(parameter.grad.numpy()).max(), 1e-6)
                np.testing.assert_allclose(
                    mine[name] / size, parameter.grad / size, atol=2e-3, rtol=0, err_msg=name
                )


class Published:
    """The losses of main/sd_guidance.py and sd_unified_model.py, with our noise."""

    def __init__(self, assembled, every, batch, draw, last, prediction):
        model = model_of_run(assembled.config, assembled.tokenizers)
        ours = latent_diffusion(
            Setup(
                config=assembled.config.method, model=model, objective=assembled.config.objective,
                data=assembled.config.data, sample=assembled.config.sample, dtype="float32",
                remat="none", adopted=True,
            )
        )  # fmt: skip
        x0 = ours.latents(every, batch, draw.keys)
        null = ours.conditioner.drop(every, batch, draw.keys, 1.0)
        self.text, self.null = (
            torch.from_numpy(np.array(ours.context(every, one, x0)))
            for one in (batch, {**batch, **null})
        )
        self.real = to_torch(x0)
        self.config, self.last, self.prediction = assembled.config.method, last, prediction
        self._keys, self._like = draw.keys, x0
        self.student, self.teacher, self.fake = (
            torch_unet(model.denoiser, every, name) for name in ("unet", "teacher", "fake")
        )
        self.head = TorchHead(16, 4)
        tensors = weights.to_diffusers(
            {p: np.asarray(v) for p, v in component(every, "head").items()}
        )
        self.head.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()})
        self.alphas = diffusers.DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ).alphas_cumprod.double()

    def noise(self, stream):
        return to_torch(normal_like(fold_keys(self._keys, stream), self._like))

    def times(self, stream, low=0, high=1000):
        keys = fold_keys(self._keys, stream)
        drawn = jax.vmap(lambda key: jax.random.randint(key, (), low, high))(keys)
        return torch.from_numpy(np.array(drawn)).long()

    def noised(self, x, t, noise):
        a = self.alphas[t].view(-1, 1, 1, 1)
        return (a.sqrt() * x + (1 - a).sqrt() * noise).float()

    def x0(self, out, x, t):
        a = self.alphas[t].view(-1, 1, 1, 1)
        if self.prediction == "epsilon":
            return ((x - (1 - a).sqrt() * out) / a.sqrt()).float()
        return (a.sqrt() * x - (1 - a).sqrt() * out).float()

    def drawn(self):
        x = self.noise(dmd.STATES)
        for i in range(self.last):
            t = torch.full((B,), GRID[i])
            with torch.no_grad():
                made = self.x0(self.student(x, t, encoder_hidden_states=self.text).sample, x, t)
            x = self.noised(made, torch.full((B,), GRID[i + 1]), self.noise(dmd.STATES + i + 1))
        t = torch.full((B,), GRID[self.last])
        return self.x0(self.student(x, t, encoder_hidden_states=self.text).sample, x, t)

    def logits(self, x, stream):
        t, found = self.times(stream), []
        hook = self.fake.mid_block.register_forward_hook(lambda m, a, out: found.append(out))
        self.fake(self.noised(x, t, self.noise(stream + 1)), t, encoder_hidden_states=self.text)
        hook.remove()
        return self.head(found[0])

    def student_loss(self):
        x = self.drawn()
        t = self.times(dmd.LEVEL, 20, 981)
        with torch.no_grad():
            xt = self.noised(x, t, self.noise(dmd.LEVEL + 1))
            said, unsaid = (
                self.teacher(xt, t, encoder_hidden_states=c).sample for c in (self.text, self.null)
            )
            real = self.x0(unsaid + self.config.teacher_guidance * (said - unsaid), xt, t)
            fake = self.x0(self.fake(xt, t, encoder_hidden_states=self.text).sample, xt, t)
            p_real, p_fake = x - real, x - fake
            grad = (p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True)
            grad = torch.nan_to_num(grad)
        matching = 0.5 * ((x - (x - grad).detach()) ** 2).mean(dim=(1, 2, 3))
        gan = torch.nn.functional.softplus(-self.logits(x, dmd.JUDGED))
        return matching + self.config.gan_weight * gan

    def fake_loss(self):
        x = self.drawn().detach()
        t, eps = self.times(dmd.LEVEL), self.noise(dmd.LEVEL + 1)
        a = self.alphas[t].view(-1, 1, 1, 1)
        wanted = eps
        if self.prediction == "v_prediction":
            wanted = (a.sqrt() * eps - (1 - a).sqrt() * x).float()
        out = self.fake(self.noised(x, t, eps), t, encoder_hidden_states=self.text).sample
        softplus = torch.nn.functional.softplus
        head = softplus(self.logits(x, dmd.JUDGED)) + softplus(-self.logits(self.real, dmd.REAL))
        return ((out - wanted) ** 2).mean(dim=(1, 2, 3)) + self.config.head_weight * head


@pytest.mark.slow
def test_each_phase_at_its_steps_and_a_kill_within_a_cycle(config, tmp_path):
    """D11: the student at steps 1 and 4 of 3 to a cycle, on 8 devices; killed before step 3."""
    config.train.update(steps=5, keep_last=9)
    config.data.batch_size = 8
    whole = on_devices(config, tmp_path / "whole")
    for step, row in rows(whole).items():
        assert row["train/phases/fake/grad_norm"] > 0
        moves = row["train/phases/student/grad_norm"]
        assert moves > 0 if step in (1, 4) else moves == "NaN"
    states = [state_of(whole, step) for step in (1, 3, 4)]
    for i, same in ((0, True), (1, False)):
        for part, moved in (("unet", not same), ("fake", True), ("head", True)):
            before, after = states[i], states[i + 1]
            names = [n for n in before if n.startswith(f"params/{part}.") and "bias" not in n]
            assert names and all(
                np.array_equal(before[n], after[n]) != moved for n in names
            ), (part, i)  # fmt: skip

    killed = on_devices(config, tmp_path / "killed", kill=3)
    assert max(rows(killed), default=0) < 3
    on_devices(config, killed)
    assert_same_state(whole, killed, 5)
    other = rows(on_devices(config, tmp_path / "split", mesh="2,4"))
    for step, row in rows(whole).items():
        names = ["train/loss", "train/phases/fake/grad_norm"]
        names += ["train/phases/student/loss"] if step in (1, 4) else []
        for name in names:
            np.testing.assert_allclose(row[name], other[step][name], rtol=2e-4, err_msg=name)


def test_a_run_is_drawn_by_lcm_at_its_timesteps(config, tmp_path, tiny_model):
    config.train.update(export=True)
    assert loop.run(resolve(config), str(tmp_path / "run")) == loop.DONE
    references = json.loads((tmp_path / "run" / "frozen.json").read_text())
    assert (references["teacher"]["network"], references["teacher"]["path"]) == (
        "unet", str(tiny_model),
    )  # fmt: skip
    assert not (tmp_path / "run" / "frozen.safetensors").exists()
    folder = tmp_path / "run" / "diffusers"
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline.scheduler, LCMScheduler)
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == GRID
    for found in (read_any(folder), read_any(tmp_path / "run")):
        assert (found.sampler.name, found.sampler.steps) == ("lcm", 4)
        assert found.sampler.original_steps == 100
        assert {p.split(".")[0] for p in found.params} == {"unet", "vae", "text_encoder"}


def test_without_a_head_its_parameters_are_gone(config):
    config.method.gan_weight = 0.0
    _, method, every = bound(config)
    assert not [path for path in method.abstract if path.startswith("head.")]
    assert {p.split(".")[0] for p in every if method.trainable(p)} == {"unet", "fake"}


def test_fake_and_teacher_begin_as_the_model(config):
    _, method, every = bound(config)
    for name in ("fake", "teacher"):
        own = component(every, name)
        assert own.keys() == component(every, "unet").keys()
        for path, value in own.items():
            np.testing.assert_array_equal(value, every[f"unet.{path}"])
    fake, student = method.phases
    assert (fake.every, student.every) == (1, 3)
    assert not any(fake.trains(p) or student.trains(p) for p in every if p.startswith("teacher."))


def test_a_lora_is_trained_beside_its_teacher(tiny_config, tiny_model, tmp_path):
    config = recipe(tiny_config, tiny_model, "dmd_lora")
    config.method.update(rank=2, fake_rate=0.5)
    config.train.update(export=True)
    _, method, every = bound(config)
    fake, student = method.phases
    assert (fake.every, student.every) == (1, 3)
    trained = [path for path in method.abstract if student.trains(path)]
    assert len(trained) > 20 and all(MARK in path for path in trained)
    assert {fake.rate(p) for p in method.abstract if fake.trains(p)} == {0.5}
    assert "teacher" not in {path.split(".")[0] for path in method.abstract}
    assert loop.run(resolve(config), str(tmp_path / "run")) == loop.DONE
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").exists()
    references = json.loads((tmp_path / "run" / "frozen.json").read_text())
    assert references["unet"]["path"] == str(tiny_model)
    assert read_any(tmp_path / "run").sampler.original_steps == 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.objective.update(loss="huber"), "objective.loss is 'huber'"),
        (lambda c: c.sample.sampler.update(name="ddim"), "sample.sampler.name is 'ddim'"),
        (lambda c: c.sample.sampler.update(original_steps=50), "original_steps is 50; .* with 100"),
        (lambda c: c.method.update(student_steps=2), "sample.sampler.steps is 4; .* with 2"),
        (lambda c: c.data.buckets.update(step=8), "data.buckets.step is 8 with method.gan_weight"),
    ],
)
def test_what_the_student_cannot_do_is_refused(change, words, config):
    change(config)
    with pytest.raises(UserError, match=words):
        bound(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("student_steps", 0), ("student_steps", 9), ("teacher_guidance", 0.5),
        ("fake_updates", 0), ("fake_rate", 0.0), ("gan_weight", -1.0), ("head_weight", 0.0),
    ],
)  # fmt: skip
def test_fields_out_of_their_range_are_named(field, value, config):
    config.method[field] = value
    with pytest.raises(ConfigError, match=f"method.{field} is {value}; expected"):
        resolve(config)


def test_a_lora_that_would_change_the_text_is_refused():
    with pytest.raises(ValueError, match="read the same text"):
        DMDLoRAConfig(text_targets=("attention",))
    assert dataclasses.asdict(DMDLoRAConfig())["teacher_guidance"] == 8.0
