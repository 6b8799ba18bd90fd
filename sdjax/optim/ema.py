"""Exponential moving averages of the parameters, several at once, always in float32.

A profile is a string, which is also its name in checkpoints:

    0.9999               fixed decay d
    warmup-0.9999        min(d, (1 + n) / (10 + n)) at the n-th update (CompVis latent-diffusion,
                         ldm/modules/ema.py)
    inverse-gamma-P[-G]  1 - (1 + n / G)^-P after n updates, G = 1 if left out (crowsonkb
                         k-diffusion, utils.py); P = 0.6667 reaches .999 at 31.6k steps
    power-S              power-function profile of relative width S, as 0.05 or 0.10 (EDM2,
                         arXiv 2312.02696, section 3); `reconstruct` makes any other width from
                         snapshots of one or two such profiles

The state is `{profile: {path: float32 array}}`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from sdjax.errors import UserError
from sdjax.models.weights import check_finite
from sdjax.parallel.sharding import to_host
from sdjax.system import paths
from sdjax.system.text_files import pointer_note

Params = Mapping[str, Any]

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_FORMS = {
    "fixed": re.compile(rf"{_NUMBER}"),
    "warmup": re.compile(rf"warmup-{_NUMBER}"),
    "inverse-gamma": re.compile(rf"inverse-gamma-{_NUMBER}(?:-{_NUMBER})?"),
    "power": re.compile(rf"power-{_NUMBER}"),
}
# The relative width of a power-function profile at exponent 0, from which it falls.
_WIDEST = 12**-0.5


@dataclasses.dataclass(frozen=True)
class EMAConfig:
    """The averages of the parameters to keep.

    Attributes:
      profiles: see the module; sampling and export take the first by default. Empty = no average.
      snapshot_every: steps between snapshots of the power-function profiles, 0 = none.
      snapshot_dtype: dtype of the snapshots, "float32" or "float16" (half the space, as in EDM2).

    Raises ValueError for an unknown profile and for values out of range.
    """

    profiles: tuple[str, ...] = ("warmup-0.9999",)
    snapshot_every: int = 0
    snapshot_dtype: str = "float32"

    def __post_init__(self) -> None:
        for profile in self.profiles:
            _parse(profile)
        if len(set(self.profiles)) < len(self.profiles):
            raise ValueError(f"ema.profiles={self.profiles!r}: expected each profile once")
        if self.snapshot_every < 0:
            raise ValueError(f"ema.snapshot_every={self.snapshot_every}: expected 0 or more")
        if self.snapshot_every and not any(p.startswith("power-") for p in self.profiles):
            raise ValueError(
                f"ema.snapshot_every={self.snapshot_every} with ema.profiles={self.profiles!r}: "
                "expected a power profile to take snapshots of, such as power-0.05"
            )
        if self.snapshot_dtype not in ("float32", "float16"):
            raise ValueError(
                f"ema.snapshot_dtype={self.snapshot_dtype!r}: expected float32 or float16"
            )


def _parse(profile: str) -> tuple[str, tuple[float, ...]]:
    """The kind and the numbers of a profile; ValueError if it is none."""
    if not isinstance(profile, str):
        raise ValueError(f"ema.profiles: {profile!r} is no string; write it as '{profile}'")
    for kind, form in _FORMS.items():
        match = form.fullmatch(profile)
        if match:
            numbers = tuple(float(n) for n in match.groups() if n is not None)
            top = {"fixed": 1.0, "warmup": 1.0, "power": _WIDEST}.get(kind, np.inf)
            if not all(0 < n < top for n in numbers):
                raise ValueError(
                    f"ema.profiles: {profile!r}: expected a number between 0 and {top:.4g}"
                )
            return kind, numbers
    raise ValueError(
        f"ema.profiles: {profile!r} is no profile; expected a decay such as '0.9999', or "
        "'warmup-0.9999', 'inverse-gamma-0.6667', 'power-0.05'"
    )


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent of the power function whose relative width is `sigma_rel` (EDM2, equation 126).

    Raises ValueError unless `sigma_rel` is between 0 and 12**-0.5.
    """
    if not 0 < sigma_rel < _WIDEST:
        raise ValueError(f"sigma_rel={sigma_rel}: expected between 0 and {_WIDEST:.4f}")
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def rate(profile: str, step: jax.typing.ArrayLike) -> jax.Array:
    """The value `1 - decay` of the `step`-th update, float32 of step's shape; the first step is 1.

    It is computed directly: 1 - decay from a float32 decay near 1 would lose most of its digits.
    """
    kind, numbers = _parse(profile)
    t = jnp.asarray(step, jnp.float32)
    if kind == "fixed":
        return jnp.full_like(t, 1 - numbers[0])
    if kind == "warmup":
        return jnp.maximum(1 - numbers[0], 9 / (10 + t))
    if kind == "inverse-gamma":
        power, inverse_gamma = (*numbers, 1.0)[:2]
        return (1 + (t - 1) / inverse_gamma) ** -power
    gamma = gamma_from_sigma_rel(numbers[0])
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / t))  # 1 - (1 - 1/t)^(gamma + 1)


