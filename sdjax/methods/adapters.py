"""Adapters: a LoRA, or one of its kin, is trained beside frozen networks."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.family import Change, Family, Model
from sdjax.methods import denoise
from sdjax.methods.adapter_files import export
from sdjax.methods.method import (
    Aux,
    Averages,
    Batch,
    Draw,
    Kind,
    LossFn,
    Method,
    MethodConfig,
    Phase,
    Setup,
)
from sdjax.models.adapters import networks as adapters
from sdjax.models.adapters.factors import INITS, KINDS, Dropout, Layer, Rule, is_pointwise
from sdjax.models.adapters.networks import MARK
from sdjax.models.params import Params, prefixed
from sdjax.models.products import Linear

DROPOUT = 2**20  # the stream of adapters' dropout, folded into the step's key

# Sets of layers by name. Those of attention are the examples' of diffusers; "transformer" is what
# kohya's networks.lora adapts.
_ATTENTION = re.compile(
    r"\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|[qkv]_proj|out_proj|SelfAttention\.[qkvo])$"
)
_BLOCKS = re.compile(r"\.(attentions|(single_)?transformer_blocks|layers|block)\.\d+(-\d+)?\.")
TARGETS = {
    "attention": lambda path, layer: bool(_ATTENTION.search(path)),
    "transformer": lambda path, layer: bool(_BLOCKS.search(path)) and is_pointwise(layer),
    "linear": lambda path, layer: isinstance(layer, Linear),
    "all": lambda path, layer: True,
}


@dataclasses.dataclass(frozen=True)
class AdaptersConfig(MethodConfig):
    """Training of adapters; the networks of `init_from` stay as they are."""

    name: str = "adapters"
    kind: str = "lora"  # lora, dora, loha or lokr
    rank: int = 16
    alpha: float | None = None  # the factors' product is scaled by alpha / rank; None is the rank
    rank_stabilized: bool = False  # by alpha / sqrt(rank) instead (rsLoRA)
    # Layers of the denoiser that are adapted: names of sets (attention; transformer, as kohya;
    # linear; all, with convolutions) and regular expressions, which are found in paths.
    targets: tuple[str, ...] = ("attention",)
    text_targets: tuple[str, ...] = ()  # the same of text encoders; () trains none
    # (regular expression, rank): the first that is found in a path decides; 0 is no adapter.
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()  # the same for alpha
    init: str = "kaiming"  # of the first factor of lora and dora; or "gaussian"
    factor: int = -1  # of lokr: one side of its first factor; -1 is near the square root
    full_matrix: bool = False  # of lokr: never split its second factor into two of `rank`
    # Of convolutions larger than 1x1: their kernels lie in a core of rank x rank channels, between
    # factors of 1x1 (Tucker's form, LyCORIS's use_tucker).
    tucker: bool = False
    dropout: float = 0.0  # of inputs (PEFT's lora_dropout); lora and dora
    hidden_dropout: float = 0.0  # between the factors (kohya's network_dropout); lora and dora
    rank_dropout: float = 0.0  # of ranks of an example; lora and dora
    module_dropout: float = 0.0  # of whole adapters, for a step
    # The most that the norm of a kernel's change may be, kohya's scale_weight_norms; lora. 0: any.
    max_norm: float = 0.0

    def __post_init__(self) -> None:
        _check("kind", self.kind, self.kind in KINDS, f"one of {', '.join(KINDS)}")
        _check("init", self.init, self.init in INITS, f"one of {', '.join(INITS)}")
        _check("rank", self.rank, self.rank >= 1, "1 or more")
        _check("alpha", self.alpha, self.alpha is None or self.alpha >= 0, "0 or more, or None")
        _check("factor", self.factor, self.factor == -1 or self.factor > 0, "-1, or 1 and more")
        _check("max_norm", self.max_norm, self.max_norm >= 0, "0 or more")
        limited = self.kind != "lora" and self.max_norm
        _check("max_norm", self.max_norm, not limited, f"0 with method.kind={self.kind!r}")
        _check(
            "max_norm", self.max_norm, not (self.tucker and self.max_norm), "0 with method.tucker"
        )
        _check("targets", self.targets, self.targets or self.text_targets, "at least one")
        for field in ("dropout", "hidden_dropout", "rank_dropout", "module_dropout"):
            value = getattr(self, field)
            _check(field, value, 0 <= value < 1, "in [0, 1)")
            narrow = field != "module_dropout" and self.kind in ("loha", "lokr")
            _check(field, value, not (narrow and value), f"0 with method.kind={self.kind!r}")
        for field in ("targets", "text_targets"):
            for pattern in getattr(self, field):
                _check_pattern(field, pattern)
        for field in ("ranks", "alphas"):
            for pattern, value in getattr(self, field):
                _check_pattern(field, pattern)
                _check(field, value, value >= 0, "0 or more")

    def rule(self, path: str, layer: Layer, targets: tuple[str, ...]) -> Rule | None:
        """Return how a layer is adapted; None if it is not.

        Args:
            path: of the layer, with its network.
        """
        if not any(_is_target(target, path, layer) for target in targets):
            return None
        rank = _first(self.ranks, path, self.rank)
        if rank == 0:
            return None
        alpha = _first(self.alphas, path, rank if self.alpha is None else self.alpha)
        root = rank**0.5 if self.rank_stabilized else rank
        dropout = Dropout(self.dropout, self.hidden_dropout, self.rank_dropout, self.module_dropout)
        scale = (alpha or rank) / root  # alpha 0 is the rank, as in kohya's
        form = self.factor, self.full_matrix, self.tucker
        return Rule(self.kind, rank, scale, self.init, *form, dropout)


def _check(field: str, value: Any, good: Any, expected: str) -> None:
    if not good:
        raise ValueError(f"method.{field} is {value!r}; expected {expected}")


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"method.{field}: {pattern!r} is no regular expression: {error}"
        ) from error


def _is_target(target: str, path: str, layer: Layer) -> bool:
    if target in TARGETS:
        return TARGETS[target](path, layer)
    return adapters.matches(target, path)


def _first(pairs: tuple[tuple[str, Any], ...], path: str, otherwise: Any) -> Any:
    return next((v for pattern, v in pairs if adapters.matches(pattern, path)), otherwise)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The change that gives networks adapters; see `Change`.

    targets: {network: what is adapted there}, as pairs.
    training: whether adapters take keys of dropout.
    """

    config: AdaptersConfig
    targets: tuple[tuple[str, tuple[str, ...]], ...]
    training: bool = False

    def __call__(self, name: str, network: Any, rngs: Any) -> None:
        """Attach an adapter to every layer that is a target."""
        targets = dict(self.targets).get(name, ())

        def rule(path: str, layer: Layer) -> Rule | None:
            own = self.config.rule(f"{name}.{path}", layer, targets)
            if own is None or self.training:
                return own
            return dataclasses.replace(own, dropout=Dropout())

        adapters.attach(network, rule, rngs)


