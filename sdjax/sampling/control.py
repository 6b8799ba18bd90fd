"""ControlNets beside a UNet while pictures are drawn, as diffusers' ControlNet pipelines do it.

Each sees its condition picture at every step of its range, and what they say is added up. In guess
mode they steer the prompts' half of guidance alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.errors import UserError
from sdjax.families import controlnet
from sdjax.families.bind import bind
from sdjax.families.controlnet import CONTROLNET
from sdjax.families.family import Context, Model
from sdjax.models import weights
from sdjax.models.controlnet.config import ControlNetConfig
from sdjax.models.controlnet.network import scaled, total
from sdjax.models.params import component
from sdjax.models.unet import Residuals
from sdjax.sampling.start import Picture


@dataclasses.dataclass(frozen=True)
class Control:
    """A ControlNet to draw with.

    name: the first word of its parameters' paths, and the field of its condition [B, H, W, 3] in
        [0, 1] among the pictures that a generator gets.
    weight: of what it says; start, stop: shares of the steps between which it says something.
    guess: whether it steers the prompts alone, and its finer maps less.

    Raises UserError where a number is out of its range.
    """

    name: str
    config: ControlNetConfig
    weight: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    guess: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < self.stop <= 1.0:
            raise UserError(
                f"a ControlNet's steps are {self.start:g} to {self.stop:g}; expected shares of the "
                "way from noise to picture, 0 <= START < END <= 1"
            )
        if not np.isfinite(self.weight):
            raise UserError(f"a ControlNet's weight is {self.weight}; expected a number")

    @property
    def of_prompts_alone(self) -> bool:
        """Whether it says nothing for the negative prompts."""
        return self.guess or self.config.global_pool_conditions

    def inside(self, timesteps: np.ndarray) -> tuple[float, float] | None:
        """Return the lowest and highest timestep at which it steers; None if it does at all.

        Args:
            timesteps: of the evaluations, falling.

        Raises:
            UserError: there are none.
        """
        count = len(timesteps)
        # diffusers, `controlnet_keep`.
        kept = [
            float(t)
            for i, t in enumerate(np.asarray(timesteps, np.float32))
            if not (i / count < self.start or (i + 1) / count > self.stop)
        ]
        if not kept:
            raise UserError(
                f"a ControlNet's steps are {self.start:g} to {self.stop:g} of {count}, in which no "
                "whole step lies; give a longer range, or more --steps"
            )
        return None if len(kept) == count else (min(kept), max(kept))


@dataclasses.dataclass(frozen=True, eq=False)
class Controls:
    """ControlNets of a model, ready to be given parameters.

    graphs: in the order of `each`.
    """

    each: tuple[Control, ...]
    graphs: tuple[Any, ...]

    def beside(
        self,
        denoiser: Callable[..., jax.Array],
        params: Mapping[str, jax.Array],
        picture: Picture,
        timesteps: np.ndarray,
    ) -> tuple[Callable[..., jax.Array], Callable[[Context, bool], Any]]:
        """Return a denoiser that is steered, and what puts the conditions beside a context.

        The context carries them because guidance repeats it for both of its halves. The flag says
        whether guidance leads away from the context.

        Args:
            denoiser: takes `residuals`, as a UNet does.
            picture: has the field of each.
            timesteps: of the evaluations of the denoiser, falling.
        """
        networks = [
            weights.merge(graph, component(params, control.name))
            for graph, control in zip(self.graphs, self.each, strict=True)
        ]
        ranges = [control.inside(timesteps) for control in self.each]

        def denoise(xt: jax.Array, t: jax.Array, context: Any, **kw: Any) -> jax.Array:
            text, conditions, steered = context
            found = []
            for control, network, within in zip(self.each, networks, ranges, strict=True):
                weight = control.weight * (
                    steered[:, None, None, None] if control.of_prompts_alone else 1.0
                )
                guess = control.guess and not control.config.global_pool_conditions

                def speak(network: Any = network, name: str = control.name) -> Residuals:
                    return network(xt, t, text, conditions[name])

                said = speak() if within is None else _within(within, t, speak)
                found.append(scaled(said, weight, guess=guess))
            return denoiser(xt, t, text, residuals=total(found), **kw)

        def put(context: Context, negative: bool) -> Any:
            conditions = {control.name: picture[control.name] for control in self.each}
            count = len(next(iter(conditions.values())))
            return context, conditions, jnp.full(count, 0.0 if negative else 1.0)

        return denoise, put


def _within(bounds: tuple[float, float], t: jax.Array, speak: Callable[[], Residuals]) -> Residuals:
    """The residuals of a network within a range of timesteps; zeros outside, without a run."""
    low, high = bounds
    silent = jax.eval_shape(speak)
    return jax.lax.cond(
        (t[0] >= low) & (t[0] <= high),
        speak,
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), silent),
    )


def bind_controls(model: Model, controls: Sequence[Control], dtype: str) -> Controls:
    """Return ControlNets to draw with.

    Raises:
        UserError: one of them was not made for such a model.
    """
    graphs = []
    for control in controls:
        whole = controlnet.with_controlnet(model, control.config)
        graphs.append(bind(whole, (CONTROLNET,), dtype=dtype).graphs[CONTROLNET])
    return Controls(tuple(controls), tuple(graphs))
