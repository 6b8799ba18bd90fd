"""The channels that a denoiser reads beside the noisy latents: a mask, a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax

from sdjax.families.family import Networks
from sdjax.methods.method import Batch
from sdjax.models.params import Params


class MakeInputs(Protocol):
    """Makes what a denoiser reads beside the noisy latents."""

    def __call__(
        self, networks: Networks, every: Params, batch: Batch, keys: jax.Array
    ) -> jax.Array:
        """Return channels [b, h, w, K], on the grid of the latents; keys [b] of the examples."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The channels that a denoiser reads after the noisy latents.

    count: how many there are.
    make: see `MakeInputs`.
    drop: (channels, keys) -> channels as training takes them, those of some examples being zero.
    """

    count: int
    make: MakeInputs
    drop: Callable[[jax.Array, jax.Array], jax.Array] = lambda channels, keys: channels
