"""Methods made of parts: what each change of the networks adds to the loss of a denoiser.

`adapters` is a method of one part, `embedding` another, and `pivotal` has both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sdjax.families.family import Model
from sdjax.methods.method import ALWAYS, Export, LossFn, Method, Phase, Project
from sdjax.models.params import Params
from sdjax.system import paths


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A piece of a method: it trains what one change of the networks has added to them.

    trains: whether it trains a path; no two parts train one.
    start, export: see `Method`.
    loss: the loss of the method -> the same with what the part logs.
    rate, project: see `Phase`.
    during: the shares of a run's steps at which its training begins and ends.
    """

    trains: Callable[[str], bool]
    start: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    export: Export
    loss: Callable[[LossFn], LossFn] = lambda loss: loss
    rate: Callable[[str], float] = lambda path: 1.0
    project: Project | None = None
    during: tuple[float, float] = ALWAYS


def joined(method: Method, parts: Sequence[Part]) -> Method:
    """Return a method of one phase, which trains its parts and nothing else.

    Args:
        method: bound to networks with the changes of all parts; its first loss is that of all.
    """
    loss = method.phases[0].loss
    for part in parts:
        loss = part.loss(loss)

    def owner(path: str) -> Part:
        return next(part for part in parts if part.trains(path))

    def start(loaded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        own = {path: value for part in parts for path, value in part.start(loaded).items()}
        return method.start(loaded) | own

    def export(
        model: Model, trained: Mapping[str, np.ndarray], folder: paths.Path
    ) -> dict[str, paths.Path | str]:
        return {k: v for part in parts for k, v in part.export(model, trained, folder).items()}

    phase = Phase(
        "main",
        loss,
        trains=lambda path: any(part.trains(path) for part in parts),
        rate=lambda path: owner(path).rate(path),
        project=_projected(parts),
        during=lambda path: owner(path).during,
        memory=method.phases[0].memory,
    )
    return dataclasses.replace(method, phases=(phase,), start=start, export=export)


def _projected(parts: Sequence[Part]) -> Project | None:
    """Puts each part in turn where it is allowed to be; None if all may be anywhere."""
    projects = [part.project for part in parts if part.project]
    if not projects:
        return None

    def project(trained: Params, frozen: Params) -> Params:
        for one in projects:
            trained = one(trained, frozen)
        return trained

    return project
