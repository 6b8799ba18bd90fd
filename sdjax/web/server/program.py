"""The programs that draw a batch: contexts of the prompts, a few steps, and the VAE's decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sdjax.diffusion.samplers import Carry, Row, make_step, noise_of, step_rows
from sdjax.diffusion.solvers import SolverPlan
from sdjax.families.bind import bind
from sdjax.families.family import Model
from sdjax.sampling.denoising import Drawing, make_member
from sdjax.sampling.generate import to_images
from sdjax.sampling.start import Picture, constraint

Params = Mapping[str, jax.Array]
MOST_STEPS = 16  # of one call


class Program(NamedTuple):
    """Compiled functions of a batch.

    contexts: (params, prompts, negative, picture) -> what the denoiser reads besides latents.
    steps: (params, contexts, carry, rows [MOST_STEPS, ...], count, scale [B, 1, 1, 1], keys [B],
        picture, noise [B, h, w, C]) -> carry after the steps of the first `count` rows; see
        `samplers.make_step`.
    decode: (params, x0 [B, h, w, C]) -> images [B, H, W, 3] in [0, 1].
    """

    contexts: Callable[..., list[Any]]
    steps: Callable[..., Carry]
    decode: Callable[[Params, Any], jax.Array]


def make_program(
    model: Model, drawing: Drawing, plan: SolverPlan, size: tuple[int, ...], dtype: str
) -> Program:
    """Return the programs of drawings that differ in steps and guidance scale alone.

    Args:
        plan: of one of them; size: height and width of the latents.

    Raises:
        UserError: the networks do not fit one another, or the guidance the family.
    """
    member = make_member(model, drawing, dtype)
    autoencoder = bind(model, ("vae",), dtype=dtype)

    @jax.jit
    def contexts(params: Params, prompts: Any, negative: Any, picture: Picture) -> list[Any]:
        return member.beside(member.contexts(params, prompts, negative, size), picture)

    @jax.jit
    def steps(
        params: Params,
        contexts: list[Any],
        carry: Carry,
        rows: Row,
        count: jax.Array,
        scale: jax.Array,
        keys: jax.Array,
        picture: Picture,
        noise: jax.Array,
    ) -> Carry:
        # Without guidance one evaluation does, which needs a scale that is no argument.
        own = 1.0 if drawing.guidance == 1.0 else scale
        network = member.network(params)
        assert model.prediction_type is not None
        take = make_step(
            member.guided(network, contexts, picture, size, own),
            plan,
            prediction_type=model.prediction_type,
            noise=lambda i: noise_of(keys, i, noise.shape[1:]),
            constrain=constraint(picture, noise),
        )
        row = lambda i: jax.tree.map(lambda table: table[i], rows)  # noqa: E731
        return jax.lax.fori_loop(0, count, lambda i, carry: take(carry, row(i)), carry)

    @jax.jit
    def decode(params: Params, x0: jax.Array) -> jax.Array:
        return to_images(autoencoder.module("vae", params), x0)

    return Program(contexts, steps, decode)


def rows_from(plan: SolverPlan, first: int) -> Row:
    """Return the rows of a plan's evaluations from number `first` on, [MOST_STEPS, ...].

    Zeros follow the last one.
    """
    found = []
    for table in step_rows(plan):
        rows = table[first : first + MOST_STEPS]
        rest = np.zeros((MOST_STEPS - len(rows), *table.shape[1:]), table.dtype)
        found.append(np.concatenate([rows, rest]))
    return tuple(found)
