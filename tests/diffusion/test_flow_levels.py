"""Noise levels of flow_euler against diffusers' FlowMatchEulerDiscreteScheduler."""

import numpy as np
import pytest

from sdjax.diffusion.flow_levels import FlowConfig
from sdjax.diffusion.grids import SamplerConfig, changed_sampler, make_grid
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.errors import UserError

diffusers = pytest.importorskip("diffusers")
STEPS = range(1, 101)
FEW = (2, 3, 28, 100)
TOKENS = (256, 1024, 3952, 4096, 16384)
SPREADS = ("", "karras", "exponential", "beta")


def grid(steps, *, shift=1.0, tokens=0, trailing=False, **flow):
    sampler = SamplerConfig(
        name="flow_euler",
        steps=steps,
        spacing="trailing" if trailing else "leading",
        flow=FlowConfig(**flow),
    )
    return make_grid(make_schedule(ScheduleConfig(kind="flow", shift=shift)), sampler, tokens)


def assert_same(ours, scheduler, steps):
    theirs = scheduler.sigmas.double().numpy()
    np.testing.assert_allclose(ours.sigma, theirs, atol=1e-6, rtol=0, err_msg=f"{steps} steps")
    timesteps = scheduler.timesteps.double().numpy()
    np.testing.assert_allclose(ours.timesteps, timesteps, atol=1e-3, rtol=0)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("terminal", [0.0, 0.1])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_of_a_fixed_shift_are_those_of_diffusers(shift, terminal, spread):
    options = {f"use_{spread}_sigmas": True} if spread else {}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=shift, shift_terminal=terminal or None, **options
    )
    for steps in STEPS:
        if steps == 1 and terminal:  # the reference divides 0 by 0
            assert grid(1, shift=shift, terminal=terminal, spread=spread).sigma.tolist() == [1, 0]
            continue
        scheduler.set_timesteps(steps)
        ours = grid(steps, shift=shift, terminal=terminal, spread=spread)
        assert_same(ours, scheduler, steps)


@pytest.mark.parametrize("dynamic", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_levels_of_a_dynamic_shift_are_those_of_diffusers(tokens, dynamic):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    for terminal, spread in ((0.0, ""), (0.02, ""), (0.0, "karras"), (0.0, "beta")):
        options = {f"use_{spread}_sigmas": True} if spread else {}
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, time_shift_type=dynamic,
            shift_terminal=terminal or None, **options,
        )  # fmt: skip
        for steps in FEW if terminal or spread else STEPS:
            own = {"tokens": tokens, "dynamic": dynamic, "terminal": terminal, "spread": spread}
            scheduler.set_timesteps(steps, mu=mu)
            assert_same(grid(steps, **own), scheduler, steps)
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            assert_same(grid(steps, trailing=True, **own), scheduler, steps)


def test_known_levels_of_releases():
    sd3 = grid(28, shift=3.0).sigma
    np.testing.assert_allclose(sd3[[1, 14, 27, 28]], [0.987381, 0.737056, 0.008929, 0], atol=1e-6)
    np.testing.assert_allclose(sd3.sum(), 18.8039255, atol=1e-6)
    flux = grid(28, trailing=True, dynamic="exponential", tokens=4096).sigma
    np.testing.assert_allclose(flux[[1, 14, 27]], [0.988409, 0.759511, 0.104721], atol=1e-6)
    np.testing.assert_allclose(flux.sum(), 19.6323360, atol=1e-6)
    small = grid(28, trailing=True, dynamic="exponential", tokens=1024).sigma
    np.testing.assert_allclose(small.sum(), 17.3976456, atol=1e-6)
    np.testing.assert_allclose(grid(4, trailing=True).sigma, [1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dynamic": "cubic"}, "flow.dynamic is 'cubic'"),
        ({"spread": "even"}, "flow.spread is 'even'"),
        ({"terminal": 1.0}, "flow.terminal is 1.0"),
        ({"base_tokens": 4096}, "base_tokens is 4096 and max_tokens 4096"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"max_shift": float("nan")}, "max_shift is nan"),
    ],
)
def test_bad_field_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        FlowConfig(**fields)


def test_levels_belong_to_flows_alone():
    with pytest.raises(UserError, match="only 'flow_euler' can use it"):
        SamplerConfig(flow=FlowConfig(stochastic=True))
    own = SamplerConfig(name="flow_euler", flow=FlowConfig(dynamic="exponential"))
    assert changed_sampler(own, {"name": "ddim"}).flow == FlowConfig()
    assert changed_sampler(own, {"steps": 4}).flow == own.flow
    with pytest.raises(UserError, match="a picture of 1 tokens by -"):
        FlowConfig(dynamic="linear", base_shift=-1.0).shift(1)
