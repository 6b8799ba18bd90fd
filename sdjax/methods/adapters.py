"""Adapters: a LoRA, or one of its kin, is trained beside frozen networks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.family import Model
from sdjax.methods import denoise
from sdjax.methods.adapter_files import export
from sdjax.methods.adapter_rules import (
    TARGETS,
    Adapted,
    AdaptersConfig,
    changes,
    is_target,
    numbered_blocks,
)
from sdjax.methods.method import (
    Aux,
    Averages,
    Batch,
    Draw,
    Kind,
    LossFn,
    Method,
    Project,
    Setup,
)
from sdjax.methods.parts import Part, joined
from sdjax.models.adapters import networks as adapters
from sdjax.models.adapters.factors import Layer, is_pointwise
from sdjax.models.adapters.networks import MARK
from sdjax.models.params import Params, prefixed

DROPOUT = 2**20  # the stream of adapters' dropout, folded into the step's key


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: a target names no layer, or text encoders are to be trained on stored features.
    """
    method = denoiser(setup)
    return joined(method, (factors(setup, method),))


def denoiser(setup: Setup, base: Callable[[Setup], Method] = denoise.make) -> Method:
    """Return the method of a denoiser with adapters, whose loss drops parts of them.

    Args:
        base: binds the method whose loss it is.

    Raises:
        UserError: see `make`.
    """
    config = setup.config
    _check_targets(config, dataclasses.replace(setup.model, changes=()))
    if config.text_targets and setup.data.text_embeddings:
        raise UserError(
            f"method.text_targets is {config.text_targets} with data.text_embeddings, in which no "
            "text encoder runs; set one of them to what it is by default"
        )
    method = base(setup)
    if not any(MARK in path for path in method.abstract):
        raise UserError(
            "method.ranks, method.block_ranks and method.block_rates have a 0 for every layer of "
            "method.targets and method.text_targets; leave some out"
        )
    if not adapters_dropout(config):
        return method
    changes = tuple(
        dataclasses.replace(change, training=True) if isinstance(change, Adapted) else change
        for change in setup.model.changes
    )
    model = dataclasses.replace(setup.model, changes=changes)
    loss = _with_keys(base(dataclasses.replace(setup, model=model)), method)
    return dataclasses.replace(method, phases=(dataclasses.replace(method.phases[0], loss=loss),))


def factors(setup: Setup, method: Method) -> Part:
    """Return the factors of adapters as a part of a method.

    Args:
        method: bound to the networks with adapters.
    """
    return Part(
        trains=lambda path: MARK in path,
        start=functools.partial(_magnitudes, frozenset(method.abstract)),
        export=export,
        rate=_block_rates(setup),
        project=_limit(setup),
    )


def adapters_dropout(config: AdaptersConfig) -> bool:
    """Whether any part of the adapters is dropped while training."""
    rates = config.dropout, config.hidden_dropout, config.rank_dropout, config.module_dropout
    return any(rates)


def _check_targets(config: AdaptersConfig, model: Model) -> None:
    """Check that each target and each pattern takes a layer."""
    networks = bind(model)
    found: list[tuple[str, Layer]] = []
    for name in (model.family.denoiser, *model.text_encoders):
        network = networks.module(name, networks.abstract)
        found += [(f"{name}.{path}", layer) for path, layer in adapters.layers(network)]
    encoders = tuple(f"{name}." for name in model.text_encoders)
    for field, texts in (("targets", False), ("text_targets", True)):
        own = [(path, layer) for path, layer in found if path.startswith(encoders) == texts]
        for target in getattr(config, field):
            if not any(is_target(target, path, layer) for path, layer in own):
                examples = ", ".join(path for path, _ in own[:: max(1, len(own) // 4)][:4])
                raise UserError(
                    f"method.{field}: {target!r} takes no layer; expected one of "
                    f"{', '.join(TARGETS)}, or a regular expression that is found in paths such as "
                    f"{examples}"
                )
    own = [(path, layer) for path, layer in found if not path.startswith(encoders)]
    taken = [one for one in own if any(is_target(t, *one) for t in config.targets)]
    if config.tucker and all(is_pointwise(layer) for _, layer in taken):
        raise UserError(
            "method.tucker is True, and no layer of method.targets is a convolution larger than "
            "1x1; add some, as 'all' does, or set it to False"
        )
    for field in ("ranks", "alphas"):
        for pattern, _ in getattr(config, field):
            if not any(adapters.matches(pattern, path) for path, _ in found):
                raise UserError(f"method.{field}: {pattern!r} is found in no path of a layer")


def _with_keys(training: Method, method: Method) -> LossFn:
    """Return the loss with dropout.

    Args:
        training: bound to networks whose adapters take keys.
        method: bound to those whose adapters take none.
    """
    keys = {path: v.shape for path, v in training.abstract.items() if path not in method.abstract}
    loss = training.phases[0].loss

    def dropped(
        trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        key = jax.random.fold_in(jax.random.fold_in(draw.key, DROPOUT), draw.positions[0])
        own = adapters.dropout_keys(list(keys), list(keys.values()), key)
        return loss({**trained, **own}, frozen, averages, batch, draw)

    return dropped


def _block_rates(setup: Setup) -> Callable[[str], float]:
    """The multiplier of the learning rate by the block of a factor; see `Phase.rate`."""
    family, config = setup.model.family, setup.config
    blocks = numbered_blocks(config, family)
    lists = blocks(setup.model.networks[family.denoiser]) if blocks else None

    def rate(path: str) -> float:
        layer = path.partition(MARK)[0]
        own = lists if layer.startswith(f"{family.denoiser}.") else None
        return float(config.in_block("block_rates", layer, own, 1.0))

    return rate


def _limit(setup: Setup) -> Project | None:
    """Return what keeps the changes of kernels small, if the recipe asks for it."""
    most = setup.config.max_norm
    if not most:
        return None
    networks = bind(setup.model)
    scales = {
        f"{name}.{path}": layer.adapter.rule.scale
        for name in networks.configs
        for path, layer in adapters.layers(networks.module(name, networks.abstract))
        if layer.adapter is not None
    }
    return lambda trained, frozen: adapters.within(trained, scales, most)


def _magnitudes(paths: frozenset[str], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the magnitudes of dora at its start: the norms of the kernels."""
    ending = f"{MARK}magnitude"
    found = {}
    for path in paths:
        kernel = loaded.get(path.removesuffix(ending) + ".kernel")
        if path.endswith(ending) and kernel is not None:
            found[path] = adapters.magnitudes(path, kernel)
    return found


def folded(model: Model) -> Model:
    """Return a model with its adapters added to the kernels."""
    if not model.params:
        return dataclasses.replace(model, changes=())
    networks = bind(model)
    params = {path: value for path, value in model.params.items() if MARK not in path}
    for name in networks.configs:
        network = networks.module(name, model.params)
        kernels = prefixed(adapters.folded(network), name)
        params |= {path: np.asarray(kernel) for path, kernel in kernels.items()}
    return dataclasses.replace(model, params=params, changes=())


ADAPTERS = Kind(
    config=AdaptersConfig,
    make=make,
    networks=tuple,
    draws=True,
    changes=changes,
    folded=folded,
)
