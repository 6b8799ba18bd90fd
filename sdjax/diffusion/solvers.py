"""Every sampler as a table of coefficients.

All the samplers here are linear in the x0 that the network estimates at each point. The next state
is a weighted sum of the present state, an earlier state, the last three estimates and fresh noise.
A solver is a function from a grid to the weights, in float64. `samplers.py` has the one loop that
runs them all.

The state is always xt = alpha*x0 + sigma*eps. The literature of some solvers has y = xt/alpha with
noise k = sigma/alpha instead (Karras et al. 2022).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sdjax.diffusion.consistency import boundary
from sdjax.diffusion.grids import Grid, SamplerConfig, make_grid
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import UserError

# The terms of a step's sum: the state, a state kept from an earlier step ("base"), the x0 estimates
# of this evaluation and of the two before it, noise, and this estimate without clipping.
X, BASE, M0, M1, M2, NOISE, UNCLIPPED = range(7)
_TERMS = 7


@dataclasses.dataclass(frozen=True, eq=False)
class SolverPlan:
    """One row of coefficients per network evaluation, all float64 on the host.

    timesteps, alpha, sigma: [N], where the network is evaluated.
    to_x: [N, 7], coefficients of the next state; to_base: [N, 7], of the next base.
    init_scale: the factor of the standard normal noise that sampling starts from.
    mix: [N, K], weights of the network's output and of the K - 1 outputs before it. Their sum
      replaces the output; K is 0 where the output stays as it is.
    at_base: [N] bool, whether that sum is an output at the base instead of at the state.
    clip: the largest |x0| that an estimate may have; infinity where nothing is clipped.
    next_alpha, next_sigma: [N], the levels of the states after each evaluation; the last is clean.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    to_x: np.ndarray
    to_base: np.ndarray
    init_scale: float
    mix: np.ndarray
    at_base: np.ndarray
    clip: float
    next_alpha: np.ndarray
    next_sigma: np.ndarray

    @property
    def stochastic(self) -> bool:
        return bool(np.any(self.to_x[:, NOISE]))


def make_plan(
    schedule: Schedule,
    sampler: SamplerConfig,
    tokens: int = 0,
    window: tuple[int, int] | None = None,
) -> SolverPlan:
    """The coefficients of the whole loop of `sampler` on `schedule`.

    tokens: see `make_grid`.
    window: (first, last), to take the steps first <= i < last alone; solvers of several steps
      begin anew at the first.
    Raises UserError where sampler, schedule and window do not go together.
    """
    grid = make_grid(schedule, sampler, tokens)
    if window:
        grid = _window(grid, sampler, *window)
    steps = len(grid.timesteps)
    visits = points = np.arange(steps)
    to_base = np.zeros((steps, _TERMS))
    mix = np.zeros((steps, 0))
    if sampler.name == "heun":
        visits, to_x, to_base = _heun(grid)
        points, mix = visits, np.zeros((len(visits), 0))
    elif sampler.name == "pndm":
        visits, points, to_x, to_base, mix = _pndm(grid)
    elif sampler.name == "unipc":
        to_x, to_base = _unipc(grid)
    elif sampler.name == "ddpm":
        to_x = _ddpm(grid)
    elif sampler.name == "ddim":
        to_x = _ddim(grid, sampler.eta)
        if sampler.clip_sample:
            # Eq. 12 of Song et al. 2021 with x0 clipped and the network's own eps.
            to_x[:, UNCLIPPED] = -grid.alpha[:-1] * to_x[:, X]
            to_x[:, M0] = grid.alpha[1:]
    elif sampler.name == "euler_ancestral":
        to_x = _euler_ancestral(grid)
    elif sampler.name == "lcm":
        to_x = _lcm(grid)
    elif sampler.flow.stochastic:
        to_x = _renoised(grid)
    elif sampler.name == "dpmpp_2m":
        to_x = np.stack([_dpmpp_2m_row(grid, i) for i in range(steps)])
    else:
        to_x = np.stack([_first_order_row(grid, i) for i in range(steps)])
    return SolverPlan(
        timesteps=grid.timesteps[visits],
        alpha=grid.alpha[points],
        sigma=grid.sigma[points],
        to_x=to_x,
        to_base=to_base,
        init_scale=grid.init_scale,
        mix=mix,
        at_base=visits != points,
        clip=sampler.clip_sample_range if sampler.clip_sample else np.inf,
        next_alpha=np.append(grid.alpha[visits[1:]], 1.0),
        next_sigma=np.append(grid.sigma[visits[1:]], 0.0),
    )


