"""ControlNets and T2I-Adapters beside a UNet while pictures are drawn, as diffusers' pipelines do.

A ControlNet sees its condition picture at every step of its range, a T2I-Adapter once for all of
them, and what they say is added up. In guess mode ControlNets steer the prompts' half of guidance
alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.errors import UserError
from sdjax.families.beside import controlnet, t2i_adapter
from sdjax.families.beside.controlnet import CONTROLNET
from sdjax.families.beside.t2i_adapter import T2I_ADAPTER
from sdjax.families.bind import bind
from sdjax.families.family import Context, Model
from sdjax.models import weights
from sdjax.models.controlnet.config import ControlNetConfig
from sdjax.models.controlnet.network import scaled, total
from sdjax.models.params import component
from sdjax.models.t2i_adapter.config import T2IAdapterConfig
from sdjax.models.t2i_adapter.network import total_maps
from sdjax.models.unet import Residuals
from sdjax.sampling.start import Picture

SteeringConfig = ControlNetConfig | T2IAdapterConfig


@dataclasses.dataclass(frozen=True)
class Control:
    """A ControlNet or a T2I-Adapter to draw with.

    name: the first word of its parameters' paths, and the field of its condition [B, H, W, 3] in
        [0, 1] among the pictures that a generator gets.
    weight: of what it says; start, stop: shares of the steps between which it says something.
    guess: of a ControlNet, whether it steers the prompts alone, and its finer maps less.

    Raises UserError where a number is out of its range.
    """

    name: str
    config: SteeringConfig
    weight: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    guess: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < self.stop <= 1.0:
            raise UserError(
                f"{self.title}'s steps are {self.start:g} to {self.stop:g}; expected shares of the "
                "way from noise to picture, 0 <= START < END <= 1"
            )
        if not np.isfinite(self.weight):
            raise UserError(f"{self.title}'s weight is {self.weight}; expected a number")

    @property
    def is_adapter(self) -> bool:
        """Whether it is a T2I-Adapter."""
        return isinstance(self.config, T2IAdapterConfig)

    @property
    def title(self) -> str:
        """The kind of network, for messages."""
        return "a T2I-Adapter" if self.is_adapter else "a ControlNet"

    @property
    def pooled(self) -> bool:
        """Whether what it says is the same everywhere."""
        return isinstance(self.config, ControlNetConfig) and self.config.global_pool_conditions

    @property
    def of_prompts_alone(self) -> bool:
        """Whether it says nothing for the negative prompts."""
        return self.guess or self.pooled

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
                f"{self.title}'s steps are {self.start:g} to {self.stop:g} of {count}, in which no "
                "whole step lies; give a longer range, or more --steps"
            )
        return None if len(kept) == count else (min(kept), max(kept))


@dataclasses.dataclass(frozen=True, eq=False)
class Controls:
    """ControlNets and T2I-Adapters of a model, ready to be given parameters.

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
        """Return a denoiser that is steered, and what puts what they read beside a context.

        The context carries the conditions, of a T2I-Adapter its maps, because guidance repeats it
        for both of its halves. The flag says whether guidance leads away from the context.

        Args:
            denoiser: takes `residuals` and `maps`, as a UNet does.
            picture: has the field of each.
            timesteps: of the evaluations of the denoiser, falling.
        """
        networks = [
            weights.merge(graph, component(params, control.name))
            for graph, control in zip(self.graphs, self.each, strict=True)
        ]
        ranges = [control.inside(timesteps) for control in self.each]
        given = {
            control.name: network(picture[control.name])
            if control.is_adapter
            else picture[control.name]
            for control, network in zip(self.each, networks, strict=True)
        }

        def denoise(xt: jax.Array, t: jax.Array, context: Any, **kw: Any) -> jax.Array:
            text, shown, steered = context
            residuals, maps = [], []
            for control, network, within in zip(self.each, networks, ranges, strict=True):
                own = shown[control.name]
                if control.is_adapter:
                    maps.append(_weighed(control, own, t, within))
                else:
                    residuals.append(_spoken(control, network, within, xt, t, text, own, steered))
            kw |= {"residuals": total(residuals)} if residuals else {}
            kw |= {"maps": total_maps(maps)} if maps else {}
            return denoiser(xt, t, text, **kw)

        def put(context: Context, negative: bool) -> Any:
            count = len(picture[self.each[0].name])
            return context, given, jnp.full(count, 0.0 if negative else 1.0)

        return denoise, put


def _weighed(
    control: Control, maps: Sequence[jax.Array], t: jax.Array, bounds: tuple[float, float] | None
) -> list[jax.Array]:
    """The maps of a T2I-Adapter times its weight; zeros outside of its range of timesteps."""
    inside = True if bounds is None else (t >= bounds[0]) & (t <= bounds[1])
    weight = jnp.where(inside, jnp.full(t.shape, control.weight, jnp.float32), 0)
    return [(x * weight[:, None, None, None]).astype(x.dtype) for x in maps]


def _spoken(
    control: Control,
    network: Any,
    bounds: tuple[float, float] | None,
    xt: jax.Array,
    t: jax.Array,
    text: Context,
    condition: jax.Array,
    steered: jax.Array,
) -> Residuals:
    """The residuals of a ControlNet times its weight, which no negative prompt may have."""
    weight = control.weight * (steered[:, None, None, None] if control.of_prompts_alone else 1.0)

    def speak() -> Residuals:
        return network(xt, t, text, condition)

    said = speak() if bounds is None else _within(bounds, t, speak)
    return scaled(said, weight, guess=control.guess and not control.pooled)


def _within(bounds: tuple[float, float], t: jax.Array, speak: Callable[[], Residuals]) -> Residuals:
    """The residuals of a network within a range of timesteps; zeros outside, without a run."""
    low, high = bounds
    silent = jax.eval_shape(speak)
    return jax.lax.cond(
        (t[0] >= low) & (t[0] <= high),
        speak,
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), silent),
    )


def check(model: Model, config: SteeringConfig, name: str) -> None:
    """Raise a UserError unless a network steers a model's denoiser; name: for messages."""
    if isinstance(config, T2IAdapterConfig):
        t2i_adapter.check(model, config, name)
    else:
        controlnet.check(model, config, name)


def bind_controls(model: Model, controls: Sequence[Control], dtype: str) -> Controls:
    """Return networks to draw with.

    Raises:
        UserError: one of them was not made for such a model.
    """
    graphs = []
    for control in controls:
        if isinstance(control.config, T2IAdapterConfig):
            name, whole = T2I_ADAPTER, t2i_adapter.with_t2i_adapter(model, control.config)
        else:
            name, whole = CONTROLNET, controlnet.with_controlnet(model, control.config)
        graphs.append(bind(whole, (name,), dtype=dtype).graphs[name])
    return Controls(tuple(controls), tuple(graphs))
