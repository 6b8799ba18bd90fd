"""Curricula: a run in stages, each with its own data, timesteps, batch size and learning rate.

A stage ends with a checkpoint, and the next one begins as a resumed run does, with its own programs
and its own stream of data. So a change compiles once, and to resume is the same in every stage.
"""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from sdjax.config import Config, Stage
from sdjax.data.pipeline import open_parts
from sdjax.models.config import ConfigError
from sdjax.parallel.batches import check_batch
from sdjax.train.program import check_shapes


@dataclasses.dataclass(frozen=True)
class Segment:
    """The part of a run that one configuration is in force for.

    config: of the run, with what the stage changes; without stages.
    first, end: optimizer steps done at its beginning and at its end.
    """

    number: int
    config: Config
    first: int
    end: int

    @property
    def seed(self) -> int:
        """The seed of the data's order: another for each stage, or all would begin alike."""
        return (self.config.seed + 1_000_003 * self.number) % 2**32


def segments(config: Config) -> list[Segment]:
    """The stages of a run up to `train.steps`; one where there are none."""
    steps = config.train.steps
    firsts = [0, *(stage.start for stage in config.stages if stage.start < steps)]
    return [
        Segment(i, config.at_step(first), first, end)
        for i, (first, end) in enumerate(zip(firsts, [*firsts[1:], steps], strict=True))
    ]


def segment_at(config: Config, step: int) -> Segment:
    """Where a run goes on that has done `step` steps; the last one for one that is at its end."""
    found = segments(config)
    return next((segment for segment in found if step < segment.end), found[-1])


def begin(config: Config, saved: Config | None, step: int) -> Segment:
    """Return the stage that a run goes on with.

    Args:
        saved: the configuration that the run had before, if it goes on.
        step: steps done.

    Raises:
        UserError: data of a later stage is missing, or a stage that has begun was changed.
    """
    check_data(config, step)
    if saved is not None:
        check_begun(saved, config, step)
    return segment_at(config, step)


def images_seen(config: Config, step: int) -> int:
    """Pictures of the first `step` optimizer steps."""
    return sum(
        (min(step, s.end) - s.first) * s.config.data.batch_size
        for s in segments(config)
        if step > s.first
    )


def check(config: Config, mesh: Mesh) -> None:
    """Every stage can run on this mesh: better now than in a week.

    Raises:
        UserError: naming the stage and what does not fit.
    """
    for segment in segments(config):
        try:
            check_batch(segment.config.data.batch_size, config.train.accumulation, mesh)
            check_shapes(segment.config)
        except ValueError as error:
            if segment.number == 0:
                raise
            raise ConfigError(f"config.stages[{segment.number - 1}]: {error}") from error


def check_data(config: Config, step: int) -> None:
    """The data of stages to come is there.

    Raises:
        UserError: naming the stage and what is missing.
    """
    for segment in segments(config):
        if segment.first > step and config.stages[segment.number - 1].mixture:
            try:
                open_parts(segment.config.data, segment.config.data.split)
            except ValueError as error:
                raise ConfigError(f"config.stages[{segment.number - 1}]: {error}") from error


def check_begun(saved: Config, config: Config, step: int) -> None:
    """The stages that have begun are those of the run so far; later ones may change.

    Raises:
        ConfigError: naming them.
    """
    before, now = (_begun(one, step) for one in (saved, config))
    if before != now:
        raise ConfigError(
            f"config.stages: this run is at step {step} and began with {before!r}; now it has "
            f"{now!r}. Stages that have begun must stay as they were; use another --workdir"
        )


def _begun(config: Config, step: int) -> tuple[Stage, ...]:
    return tuple(stage for stage in config.stages if stage.start < step)
