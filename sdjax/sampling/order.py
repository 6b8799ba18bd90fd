"""Pictures to draw, with all that they depend on in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np

from sdjax.config import ModelConfig
from sdjax.data.tokenizer import Tokenizer
from sdjax.diffusion.schedules import ScheduleConfig, make_schedule
from sdjax.diffusion.solvers import Plan, make_plan
from sdjax.sampling.generate import (
    Drawing,
    Onlooker,
    draw,
    draw_seen,
    initial_latents,
    make_generator,
    make_seen_generator,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """What `make_generator` and `draw` take; see there.

    texts: the prompts, of which `prompts` has the tokens.
    latents: [N, h, w, C] to start from, or None for the noise of `seed` and `positions` [N].
    """

    model: ModelConfig
    tokenizers: Mapping[str, Tokenizer]
    schedule: ScheduleConfig
    prediction_type: str
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

    @cached_property
    def plan(self) -> Plan:
        """Where the sampler evaluates the network."""
        return make_plan(make_schedule(self.schedule), self.drawing.sampler)

    @cached_property
    def generate(self) -> Callable[..., jax.Array]:
        """Of `make_generator`."""
        return make_generator(**self._generator)

    @property
    def _generator(self) -> dict[str, Any]:
        fields = ("model", "tokenizers", "schedule", "prediction_type", "drawing")
        return {field: getattr(self, field) for field in fields}

    def draw(self, onlookers: Sequence[Onlooker] = ()) -> tuple[np.ndarray, tuple[Any, ...]]:
        """(uint8 [N, H, W, 3], the last state of each onlooker, [N, ...])."""
        options = dict(
            shape=self.shape,
            seed=self.seed,
            batch_size=self.batch_size,
            latents=self.latents,
            positions=self.positions,
            texts=self.texts,
        )
        if onlookers:
            generate = make_seen_generator(**self._generator, onlookers=onlookers)
            return draw_seen(generate, self.params, self.prompts, self.negative, **options)  # type: ignore[arg-type]
        return draw(self.generate, self.params, self.prompts, self.negative, **options), ()  # type: ignore[arg-type]

    def noise(self) -> np.ndarray:
        """What the pictures start from, [N, h, w, C]."""
        if self.latents is not None:
            return self.latents
        return np.asarray(initial_latents(self.seed, self.positions, self.shape))  # type: ignore[arg-type]