def init(cfg: EMAConfig, params: Params) -> dict[str, dict[str, jax.Array]]:
    """Return the averages before the first update: copies of the parameters, in float32.

    Returns:
      {profile: {path: float32 array}}
    """
    return {
        profile: {path: jnp.array(leaf, jnp.float32, copy=True) for path, leaf in params.items()}
        for profile in cfg.profiles
    }


def update(
    ema: Mapping[str, Params], params: Params, step: jax.typing.ArrayLike
) -> dict[str, dict[str, jax.Array]]:
    """All profiles after the `step`-th update of the parameters. Jittable.

    Args:
      ema: `{profile: {path: float32 array}}` from `init` or from the last update.
      params: `{path: array}` of any float dtype, after this update.
      step: number of this update, 1 for the first.
    """

    def average(profile: str, averaged: Params) -> dict[str, jax.Array]:
        r = rate(profile, step)
        return {p: a + r * (params[p].astype(jnp.float32) - a) for p, a in averaged.items()}

    return {profile: average(profile, averaged) for profile, averaged in ema.items()}


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The average with one power-function profile at one step.

    Attributes:
      step: number of optimizer steps in the average.
      sigma_rel: relative width of its profile.
      source: the parameters `{path: array}`, or the safetensors file that holds them.
    """

    step: int
    sigma_rel: float
    source: Params | paths.Path

    def load(self) -> dict[str, np.ndarray]:
        """The parameters `{path: array}`, on the host.

        Raises:
          UserError: the file cannot be read, or has NaN or Inf.
        """
        if isinstance(self.source, Mapping):
            return {path: np.asarray(leaf) for path, leaf in self.source.items()}
        try:
            with (
                paths.reading(self.source) as local,
                safe_open(local, framework="numpy") as file,
            ):
                params = {path: file.get_tensor(path) for path in file.keys()}  # noqa: SIM118
                check_finite(params)
                return params
        except Exception as error:
            raise UserError(
                f"{self.source}: cannot read this EMA snapshot "
                f"({pointer_note(self.source) or error}); delete it"
            ) from error


def snapshot_folder(workdir: paths.PathLike) -> paths.Path:
    """The folder of a run's EMA snapshots."""
    return paths.to_path(workdir) / "ema_snapshots"


def save_snapshots(
    workdir: paths.PathLike,
    step: int,
    ema: Mapping[str, Params],
    *,
    dtype: str = "float32",
) -> list[paths.Path]:
    """Write each power-function profile to `ema_snapshots/STEP-PROFILE.safetensors`.

    Every process must call it (sharded arrays are gathered); process 0 writes. A file appears
    under its name only once it is complete.

    Returns:
      the files.

    Raises:
      ValueError: `ema` has no power-function profile.
      WriteError: a file cannot be written.
    """
    folder = snapshot_folder(workdir)
    powers = sorted(profile for profile in ema if profile.startswith("power-"))
    if not powers:
        raise ValueError(
            f"ema.profiles={tuple(ema)!r}: expected a power profile to take snapshots of, such as "
            "power-0.05"
        )
    files = []
    for profile in powers:
        file = folder / f"{step:08d}-{profile}.safetensors"
        tensors = {path: to_host(leaf).astype(dtype) for path, leaf in ema[profile].items()}
        files.append(file)
        if jax.process_index() == 0:
            paths.make_folder(folder)
            with paths.writing(file) as local:
                save_file(tensors, local)
    return files


def list_snapshots(workdir: paths.PathLike) -> list[Snapshot]:
    """The snapshots of a run by step and width; their parameters are read on `load`."""
    name = re.compile(rf"(\d+)-power-{_NUMBER}\.safetensors")
    found = []
    for file in sorted(snapshot_folder(workdir).glob("*.safetensors")):
        match = name.fullmatch(file.name)
        if match:
            found.append(Snapshot(int(match[1]), float(match[2]), file))
    return sorted(found, key=lambda s: (s.step, s.sigma_rel))