def _window(grid: Grid, sampler: SamplerConfig, first: int, last: int) -> Grid:
    if not 0 <= first < last <= len(grid.timesteps):
        raise UserError(
            f"steps {first} to {last} of a sampler of {len(grid.timesteps)} steps leave nothing to "
            "do; take more steps, or another part of them"
        )
    if sampler.name in ("heun", "pndm") and last < len(grid.timesteps):
        raise UserError(
            f"sampler {sampler.name!r} cannot stop before its last step; take another sampler, as "
            "euler or dpmpp_2m"
        )
    return grid.window(first, last)


def _first_order_row(grid: Grid, i: int) -> np.ndarray:
    """The step from point i to i + 1 with eps held: xt = alpha*x0 + sigma*(x - alpha_i*x0)/sigma_i.

    This is DDIM without noise, Euler (in y and k), DPM-Solver++ of first order and Euler on a flow.
    """
    row = np.zeros(_TERMS)
    row[X] = grid.sigma[i + 1] / grid.sigma[i]
    row[M0] = grid.alpha[i + 1] - grid.alpha[i] * row[X]
    return row


def _posterior_variance(grid: Grid) -> np.ndarray:
    """The variance of x at point i+1 given x at point i and x0, [n] (Ho et al. 2020, eq. 7)."""
    ab = grid.alpha**2
    return (1.0 - ab[1:]) / (1.0 - ab[:-1]) * (1.0 - ab[:-1] / ab[1:])


def _ddpm(grid: Grid) -> np.ndarray:
    """The posterior mean and variance of Ho et al. 2020, eq. 6 and 7."""
    ab, ab_next = grid.alpha[:-1] ** 2, grid.alpha[1:] ** 2
    step_alpha = ab / ab_next
    to_x = np.zeros((len(ab), _TERMS))
    to_x[:, X] = np.sqrt(step_alpha) * (1.0 - ab_next) / (1.0 - ab)
    to_x[:, M0] = grid.alpha[1:] * (1.0 - step_alpha) / (1.0 - ab)
    to_x[:, NOISE] = np.sqrt(_posterior_variance(grid))
    return to_x


def _ddim(grid: Grid, eta: float) -> np.ndarray:
    """The generalised step of Song et al. 2021, eq. 12 and 16."""
    noise = eta * np.sqrt(_posterior_variance(grid))
    to_x = np.zeros((len(noise), _TERMS))
    to_x[:, X] = np.sqrt(grid.sigma[1:] ** 2 - noise**2) / grid.sigma[:-1]
    to_x[:, M0] = grid.alpha[1:] - grid.alpha[:-1] * to_x[:, X]
    to_x[:, NOISE] = noise
    return to_x


def _euler_ancestral(grid: Grid) -> np.ndarray:
    """An Euler step down to k_down, then noise up to k (k-diffusion, get_ancestral_step)."""
    ratio = grid.sigma / grid.alpha
    k, k_next = ratio[:-1], ratio[1:]
    k_up = k_next * np.sqrt(1.0 - (k_next / k) ** 2)
    shrink = (k_next / k) ** 2  # k_down / k
    to_x = np.zeros((len(k), _TERMS))
    to_x[:, X] = grid.alpha[1:] / grid.alpha[:-1] * shrink
    to_x[:, M0] = grid.alpha[1:] * (1.0 - shrink)
    to_x[:, NOISE] = grid.alpha[1:] * k_up
    return to_x


def _renoised(grid: Grid) -> np.ndarray:
    """The x0 that the network estimates, with fresh noise of the next level."""
    to_x = np.zeros((len(grid.timesteps), _TERMS))
    to_x[:, M0] = grid.alpha[1:]
    to_x[:, NOISE] = grid.sigma[1:]
    return to_x


def _lcm(grid: Grid) -> np.ndarray:
    """The x0 where the trajectory ends, with fresh noise of the next level (Luo et al. 2023)."""
    skip, out = boundary(grid.timesteps)
    to_x = np.zeros((len(grid.timesteps), _TERMS))
    to_x[:, X] = grid.alpha[1:] * skip
    to_x[:, M0] = grid.alpha[1:] * out
    to_x[:, NOISE] = grid.sigma[1:]
    return to_x


