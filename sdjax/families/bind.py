"""The one place that builds networks: graphs and abstract parameters of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.families.family import Change, Model, Networks, Part
from sdjax.models import weights
from sdjax.models.params import prefixed
from sdjax.models.products import cast_first


def bind(
    model: Model,
    names: Sequence[str] | None = None,
    *,
    dtype: str = "float32",
    remat: str = "none",
) -> Networks:
    """Build networks of a model, with its changes, without arrays.

    Args:
        names: which networks, in the family's order; by default all that the model has.
        dtype: of products and convolutions; parameters are float32.
        remat: see `ModelConfig.remat`.
    """
    chosen = {n: c for n, c in _in_order(model).items() if names is None or n in names}
    graphs: dict[str, Any] = {}
    abstract: dict[str, jax.ShapeDtypeStruct] = {}
    dtypes: dict[str, Any] = {}
    makers = {name: _maker(model, name) for name in chosen}
    for name, config in chosen.items():
        options = {"dtype": jnp.dtype(dtype), "remat": remat}
        graphs[name], own = weights.abstract(makers[name], config, **options)
        abstract |= prefixed(own, name)
        dtypes |= prefixed(cast_first(weights.merge(graphs[name], own)), name)
    family, settings = model.family, model.settings
    denoiser = model.networks.get(family.denoiser)
    return Networks(family, chosen, makers, settings, denoiser, graphs, abstract, dtypes)


def abstract_params(part: Part, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return {path: float32 ShapeDtypeStruct} of one network, without its prefix."""
    return weights.abstract(part.network, config, param_dtype=jnp.float32)[1]


def _in_order(model: Model) -> dict[str, Any]:
    """{name: config} in the family's order, whatever the order they were read in."""
    parts = model.family.parts
    return {
        name: part.fitted(model.networks[name], model.tokenizers.get(part.tokens))
        for name, part in parts.items()
        if name in model.networks
    }


def _maker(model: Model, name: str) -> Any:
    network = model.family.parts[name].network
    return _Changed(name, network, model.changes) if model.changes else network


@dataclasses.dataclass(frozen=True)
class _Changed:
    """Makes a network and changes it; hashable, so that its graph is built once."""

    name: str
    network: Any
    changes: tuple[Change, ...]

    def __call__(self, config: Any, *, rngs: Any, **options: Any) -> Any:
        network = self.network(config, rngs=rngs, **options)
        for change in self.changes:
            change(self.name, network, rngs)
        return network
