"""Each sampler against the diffusers scheduler of the same name, on one small fixed network."""

from __future__ import annotations

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.diffusion.flow_levels import FlowConfig
from sdjax.diffusion.grids import SPACINGS, SamplerConfig, spaced_timesteps
from sdjax.diffusion.samplers import sample
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.errors import UserError

SHAPE = (2, 4, 4, 4)
CLASSES = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# name -> (prediction, zero terminal SNR, spacing, steps_offset)
SETTINGS = {
    "sd1": ("epsilon", False, "leading", 1),
    "sd2_v": ("v_prediction", False, "leading", 1),
    "zero_snr": ("v_prediction", True, "trailing", 1),
}

_random = np.random.default_rng(0)
WEIGHT = _random.normal(size=(4, 4)).astype(np.float32) / 2
TIME = _random.normal(size=4).astype(np.float32)
LATENTS = _random.normal(size=SHAPE).astype(np.float32)
NOISE = _random.normal(size=(101, *SHAPE)).astype(np.float32)


def jax_network(x, t):
    return jnp.tanh(x @ WEIGHT + (t / 1000)[:, None, None, None] * TIME) + 0.3 * x


def torch_network(x, t):
    weight, time = torch.from_numpy(WEIGHT).to(x.dtype), torch.from_numpy(TIME).to(x.dtype)
    return torch.tanh(x @ weight + t.to(x.dtype) / 1000 * time) + 0.3 * x


