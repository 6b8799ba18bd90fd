"""Noise schedules as alpha(t), sigma(t) with xt = alpha * x0 + sigma * eps.

Tables are computed in float64 on the host and rounded once to float32 for the device; a cumulative
product in half precision would be off by a third at the last timestep.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.system.untrusted import brief

DISCRETE_KINDS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
KINDS = (*DISCRETE_KINDS, "flow")
MOST_TIMESTEPS = 100_000  # a hundred times as many as any model has
_MOST_SCALE = 1e6


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The settings of a noise schedule. The defaults are those of Stable Diffusion 1 and 2.

    kind: "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid" (tables over integer timesteps,
      variance preserving) or "flow" (rectified flow: alpha = 1 - t/T, sigma = t/T, t real).
    beta_start, beta_end: ends of the beta range (unused by squaredcos_cap_v2 and flow).
    num_train_timesteps: T, the length of the table.
    zero_terminal_snr: rescale the table so that the last timestep is pure noise
      (Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", alg. 1).
    snr_scale: multiplies the signal-to-noise ratio at every timestep; (64 / latent side)**2 keeps
      the noise of a 512 px model at other resolutions (Hoogeboom 2023, "simple diffusion").
    shift: timestep shift of a flow schedule (SD3: 3.0), used both in training and in sampling.

    Raises ValueError where a field is out of its range or does not go with another.
    """

    kind: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    zero_terminal_snr: bool = False
    snr_scale: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"schedule.kind is {brief(self.kind)}; expected one of {', '.join(KINDS)}"
            )
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ValueError(
                f"schedule.beta_start is {brief(self.beta_start)} and schedule.beta_end "
                f"{brief(self.beta_end)}; "
                "expected 0 < beta_start <= beta_end < 1"
            )
        if not 2 <= self.num_train_timesteps <= MOST_TIMESTEPS:
            raise ValueError(
                f"schedule.num_train_timesteps is {brief(self.num_train_timesteps)}; expected 2 to "
                f"{MOST_TIMESTEPS:,}"
            )
        for name in ("snr_scale", "shift"):
            value = getattr(self, name)
            if not 0 < value <= _MOST_SCALE:
                raise ValueError(
                    f"schedule.{name} is {brief(value)}; expected above 0, at most {_MOST_SCALE:g}"
                )
        self._check_combination()

    def _check_combination(self) -> None:
        if self.kind == "flow":
            if self.zero_terminal_snr:
                raise ValueError(
                    "schedule.zero_terminal_snr is True with kind 'flow', which ends in pure noise "
                    "already; set zero_terminal_snr to False"
                )
            if self.snr_scale != 1.0:
                raise ValueError(
                    f"schedule.snr_scale is {self.snr_scale} with kind 'flow'; use schedule.shift"
                )
        elif self.shift != 1.0:
            raise ValueError(
                f"schedule.shift is {self.shift} with kind {self.kind!r}; only kind 'flow' is "
                "shifted, set shift to 1 or use snr_scale"
            )
        if self.zero_terminal_snr and self.snr_scale != 1.0:
            raise ValueError(
                f"schedule.snr_scale is {self.snr_scale} together with zero_terminal_snr; "
                "choose one of the two"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule as tables over t = 0 .. T-1: float64 for the host, float32 for the device.

    A flow schedule is continuous; its tables are its values at the integer timesteps.
    """

    config: ScheduleConfig
    alpha64: np.ndarray  # [T] float64
    sigma64: np.ndarray  # [T] float64
    alpha: np.ndarray  # [T] float32
    sigma: np.ndarray  # [T] float32

    @property
    def num_train_timesteps(self) -> int:
        return self.config.num_train_timesteps

    @property
    def continuous(self) -> bool:
        return self.config.kind == "flow"

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """The squares alpha**2, [T] float64, by the name that the diffusers schedulers use."""
        return self.alpha64**2


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The noise schedule of `config`, with its tables computed."""
    if config.kind == "flow":
        sigma = np.arange(config.num_train_timesteps, dtype=np.float64) / config.num_train_timesteps
        alpha = 1.0 - sigma
    else:
        alpha = np.sqrt(np.cumprod(1.0 - _betas(config)))
        if config.zero_terminal_snr:
            alpha = _to_zero_terminal_snr(alpha)
        alphas_cumprod = alpha**2
        if config.snr_scale != 1.0:
            # SNR' = c SNR, so ab' = c ab / (c ab + 1 - ab)
            scaled = config.snr_scale * alphas_cumprod
            alphas_cumprod = scaled / (scaled + 1.0 - alphas_cumprod)
            alpha = np.sqrt(alphas_cumprod)
        sigma = np.sqrt(1.0 - alphas_cumprod)
    return Schedule(config, alpha, sigma, alpha.astype(np.float32), sigma.astype(np.float32))


def schedule_at(schedule: Schedule, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pair alpha, sigma at timesteps t, each float32 of t's shape.

    t: integer-valued in [0, T) for a table schedule (any dtype), real in [0, T] for flow.
    A timestep outside the table gives NaN rather than a silently clamped value.
    """
    if schedule.continuous:
        sigma = jnp.asarray(t, jnp.float32) / schedule.num_train_timesteps
        return 1.0 - sigma, sigma
    index = jnp.asarray(t).astype(jnp.int32)
    # A negative index would count from the end.
    index = jnp.where(index < 0, schedule.num_train_timesteps, index)

    def look_up(table: np.ndarray) -> jax.Array:
        return jnp.asarray(table).at[index].get(mode="fill", fill_value=jnp.nan)

    return look_up(schedule.alpha), look_up(schedule.sigma)


def shift_noise_level(level, shift: float):
    """The shifted noise level s*l / (1 + (s-1)*l) of l = t/T in [0, 1] (SD3, eq. 23)."""
    return shift * level / (1.0 + (shift - 1.0) * level)


def token_shift(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Return mu, linear in the number of tokens of a picture; FLUX shifts by exp(mu).

    Tokens are (H/16)(W/16) with an f8 VAE and 2x2 patches (diffusers pipeline_flux.py,
    calculate_shift).
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (tokens - base_tokens)


def _betas(config: ScheduleConfig) -> np.ndarray:
    """The betas of a table schedule, [T] float64, as in diffusers scheduling_ddpm.py."""
    start, end, steps = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.kind == "linear":
        return np.linspace(start, end, steps, dtype=np.float64)
    if config.kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
    if config.kind == "sigmoid":
        return (end - start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, steps))) + start
    # Nichol & Dhariwal 2021, eq. 17, with betas capped at 0.999.
    edges = np.arange(steps + 1, dtype=np.float64) / steps
    alpha_bar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _to_zero_terminal_snr(alpha: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alphas_cumprod) so that it keeps its start and ends at exactly 0."""
    return (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
