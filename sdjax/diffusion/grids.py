"""The points where a sampler evaluates the network, as timesteps and noise levels.

They are computed in float64 on the host.

Grids follow the diffusers schedulers of the same name, point by point, with four differences:

- A step always goes to the next point of the grid. (DDIM and PNDM of diffusers step by T // steps,
  which leaves the grid for "linspace" and for step counts that do not divide T.)
- steps_offset is lowered where it would point past the end of the table.
- "trailing" has as many points as steps. (For 61, 103, 121 and other numbers of steps, rounding
  makes diffusers evaluate the network once more, at timestep -1.)
- A single step of "linspace" begins at the noisiest timestep, not at 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.diffusion import consistency
from sdjax.diffusion.flow_levels import FlowConfig, flow_levels, karras_levels
from sdjax.diffusion.schedules import MOST_TIMESTEPS, Schedule
from sdjax.errors import UserError
from sdjax.system.untrusted import brief

SAMPLERS = (
    "ddpm",
    "ddim",
    "pndm",
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_2m",
    "unipc",
    "lcm",
    "flow_euler",
)
SPACINGS = ("leading", "trailing", "linspace")

# These samplers work on sigma/alpha, end at 0 and interpolate the table of the schedule.
# ddpm, ddim, pndm and lcm visit entries of the table only.
_SIGMA_SAMPLERS = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc")
_KARRAS_SAMPLERS = ("euler", "heun", "dpmpp_2m", "unipc")
_MULTISTEP = ("dpmpp_2m", "unipc")
_CLIPPING_SAMPLERS = ("ddpm", "ddim", "heun")  # as in diffusers
# Keeps sigma/alpha finite where alpha is 0 (the value of scheduling_euler_discrete.py).
_LEAST_ALPHAS_CUMPROD = 2.0**-24
_MOST_RANGE = 1e6


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """The settings of a sampler; by default, DDIM as in the Stable Diffusion 1 and 2 pipelines.

    name: one of SAMPLERS; "flow_euler" is for flow schedules, all others for table schedules.
    steps: solver steps; network evaluations too, except for heun (2 * steps - 1) and pndm (one more
      where there are two or more steps).
    spacing: "leading" (multiples of T // steps, plus steps_offset), "trailing" (from T - 1, for
      zero-terminal-SNR schedules and FLUX) or "linspace"; flow_euler takes "leading" as "linspace".
    steps_offset: added to each timestep of "leading".
    eta: noise of ddim, 0 (none) to 1 (as much as ddpm).
    karras: the noise levels of Karras et al. 2022, eq. 5 (euler, heun, dpmpp_2m, unipc).
    set_alpha_to_one: ddim and pndm end at alpha = 1, not at the table's first alpha as SD does.
    clip_sample: limit each estimate of x0 to +-clip_sample_range (ddpm, ddim, heun).
    clip_sample_range: that limit.
    original_steps: the points of the grid that an LCM is distilled on, of which lcm takes `steps`.
    distilled: the model was distilled to so many steps, and draws guided pictures by itself.
    flow: the levels of flow_euler.

    Raises UserError where a field is out of its range or does not go with `name`.
    """

    name: str = "ddim"
    steps: int = 50
    spacing: str = "leading"
    steps_offset: int = 1
    eta: float = 0.0
    karras: bool = False
    set_alpha_to_one: bool = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    original_steps: int = 50
    distilled: bool = False
    flow: FlowConfig = FlowConfig()

    @property
    def few_steps(self) -> bool:
        """Whether it draws models that were distilled, which want no guidance on top."""
        return self.distilled or self.name == "lcm"

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise UserError(
                f"sampler.name is {brief(self.name)}; expected one of {', '.join(SAMPLERS)}"
            )
        if self.spacing not in SPACINGS:
            raise UserError(
                f"sampler.spacing is {brief(self.spacing)}; expected one of {', '.join(SPACINGS)}"
            )
        for field, least in (("steps", 1), ("steps_offset", 0), ("original_steps", 1)):
            value = getattr(self, field)
            if not least <= value <= MOST_TIMESTEPS:
                raise UserError(
                    f"sampler.{field} is {brief(value)}; expected {least} to {MOST_TIMESTEPS:,}"
                )
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"sampler.eta is {brief(self.eta)}; expected 0 to 1")
        if self.eta and self.name != "ddim":
            raise UserError(
                f"sampler.eta is {self.eta} with sampler {self.name!r}; "
                "only 'ddim' has eta, set it to 0"
            )
        if self.karras and self.name not in _KARRAS_SAMPLERS:
            raise UserError(
                f"sampler.karras is True with sampler {self.name!r}; "
                f"only {', '.join(_KARRAS_SAMPLERS)} can use it"
            )
        if self.clip_sample and self.name not in _CLIPPING_SAMPLERS:
            raise UserError(
                f"sampler.clip_sample is True with sampler {self.name!r}; "
                f"only {', '.join(_CLIPPING_SAMPLERS)} can use it"
            )
        if not 0.0 < self.clip_sample_range <= _MOST_RANGE:
            raise UserError(
                f"sampler.clip_sample_range is {brief(self.clip_sample_range)}; expected above 0, "
                f"at most {_MOST_RANGE:g}"
            )
        if self.flow != FlowConfig() and self.name != "flow_euler":
            raise UserError(
                f"sampler.flow is set with sampler {self.name!r}; only 'flow_euler' can use it"
            )


def changed_sampler(own: SamplerConfig, changes: Mapping[str, Any]) -> SamplerConfig:
    """Return the sampler `own` of a model with the fields in `changes` replaced.

    With another `name`, the fields that not every sampler has go back to their defaults.
    clip_sample is an exception: another sampler that has it keeps it.
    Raises UserError where the result is not a valid SamplerConfig.
    """
    name = changes.get("name", own.name)
    if name != own.name:
        clips = own.clip_sample and name in _CLIPPING_SAMPLERS
        changes = {
            "eta": 0.0,
            "karras": False,
            "clip_sample": clips,
            "flow": FlowConfig(),
            **changes,
        }
    return dataclasses.replace(own, **changes)


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The points a sampler visits, noisiest first; the last one is where it ends.

    timesteps: [n] float64, the timesteps of points 0 .. n-1, where the network is evaluated.
    alpha, sigma: [n + 1] float64.
    init_scale: the factor of the standard normal noise that sampling starts from.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    init_scale: float = 1.0

    def window(self, first: int, last: int) -> Grid:
        """Return the points of the steps first <= i < last, with the point where they end."""
        return dataclasses.replace(
            self,
            timesteps=self.timesteps[first:last],
            alpha=self.alpha[first : last + 1],
            sigma=self.sigma[first : last + 1],
        )


def make_grid(schedule: Schedule, sampler: SamplerConfig, tokens: int = 0) -> Grid:
    """The grid of `sampler` on `schedule`; UserError where the two do not go together.

    tokens: of the picture, which decide a dynamic shift; 0 stands for the base.
    """
    if schedule.continuous != (sampler.name == "flow_euler"):
        kind = schedule.config.kind
        expected = "'flow_euler'" if schedule.continuous else "any sampler but 'flow_euler'"
        raise UserError(
            f"sampler.name is {sampler.name!r}, but schedule.kind is {kind!r}; expected {expected}"
        )
    if schedule.continuous:
        return _flow_grid(schedule, sampler, tokens)
    timesteps = spaced_timesteps(sampler, schedule.num_train_timesteps)
    if sampler.name in _SIGMA_SAMPLERS:
        return _sigma_grid(schedule, sampler, timesteps)
    index = timesteps.astype(np.int64)
    to_one = sampler.name in ("ddpm", "lcm") or sampler.set_alpha_to_one
    end = (1.0, 0.0) if to_one else (schedule.alpha64[0], schedule.sigma64[0])
    return Grid(
        timesteps,
        np.append(schedule.alpha64[index], end[0]),
        np.append(schedule.sigma64[index], end[1]),
    )


def spaced_timesteps(sampler: SamplerConfig, num_train_timesteps: int) -> np.ndarray:
    """The timesteps of the steps, [steps] float64, descending (Table 2 of Lin et al. 2023).

    They are integers except for the linspace of euler and heun.
    The multistep solvers place one point more and leave out the last.
    Raises UserError where the schedule has too few timesteps.
    """
    steps, last = sampler.steps, num_train_timesteps - 1
    if sampler.name == "lcm":
        grid = consistency.sampling_grid(steps, sampler.original_steps, num_train_timesteps)
        return grid.astype(np.float64)
    points = steps + (sampler.name in _MULTISTEP)
    if (points if sampler.spacing == "leading" else steps) > num_train_timesteps:
        raise UserError(
            f"sampler.steps is {steps}; expected at most {num_train_timesteps - (points - steps)} "
            f"for {sampler.name!r} on a schedule of {num_train_timesteps} timesteps"
        )
    if sampler.spacing == "trailing":
        # T * (1 - i / steps) differs in the last bit, which decides how halves are rounded. This
        # is the expression of diffusers.
        return np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / steps)[:steps]) - 1
    if sampler.spacing == "leading":
        grid = np.arange(points - 1, points - 1 - steps, -1) * float(num_train_timesteps // points)
        return grid + min(sampler.steps_offset, last - grid[0])
    if points == 1:
        return np.array([float(last)])
    grid = np.linspace(0.0, last, points)[::-1][:steps]
    return grid if sampler.name.startswith(("euler", "heun")) else np.round(grid)


def _sigma_grid(schedule: Schedule, sampler: SamplerConfig, timesteps: np.ndarray) -> Grid:
    """The points of the samplers that work on the ratio k = sigma/alpha, ending at k = 0."""
    alphas_cumprod = schedule.alphas_cumprod.copy()
    if alphas_cumprod[-1] == 0.0:
        alphas_cumprod[-1] = _LEAST_ALPHAS_CUMPROD
    table = np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)
    all_timesteps = np.arange(len(table))
    ratio = np.interp(timesteps, all_timesteps, table)
    if sampler.karras:
        multistep = sampler.name in _MULTISTEP
        highest, lowest = (table[-1], table[0]) if multistep else (ratio[0], ratio[-1])
        ratio = karras_levels(highest, lowest, sampler.steps)
        timesteps = np.interp(np.log(ratio), np.log(table), all_timesteps)
        timesteps = np.round(timesteps) if multistep else timesteps
    ratio = np.append(ratio, 0.0)
    alpha = 1.0 / np.sqrt(1.0 + ratio**2)
    sigma = ratio * alpha
    # With "leading", sampling starts from noise with the variance of xt; otherwise from the noise
    # part of xt alone (init_noise_sigma in diffusers). The multistep solvers always do the former.
    starts_below_one = sampler.spacing != "leading" and sampler.name not in _MULTISTEP
    return Grid(timesteps, alpha, sigma, float(sigma[0]) if starts_below_one else 1.0)


def _flow_grid(schedule: Schedule, sampler: SamplerConfig, tokens: int) -> Grid:
    """The grid of a flow schedule; see `flow_levels`."""
    sigma = flow_levels(
        schedule.config,
        sampler.steps,
        sampler.flow,
        trailing=sampler.spacing == "trailing",
        tokens=tokens or sampler.flow.base_tokens,
    )
    timesteps = sigma * schedule.num_train_timesteps
    sigma = np.append(sigma, 0.0)
    return Grid(timesteps, 1.0 - sigma, sigma)