def _heun(grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Karras et al. 2022, algorithm 1 without churn: an Euler step, evaluated again at its end.

    Every step has two evaluations except the last, which ends at k = 0 and is plain Euler.
    """
    ratio = grid.sigma / grid.alpha
    visits, to_x, to_base = [], [], []
    for i in range(len(grid.timesteps)):
        keep = np.zeros(_TERMS)
        keep[X] = 1.0  # the state before the step is the base of its second half
        visits.append(i)
        to_x.append(_first_order_row(grid, i))
        to_base.append(keep)
        if ratio[i + 1] == 0.0:
            break
        # y' = y + (k'-k)/2 * ((y - m1)/k + (y_euler - m0)/k')
        half = (ratio[i + 1] - ratio[i]) / 2.0
        row = np.zeros(_TERMS)
        row[BASE] = (1.0 + half / ratio[i]) / grid.alpha[i]
        row[M1] = -half / ratio[i]
        row[X] = half / ratio[i + 1] / grid.alpha[i + 1]
        row[M0] = -half / ratio[i + 1]
        visits.append(i + 1)
        to_x.append(row * grid.alpha[i + 1])
        to_base.append(np.zeros(_TERMS))
    return np.array(visits), np.stack(to_x), np.stack(to_base)


# Adams-Bashforth of orders 2 to 4, newest output first (Liu et al. 2022, "PNDM", eq. 9 and 12).
_ADAMS_BASHFORTH = (
    np.array([3.0, -1.0]) / 2.0,
    np.array([23.0, -16.0, 5.0]) / 12.0,
    np.array([55.0, -59.0, 37.0, -9.0]) / 24.0,
)


def _pndm(grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Linear multistep without Runge-Kutta steps (`skip_prk_steps` of diffusers, "PLMS").

    The second evaluation, at the end of the first step, redoes that step with the mean of the two
    outputs, and is forgotten. The sums are of network outputs, converted to x0 afterwards.
    Returns (visits, points, to_x, to_base, mix), where row i goes from point points[i].
    """
    steps = len(grid.timesteps)
    visits = np.arange(steps) if steps == 1 else np.r_[0, 1, 1:steps]
    points = np.arange(steps) if steps == 1 else np.r_[0, 0, 1:steps]
    to_base = np.zeros((len(visits), _TERMS))
    to_base[0, X] = 1.0
    to_x, mix = np.zeros_like(to_base), np.zeros((len(visits), 5))
    for i, point in enumerate(points):
        to_x[i] = _first_order_row(grid, point)
        order = min(i, 4)
        if i == 0:
            mix[i, 0] = 1.0
        elif i == 1:
            mix[i, :2] = 0.5
            to_x[i, [X, BASE]] = to_x[i, [BASE, X]]
        else:
            # Evaluation 1 is forgotten.
            behind = [n for n in range(5) if i - n != 1][:order]
            mix[i, behind] = _ADAMS_BASHFORTH[order - 2]
    return visits, points, to_x, to_base, mix


def _log_snr_half(grid: Grid, i: int) -> float:
    """The value lambda = log(alpha/sigma) of point i."""
    return float(np.log(grid.alpha[i]) - np.log(grid.sigma[i]))


def _dpmpp_2m_row(grid: Grid, i: int) -> np.ndarray:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2 (midpoint); first order at either end."""
    row = _first_order_row(grid, i)
    if i == 0 or grid.sigma[i + 1] == 0.0:
        return row
    now = _log_snr_half(grid, i)
    h, h_before = _log_snr_half(grid, i + 1) - now, now - _log_snr_half(grid, i - 1)
    slope = 0.5 * row[M0] * h / h_before
    row[M0] += slope
    row[M1] -= slope
    return row


def _unipc_corrector(grid: Grid, i: int) -> np.ndarray:
    """Redo the step from point i-1 to i with the network's evaluation at i.

    Zhao et al. 2023, "UniPC", algorithm 1 with B(h) = exp(h) - 1, for the order the predictor of
    that step had: 1 for the first, 2 after. Here BASE is the corrected state at i-1.
    """
    row = np.zeros(_TERMS)
    first = _first_order_row(grid, i - 1)
    phi = first[M0]  # -alpha_i * expm1(-h)
    row[BASE], row[M1] = first[X], phi
    if i == 1:
        row[M0] += 0.5 * phi
        row[M1] -= 0.5 * phi
        return row
    before = _log_snr_half(grid, i - 1)
    h = _log_snr_half(grid, i) - before
    r = (_log_snr_half(grid, i - 2) - before) / h
    scale = np.expm1(-h)
    b_first = scale / -h - 1.0
    b_second = b_first / -h - 0.5
    matrix = np.array([[1.0, 1.0], [r, 1.0]])
    rho = np.linalg.solve(matrix, np.array([b_first, 2.0 * b_second]) / scale)
    for slot, weight in ((M2, rho[0] / r), (M0, rho[1])):
        row[slot] += phi * weight
        row[M1] -= phi * weight
    return row


def _unipc(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """UniPC-2: correct the state at each point, then predict the next as DPM-Solver++ 2M does."""
    to_x, to_base = [], []
    for i in range(len(grid.timesteps)):
        corrected = np.zeros(_TERMS)
        corrected[X] = 1.0
        if i > 0:
            corrected = _unipc_corrector(grid, i)
        predict = _dpmpp_2m_row(grid, i)
        row = predict[X] * corrected
        row[M0] += predict[M0]
        row[M1] += predict[M1]
        to_x.append(row)
        to_base.append(corrected)
    return np.stack(to_x), np.stack(to_base)
