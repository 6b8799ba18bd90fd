"""Networks that steer a UNet while pictures are drawn, as the pipelines of diffusers have them.

A ControlNet sees its condition picture at every step of its range, a T2I-Adapter once for all of
them, and what they say is added up. In guess mode ControlNets steer the prompts' half of guidance
alone. An IP-Adapter shows a picture to the UNet's cross-attention, and none to the other half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.errors import UserError
from sdjax.families.beside import controlnet, ip_adapter, t2i_adapter
from sdjax.families.bind import bind
from sdjax.families.family import Context, Model
from sdjax.models import weights
from sdjax.models.controlnet.config import ControlNetConfig
from sdjax.models.controlnet.network import scaled, total
from sdjax.models.ip_adapter.config import IPAdapterConfig
from sdjax.models.ip_adapter.network import together, weighed
from sdjax.models.params import component
from sdjax.models.t2i_adapter.config import T2IAdapterConfig
from sdjax.models.t2i_adapter.network import total_maps
from sdjax.models.unet import Residuals
from sdjax.sampling.start import Picture

SteeringConfig = ControlNetConfig | T2IAdapterConfig | IPAdapterConfig


class _Kind(NamedTuple):
    """A kind of network that steers.

    join: (model, config) -> the model that has it too.
    check: (model, config, name for messages) raises a UserError unless it is for the model.
    """

    name: str
    title: str
    join: Callable[[Model, Any], Model]
    check: Callable[[Model, Any, str], None]


_KINDS: dict[type, _Kind] = {
    ControlNetConfig: _Kind(
        controlnet.CONTROLNET, "a ControlNet", controlnet.with_controlnet, controlnet.check
    ),
    T2IAdapterConfig: _Kind(
        t2i_adapter.T2I_ADAPTER, "a T2I-Adapter", t2i_adapter.with_t2i_adapter, t2i_adapter.check
    ),
    IPAdapterConfig: _Kind(
        ip_adapter.IP_ADAPTER, "an IP-Adapter", ip_adapter.with_ip_adapter, ip_adapter.check
    ),
}


def nothing_of(name: str) -> str:
    """Return the field with the features of no picture, for the IP-Adapter of this name."""
    return f"{name}_nothing"


@dataclasses.dataclass(frozen=True)
class Control:
    """A network that steers what is drawn.

    name: the first word of its parameters' paths, and the field of what it reads among the pictures
        that a generator gets: a condition [B, H, W, 3] in [0, 1]; of an IP-Adapter the features of
        a picture, [B, (N,) embedding_dim], with those of none beside them, see `nothing_of`.
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
    def title(self) -> str:
        """The kind of network, for messages."""
        return _KINDS[type(self.config)].title

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
    """The networks that steer a model, ready to be given parameters.

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

        The context carries the conditions, and of adapters what they say of them, because guidance
        repeats it for both of its halves. The flag says whether guidance leads away from it.

        Args:
            denoiser: takes `residuals`, `maps` and `images`, as a UNet does.
            picture: has the field of each.
            timesteps: of the evaluations of the denoiser, falling.
        """
        networks = [
            weights.merge(graph, component(params, control.name))
            for graph, control in zip(self.graphs, self.each, strict=True)
        ]
        ranges = [control.inside(timesteps) for control in self.each]
        given, away = {}, {}
        for control, network in zip(self.each, networks, strict=True):
            name, own = control.name, picture[control.name]
            runs_once = not isinstance(control.config, ControlNetConfig)
            given[name] = away[name] = network(own) if runs_once else own
            if isinstance(control.config, IPAdapterConfig):
                away[name] = network(picture[nothing_of(name)])

        def denoise(xt: jax.Array, t: jax.Array, context: Any, **kw: Any) -> jax.Array:
            text, shown, steered = context
            residuals, maps, images = [], [], []
            for control, network, within in zip(self.each, networks, ranges, strict=True):
                own = shown[control.name]
                if isinstance(control.config, ControlNetConfig):
                    residuals.append(_spoken(control, network, within, xt, t, text, own, steered))
                elif isinstance(control.config, T2IAdapterConfig):
                    weight = _weight(control, t, within)[:, None, None, None]
                    maps.append([(x * weight).astype(x.dtype) for x in own])
                else:
                    images.append(weighed(own, _weight(control, t, within)[:, None, None]))
            kw |= {"residuals": total(residuals)} if residuals else {}
            kw |= {"maps": total_maps(maps)} if maps else {}
            kw |= {"images": together(images)} if images else {}
            return denoiser(xt, t, text, **kw)

        def put(context: Context, negative: bool) -> Any:
            count = len(picture[self.each[0].name])
            own = away if negative else given
            return context, own, jnp.full(count, 0.0 if negative else 1.0)

        return denoise, put


def _weight(control: Control, t: jax.Array, bounds: tuple[float, float] | None) -> jax.Array:
    """The weight of what an adapter says, [B]; 0 outside of its range of timesteps."""
    inside = True if bounds is None else (t >= bounds[0]) & (t <= bounds[1])
    return jnp.where(inside, jnp.full(t.shape, control.weight, jnp.float32), 0)


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


def name_of(config: SteeringConfig) -> str:
    """Return the name that a network of this kind has among those of a run that trains it."""
    return _KINDS[type(config)].name


def check(model: Model, config: SteeringConfig, name: str) -> None:
    """Raise a UserError unless a network steers a model's denoiser; name: for messages."""
    _KINDS[type(config)].check(model, config, name)


def bind_controls(model: Model, controls: Sequence[Control], dtype: str) -> Controls:
    """Return networks to draw with.

    Raises:
        UserError: one of them was not made for such a model.
    """
    graphs = []
    for control in controls:
        kind = _KINDS[type(control.config)]
        whole = kind.join(model, control.config)
        graphs.append(bind(whole, (kind.name,), dtype=dtype).graphs[kind.name])
    return Controls(tuple(controls), tuple(graphs))