def reconstruct(
    snapshots: Iterable[Snapshot], sigma_rel: float, at_step: int | None = None
) -> dict[str, np.ndarray]:
    """The average of an untracked width `sigma_rel` at `at_step` (EDM2, section 3.2).

    The weights of the snapshots are the least-squares fit of their profiles to the wanted one,
    in float64. Snapshots after `at_step` are not used. Two tracked widths and regular snapshots
    reach any width between and somewhat outside them.

    Args:
      snapshots: of one run, each (step, sigma_rel) once.
      sigma_rel: the wanted relative width.
      at_step: the wanted step, by default the last snapshot's.

    Returns:
      {path: float32 array}

    Raises:
      UserError: there are none up to `at_step`, one cannot be read or has NaN or Inf, or they do
        not have the same parameters.
    """
    available = list(snapshots)
    if not available:
        raise UserError("no EMA snapshots: train with ema.snapshot_every and a power profile")
    last = max(s.step for s in available)
    at_step = last if at_step is None else at_step
    used = [s for s in available if 0 < s.step <= at_step]
    if not used or at_step > last:
        steps = sorted({s.step for s in available})
        raise UserError(f"at_step={at_step}: expected a step from {steps[0]} to {steps[-1]}")
    if len({(s.step, s.sigma_rel) for s in used}) < len(used):
        raise UserError("an EMA snapshot is given twice: pass each (step, sigma_rel) once")
    weights = posthoc_weights(
        [s.step for s in used], [s.sigma_rel for s in used], at_step, sigma_rel
    )
    total = {path: weights[0] * leaf.astype(np.float64) for path, leaf in used[0].load().items()}
    for weight, snapshot in zip(weights[1:], used[1:], strict=True):
        params = snapshot.load()
        _check_same(used[0], {path: leaf.shape for path, leaf in total.items()}, snapshot, params)
        for path, leaf in params.items():
            total[path] += weight * leaf.astype(np.float64)
    return {path: leaf.astype(np.float32) for path, leaf in total.items()}


def _check_same(
    first: Snapshot, shapes: Mapping[str, tuple[int, ...]], other: Snapshot, params: Params
) -> None:
    """Raise a UserError that names a parameter if two snapshots do not have the same ones."""
    found = {path: np.shape(leaf) for path, leaf in params.items()}
    different = sorted(p for p in shapes.keys() | found if shapes.get(p) != found.get(p))
    if different:
        path = different[0]
        raise UserError(
            f"{_where(first)} and {_where(other)} are snapshots of different models: {path} is "
            f"{shapes.get(path, 'not in the one')} and {found.get(path, 'not in the other')}, and "
            f"{len(different) - 1} more differ. Delete those that are not of this run"
        )


def _where(snapshot: Snapshot) -> str:
    """The name of a snapshot in messages."""
    return f"step {snapshot.step}" if isinstance(snapshot.source, Mapping) else str(snapshot.source)


def posthoc_weights(
    steps: Sequence[int], sigma_rels: Sequence[float], at_step: int, sigma_rel: float
) -> np.ndarray:
    """The weights of n profiles that best make up the wanted one, float64 [n] of sum 1.

    Source: EDM2, section 3.2.
    """
    t = np.asarray(steps, np.float64)
    gammas = np.asarray([gamma_from_sigma_rel(s) for s in sigma_rels])
    wanted = np.asarray([gamma_from_sigma_rel(sigma_rel)])
    gram = _inner(t[:, None], gammas[:, None], t[None], gammas[None])  # [n, n]
    target = _inner(
        t[:, None], gammas[:, None], np.full((1, 1), float(at_step)), wanted[None]
    )  # [n, 1]
    weights = np.linalg.lstsq(gram, target[:, 0], rcond=None)[0]
    return weights / weights.sum()


def _inner(ta: np.ndarray, ga: np.ndarray, tb: np.ndarray, gb: np.ndarray) -> np.ndarray:
    """The inner product of the profiles (g + 1) t^g / T^(g + 1) on [0, T], T = ta and tb.

    The integral goes to min(ta, tb). All powers are gathered in one ratio that cannot overflow.
    """
    short, long = np.minimum(ta, tb), np.maximum(ta, tb)
    exponent = np.where(ta < tb, gb, ga)  # the longer profile's
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * (short / long) ** exponent / long
