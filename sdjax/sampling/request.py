"""Pictures to draw, with all that they depend on in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np

from sdjax.diffusion.schedules import make_schedule
from sdjax.diffusion.solvers import SolverPlan
from sdjax.families.family import Model
from sdjax.sampling.control import Control
from sdjax.sampling.denoising import Drawing
from sdjax.sampling.generate import Callback, draw, initial_latents, make_generator, to_uint8


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingRequest:
    """The arguments of `make_generator` and `draw`; see there.

    texts: the prompts, of which `prompts` has the tokens.
    latents: [N, h, w, C] to start from, or None for the noise of `seed` and `positions` [N].
    picture: {field: [N, ...]}, what to begin with and to keep; see `sampling.start`.
    others: models whose predictions are averaged with those of `model`; their parameters and tokens
        are among its own, see `sampling.denoising.of_member`.
    bounds: the others are experts, which predict in place of `model`; see `denoising.by_level`.
    controls: ControlNets, with their parameters among those of `model` and their conditions in
        `picture`.
    refiner: takes over the latents where `drawing` ends, of the same prompts; or None.
    """

    model: Model
    dtype: str
    drawing: Drawing
    params: Mapping[str, jax.Array]
    texts: Sequence[str]
    prompts: Mapping[str, np.ndarray]
    negative: Mapping[str, np.ndarray]
    shape: tuple[int, int, int]
    seed: int
    batch_size: int
    latents: np.ndarray | None
    positions: np.ndarray
    picture: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    others: Sequence[Model] = ()
    bounds: Sequence[float] | None = None
    controls: Sequence[Control] = ()
    refiner: SamplingRequest | None = None

    @cached_property
    def plan(self) -> SolverPlan:
        """The places where the sampler evaluates the network."""
        assert self.model.schedule is not None
        return self.drawing.plan(make_schedule(self.model.schedule), self.shape[:2])

    def draw(self, callbacks: Sequence[Callback] = ()) -> tuple[np.ndarray, tuple[Any, ...]]:
        """Return uint8 [N, H, W, 3] and the last state of each callback, [N, ...]."""
        made, seen = draw(
            make_generator(
                self.model,
                self.drawing,
                dtype=self.dtype,
                callbacks=callbacks,
                others=self.others,
                bounds=self.bounds,
                controls=self.controls,
            ),
            self.params,
            self.prompts,
            self.negative,
            shape=self.shape,
            seed=self.seed,
            batch_size=self.batch_size,
            latents=self.latents,
            positions=self.positions,
            texts=self.texts,
            picture=self.picture,
            finish=np.asarray if self.drawing.hands_over else to_uint8,
        )
        if self.refiner is not None:
            made, _ = dataclasses.replace(self.refiner, picture={"state": made}).draw()
        return made, seen

    def noise(self) -> np.ndarray:
        """Return what the pictures start from, [N, h, w, C]."""
        if self.latents is not None:
            return self.latents
        return np.asarray(initial_latents(self.seed, self.positions, self.shape))