def run_diffusers(scheduler, steps, dtype=torch.float32, **step_arguments):
    """The denoising loop of a diffusers pipeline, on LATENTS."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.to(dtype)
    x = torch.from_numpy(LATENTS).to(dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        model_input = x
        if hasattr(scheduler, "scale_model_input"):
            model_input = scheduler.scale_model_input(x, t)
        x = scheduler.step(torch_network(model_input, t), t, x, **step_arguments).prev_sample
    return x.numpy()


def run_sdjax(schedule, prediction, config, noise_fn=lambda i: jnp.asarray(NOISE)[i]):
    run = jax.jit(
        lambda latents: sample(
            jax_network,
            latents,
            schedule=schedule,
            prediction_type=prediction,
            sampler=config,
            noise_fn=noise_fn,
        )[0]
    )
    return np.asarray(run(LATENTS))


@pytest.fixture
def same_noise(monkeypatch):
    """Makes the diffusers schedulers draw NOISE[0], NOISE[1], ..."""
    draws = iter(NOISE)

    def draw(shape, **_):
        assert tuple(shape) == SHAPE
        return torch.from_numpy(next(draws))

    for cls in ("ddpm", "ddim", "euler_ancestral_discrete", "flow_match_euler_discrete", "lcm"):
        module = getattr(diffusers.schedulers, f"scheduling_{cls}")
        monkeypatch.setattr(module, "randn_tensor", draw)


def reference(name, setting, **extra):
    """The diffusers scheduler for one of SETTINGS."""
    prediction, zero_snr, spacing, offset = SETTINGS[setting]
    arguments = {
        **SD,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "steps_offset": offset,
        **extra,
    }
    if name in ("ddpm", "ddim"):
        arguments.setdefault("clip_sample", False)
    if name == "ddim":
        arguments.setdefault("set_alpha_to_one", False)
    if name == "pndm":
        arguments["skip_prk_steps"] = True
    if name == "heun" and zero_snr:  # it has no rescaling of its own: give it what the others make
        alphas_cumprod = make_schedule(schedule_config(setting)).alphas_cumprod.copy()
        alphas_cumprod[-1] = 2.0**-24
        ratios = alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        arguments["trained_betas"] = list(1.0 - ratios)
    elif name not in ("heun", "pndm"):
        arguments["rescale_betas_zero_snr"] = zero_snr
    return CLASSES[name](**arguments)


def schedule_config(setting):
    return ScheduleConfig(zero_terminal_snr=SETTINGS[setting][1])


def difference(name, setting, steps, *, eta=0.0, **sampler_fields):
    """max |sdjax - diffusers| over the final latents."""
    prediction, _, spacing, offset = SETTINGS[setting]
    extra = {"use_karras_sigmas": True} if sampler_fields.get("karras") else {}
    for field in ("set_alpha_to_one", "clip_sample", "clip_sample_range"):
        if field in sampler_fields:
            extra[field] = sampler_fields[field]
    arguments = {"eta": eta} if eta else {}
    if name == "heun":
        # It starts from values of sigma / alpha = 4096 with a zero terminal SNR and does not return
        # to float32 itself: in float32 its own rounding error is up to 4e-3.
        arguments["dtype"] = torch.float64
    expected = run_diffusers(reference(name, setting, **extra), steps, **arguments)
    config = SamplerConfig(
        name=name, steps=steps, spacing=spacing, steps_offset=offset, eta=eta, **sampler_fields
    )
    got = run_sdjax(make_schedule(schedule_config(setting)), prediction, config)
    assert np.isfinite(expected).all()
    return np.abs(got - expected).max()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "pndm"])
def test_sampler_matches_diffusers(name, steps, setting, same_noise):
    assert difference(name, setting, steps) < 1e-4


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_karras_noise_levels_match_diffusers(name, steps, setting):
    assert difference(name, setting, steps, karras=True) < 1e-4


@pytest.mark.parametrize("setting", ["sd1", "sd2_v"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 30, 50])
def test_pndm_without_runge_kutta_steps_matches_diffusers(steps, setting):
    assert difference("pndm", setting, steps) < 1e-4
    if steps <= 5:
        assert difference("pndm", setting, steps, set_alpha_to_one=True) < 1e-4


@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0), ("heun", 0.0)])
@pytest.mark.parametrize("setting, limit", [("sd1", 1.0), ("sd2_v", 0.25), ("zero_snr", 0.5)])
def test_clipped_samples_match_diffusers(name, eta, setting, limit, same_noise):
    clipped = {"clip_sample": True, "clip_sample_range": limit}
    assert difference(name, setting, 10, eta=eta, **clipped) < 1e-4
    prediction, _, spacing, _ = SETTINGS[setting]
    config = SamplerConfig(name=name, steps=10, spacing=spacing, eta=eta)
    plain, cut = (
        run_sdjax(make_schedule(schedule_config(setting)), prediction, c)
        for c in (config, dataclasses.replace(config, **clipped))
    )
    assert np.abs(plain - cut).max() > 0.05, "nothing was clipped"


@pytest.mark.parametrize("setting", SETTINGS)
def test_ddim_with_noise_matches_diffusers(setting, same_noise):
    assert difference("ddim", setting, 20, eta=0.7) < 1e-4


@pytest.mark.parametrize("setting", SETTINGS)
def test_ddim_ending_at_alpha_one_matches_diffusers(setting):
    assert difference("ddim", setting, 20, set_alpha_to_one=True) < 1e-4


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("steps, original", [(1, 50), (4, 50), (8, 50), (4, 100)])
def test_lcm_matches_diffusers(steps, original, setting, same_noise):
    prediction, zero_snr, _, _ = SETTINGS[setting]
    scheduler = diffusers.LCMScheduler(
        **SD, prediction_type=prediction, rescale_betas_zero_snr=zero_snr,
        original_inference_steps=original,
    )  # fmt: skip
    expected = run_diffusers(scheduler, steps)
    sampler = SamplerConfig(name="lcm", steps=steps, original_steps=original)
    got = run_sdjax(make_schedule(schedule_config(setting)), prediction, sampler)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("original", [1, 7, 30, 50, 100, 1000])
def test_timesteps_of_lcm_equal_those_of_diffusers_for_every_number_of_steps(original):
    scheduler = diffusers.LCMScheduler(original_inference_steps=original)
    for steps in range(1, min(original, 120) + 1):
        scheduler.set_timesteps(steps)
        sampler = SamplerConfig(name="lcm", steps=steps, original_steps=original)
        np.testing.assert_array_equal(spaced_timesteps(sampler, 1000), scheduler.timesteps)
    with pytest.raises(UserError, match=f"sampler.steps is {original + 1}; expected at most"):
        spaced_timesteps(dataclasses.replace(sampler, steps=original + 1), 1000)


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc", "ddpm"])
def test_timestep_spacings_match_diffusers(name, spacing, same_noise, monkeypatch):
    """Also at 30 steps, which do not divide the 1000 timesteps."""
    monkeypatch.setitem(SETTINGS, "spaced", ("v_prediction", False, spacing, 0))
    assert difference(name, "spaced", 30) < 1e-4


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", CLASSES)
def test_timesteps_equal_those_of_diffusers_for_every_number_of_steps(name, spacing):
    scheduler = CLASSES[name](timestep_spacing=spacing, steps_offset=1)
    if name == "pndm":
        scheduler.register_to_config(skip_prk_steps=True)
    last = 1000
    if spacing == "leading":  # beyond, an offset of 1 points past the table
        last = 998 if name in ("dpmpp_2m", "unipc") else 999
    for steps in range(2 if spacing == "linspace" else 1, last + 1):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.double().numpy()
        if name == "pndm":
            theirs = np.delete(theirs, 1) if steps > 1 else theirs
        if name == "heun":
            theirs = theirs[::2]
        if spacing == "trailing" and len(theirs) > steps:  # it goes past the end, by rounding
            assert theirs[steps:] == [-1]
            theirs = theirs[:steps]
        sampler = SamplerConfig(name=name, steps=steps, spacing=spacing, steps_offset=1)
        ours = spaced_timesteps(sampler, 1000)
        np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0, err_msg=f"{steps} steps")


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_flow_euler_matches_diffusers(steps, shift):
    expected = run_diffusers(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), steps)
    schedule = make_schedule(ScheduleConfig(kind="flow", shift=shift))
    got = run_sdjax(schedule, "flow", SamplerConfig(name="flow_euler", steps=steps))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_stochastic_flow_euler_matches_diffusers(same_noise):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    expected = run_diffusers(scheduler, 10)
    schedule = make_schedule(ScheduleConfig(kind="flow", shift=3.0))
    sampler = SamplerConfig(name="flow_euler", steps=10, flow=FlowConfig(stochastic=True))
    np.testing.assert_allclose(run_sdjax(schedule, "flow", sampler), expected, atol=1e-5)


def test_dynamic_shift_counts_the_tokens_of_the_latents():
    flow = FlowConfig(dynamic="exponential", base_tokens=1, max_tokens=9)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=1, max_image_seq_len=9
    )
    steps, mu = 6, flow.base_shift + 3 / 8 * (flow.max_shift - flow.base_shift)  # 2 x 2 tokens
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda steps: set_timesteps(steps, mu=mu)
    expected = run_diffusers(scheduler, steps)
    schedule = make_schedule(ScheduleConfig(kind="flow"))
    got = run_sdjax(schedule, "flow", SamplerConfig(name="flow_euler", steps=steps, flow=flow))
    np.testing.assert_allclose(got, expected, atol=1e-5)