def changes(config: AdaptersConfig, family: Family) -> tuple[Change, ...]:
    """Return the change of a family's denoiser and text encoders."""
    encoders = [(name, config.text_targets) for name in family.encoders]
    return (Adapted(config, ((family.denoiser, config.targets), *encoders)),)


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: a target names no layer, or text encoders are to be trained on stored features.
    """
    config = setup.config
    (change,) = setup.model.changes
    assert isinstance(change, Adapted)
    plain = dataclasses.replace(setup.model, changes=())
    _check_targets(config, plain)
    if config.text_targets and setup.data.text_embeddings:
        raise UserError(
            f"method.text_targets is {config.text_targets} with data.text_embeddings, in which no "
            "text encoder runs; set one of them to what it is by default"
        )
    method = denoise.make(setup)
    loss = method.phases[0].loss
    if adapters_dropout(config):
        model = dataclasses.replace(
            setup.model, changes=(dataclasses.replace(change, training=True),)
        )
        loss = _with_keys(dataclasses.replace(setup, model=model), method)
    start = functools.partial(_magnitudes, frozenset(method.abstract))
    return dataclasses.replace(
        method,
        phases=(Phase("main", loss, lambda path: MARK in path, project=_limit(setup)),),
        start=start,
        export=export,
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
            if not any(_is_target(target, path, layer) for path, layer in own):
                examples = ", ".join(path for path, _ in own[:: max(1, len(own) // 4)][:4])
                raise UserError(
                    f"method.{field}: {target!r} takes no layer; expected one of "
                    f"{', '.join(TARGETS)}, or a regular expression that is found in paths such as "
                    f"{examples}"
                )
    own = [(path, layer) for path, layer in found if not path.startswith(encoders)]
    taken = [one for one in own if any(_is_target(t, *one) for t in config.targets)]
    if config.tucker and all(is_pointwise(layer) for _, layer in taken):
        raise UserError(
            "method.tucker is True, and no layer of method.targets is a convolution larger than "
            "1x1; add some, as 'all' does, or set it to False"
        )
    for field in ("ranks", "alphas"):
        for pattern, _ in getattr(config, field):
            if not any(adapters.matches(pattern, path) for path, _ in found):
                raise UserError(f"method.{field}: {pattern!r} is found in no path of a layer")


def _with_keys(setup: Setup, method: Method) -> LossFn:
    """Return the loss with dropout."""
    training = denoise.make(setup)
    keys = {path: v.shape for path, v in training.abstract.items() if path not in method.abstract}
    loss = training.phases[0].loss

    def dropped(
        trained: Params, frozen: Params, averages: Averages, batch: Batch, draw: Draw
    ) -> tuple[jax.Array, Aux]:
        key = jax.random.fold_in(jax.random.fold_in(draw.key, DROPOUT), draw.positions[0])
        own = adapters.dropout_keys(list(keys), list(keys.values()), key)
        return loss({**trained, **own}, frozen, averages, batch, draw)

    return dropped


def _limit(setup: Setup) -> Callable[[Params], Params] | None:
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
    return lambda params: adapters.within(params, scales, most)


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
