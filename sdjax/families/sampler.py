"""The sampler that a model is drawn with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdjax.diffusion.grids import SamplerConfig, changed_sampler
from sdjax.errors import UserError
from sdjax.families.family import Model


def choose_sampler(model: Model, changes: Mapping[str, Any], name: str) -> SamplerConfig:
    """Return a model's own sampler with some fields changed.

    Args:
        changes: {field of SamplerConfig: value}.
        name: where the model is, for messages.

    Raises:
        UserError: the model's own sampler is asked for and sdjax does not have it, or a change
            makes no sense.
    """
    own = model.sampler or SamplerConfig()
    if model.unsupported_sampler and "name" not in changes:
        raise UserError(
            f"{name} is sampled with {model.unsupported_sampler}, which sdjax does not have; "
            f"choose another by --sampler, as --sampler={own.name}, the nearest to it"
        )
    return changed_sampler(own, changes)


def sampler_note(model: Model, sampler: SamplerConfig, name: str) -> str:
    """Return a line that says what a model is drawn with in place of its own sampler, or ""."""
    if not model.unsupported_sampler:
        return ""
    return (
        f"note: {name} is sampled with {model.unsupported_sampler}, which sdjax does not have; "
        f"{sampler.name} draws instead"
    )
