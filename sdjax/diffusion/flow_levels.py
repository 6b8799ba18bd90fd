"""The noise levels that a sampler of a flow visits, as diffusers places them.

Source: scheduling_flow_match_euler_discrete.py of diffusers 0.42, `set_timesteps`. Levels are even
at first, then shifted towards the noise, stretched, and spread anew between their ends. Even levels
between the ends of the training table are shifted twice at the lower end, which the reference does.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from sdjax.diffusion.schedules import ScheduleConfig, shift_noise_level, token_shift
from sdjax.errors import UserError
from sdjax.system.untrusted import brief

DYNAMIC = ("", "exponential", "linear")
SPREADS = ("", "karras", "exponential", "beta")
_MOST = 1e6


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """The levels of flow_euler; the defaults are those of Stable Diffusion 3.

    dynamic: "" shifts by schedule.shift; "exponential" and "linear" shift by exp(mu) and by mu,
      which is linear in the number of tokens of the picture (FLUX: "exponential").
    base_shift, max_shift: mu for base_tokens and for max_tokens.
    base_tokens, max_tokens: see there; beyond them the line goes on.
    patch_size: latents along each side of a token.
    terminal: the last level with noise, to which the others are stretched; 0 leaves them.
    spread: "" leaves the levels as they are shifted; "karras" (Karras et al. 2022, eq. 5),
      "exponential" (even in the logarithm) and "beta" (arXiv 2407.12173) keep their ends alone.
    stochastic: go to each level with fresh noise.

    Raises UserError where a field is out of its range.
    """

    dynamic: str = ""
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    patch_size: int = 2
    terminal: float = 0.0
    spread: str = ""
    stochastic: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("dynamic", DYNAMIC), ("spread", SPREADS)):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"sampler.flow.{name} is {brief(getattr(self, name))}; expected one of "
                    + ", ".join(map(repr, allowed))
                )
        if not 0.0 <= self.terminal < 1.0:
            raise UserError(
                f"sampler.flow.terminal is {brief(self.terminal)}; expected 0 to below 1"
            )
        if not 0 < self.base_tokens < self.max_tokens <= _MOST:
            raise UserError(
                f"sampler.flow.base_tokens is {brief(self.base_tokens)} and max_tokens "
                f"{brief(self.max_tokens)}; expected 0 < base_tokens < max_tokens <= {_MOST:g}"
            )
        if not 1 <= self.patch_size <= _MOST:
            raise UserError(
                f"sampler.flow.patch_size is {brief(self.patch_size)}; expected 1 or more"
            )
        for name in ("base_shift", "max_shift"):
            if not abs(value := getattr(self, name)) <= 100:
                raise UserError(f"sampler.flow.{name} is {brief(value)}; expected -100 to 100")

    def tokens(self, height: int, width: int) -> int:
        """Return how many tokens latents of a height and a width are."""
        return (height // self.patch_size) * (width // self.patch_size)

    def shift(self, tokens: int) -> float:
        """Return the dynamic shift of a picture of so many tokens.

        Raises:
            UserError: it is not above 0.
        """
        mu = token_shift(
            tokens,
            base_tokens=self.base_tokens,
            max_tokens=self.max_tokens,
            base_shift=self.base_shift,
            max_shift=self.max_shift,
        )
        shift = math.exp(min(mu, 700.0)) if self.dynamic == "exponential" else mu
        if not shift > 0:
            raise UserError(
                f"sampler.flow shifts a picture of {tokens} tokens by {shift:g}; expected above 0: "
                "set sampler.flow.base_shift and max_shift, or dynamic to 'exponential'"
            )
        return shift


def flow_levels(
    schedule: ScheduleConfig, steps: int, flow: FlowConfig, *, trailing: bool, tokens: int
) -> np.ndarray:
    """Return the levels sigma of the steps, [steps] float64, from 1 down.

    Args:
        trailing: even levels are 1, 1 - 1/steps, ..., 1/steps, as FLUX's pipelines ask for; else
            they go from end to end of the training table, as SD3's.
        tokens: of the picture, for a dynamic shift.
    """
    shift = flow.shift(tokens) if flow.dynamic else schedule.shift
    least = 1.0 / schedule.num_train_timesteps
    if trailing:
        sigma = np.linspace(1.0, 1.0 / steps, steps)
    else:
        # The table of a dynamic schedule is not shifted.
        lowest = least if flow.dynamic else shift_noise_level(least, shift)
        sigma = np.linspace(1.0, lowest, steps)
    sigma = shift_noise_level(sigma, shift)
    if flow.terminal and steps > 1:  # a single level stays at 1
        sigma = 1.0 - (1.0 - sigma) * ((1.0 - flow.terminal) / (1.0 - sigma[-1]))
    return _spread(flow.spread, sigma) if flow.spread else sigma


def _spread(kind: str, sigma: np.ndarray) -> np.ndarray:
    """Levels between the ends of others, as many."""
    high, low, steps = sigma[0], sigma[-1], len(sigma)
    if kind == "karras":
        return karras_levels(high, low, steps)
    if kind == "exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    from scipy.special import betaincinv  # a step needs no SciPy

    return low + betaincinv(0.6, 0.6, 1.0 - np.linspace(0.0, 1.0, steps)) * (high - low)


def karras_levels(highest: float, lowest: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """The noise levels from highest to lowest, [steps], even in level**(1/rho).

    Source: Karras et al. 2022, eq. 5.
    """
    ramp = np.linspace(0.0, 1.0, steps)
    high, low = highest ** (1 / rho), lowest ** (1 / rho)
    return (high + ramp * (low - high)) ** rho
