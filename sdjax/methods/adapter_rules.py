"""Which layers adapters are given, and of which rank: the group of a recipe, and the change."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from sdjax.errors import UserError
from sdjax.families.adapter_names import BlockLists, by_block
from sdjax.families.family import Change, Family, Model
from sdjax.methods.method import MethodConfig
from sdjax.models.adapters import networks as adapters
from sdjax.models.adapters.factors import INITS, KINDS, Dropout, Layer, Rule, is_pointwise
from sdjax.models.products import Linear

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
BLOCK_LISTS = ("block_ranks", "block_alphas", "block_rates")


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
    # Numbers of the blocks of a UNet in the order of kohya's block_dims: 25 of SD1 and SD2 (IN00-11
    # M00 OUT00-11), 23 of SDXL (embeddings, IN00-08, M00-02, OUT00-08, last layers). A path that
    # `ranks` or `alphas` take has theirs; text encoders, and layers in no block, have `rank`.
    block_ranks: tuple[int, ...] = ()  # kohya's block_dims; 0 leaves a block out
    block_alphas: tuple[float, ...] = ()  # kohya's block_alphas
    # Multipliers of the learning rate (kohya's down_, mid_ and up_lr_weight); 0 leaves a block out.
    block_rates: tuple[float, ...] = ()
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
        for field in BLOCK_LISTS:
            _check(field, getattr(self, field), min(getattr(self, field), default=0) >= 0,
                   "numbers of 0 or more")  # fmt: skip

    def rule(
        self, path: str, layer: Layer, targets: tuple[str, ...], lists: BlockLists | None = None
    ) -> Rule | None:
        """Return how a layer is adapted; None if it is not.

        Args:
            path: of the layer, with its network.
            lists: the blocks of the network, if it has some that are given numbers.

        Raises:
            UserError: a list has another count than the network has blocks.
        """
        if not any(is_target(target, path, layer) for target in targets):
            return None
        rank = _first(self.ranks, path, self.in_block("block_ranks", path, lists, self.rank))
        if rank == 0 or self.in_block("block_rates", path, lists, 1.0) == 0:
            return None
        alpha = rank if self.alpha is None else self.alpha
        alpha = _first(self.alphas, path, self.in_block("block_alphas", path, lists, alpha))
        root = rank**0.5 if self.rank_stabilized else rank
        dropout = Dropout(self.dropout, self.hidden_dropout, self.rank_dropout, self.module_dropout)
        scale = (alpha or rank) / root  # alpha 0 is the rank, as in kohya's
        form = self.factor, self.full_matrix, self.tucker
        return Rule(self.kind, rank, scale, self.init, *form, dropout)

    def in_block(self, field: str, path: str, lists: BlockLists | None, otherwise: Any) -> Any:
        """Return the number that a list has for the block of a layer.

        Args:
            field: of `BLOCK_LISTS`.
            otherwise: where there is no list, or it has none for the layer.

        Raises:
            UserError: see `rule`.
        """
        if lists is None or not (numbers := getattr(self, field)):
            return otherwise
        found = by_block(numbers, (lists.ranks,), f"method.{field}")
        return found.get(lists.of(path.partition(".")[2]), otherwise)


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


def is_target(target: str, path: str, layer: Layer) -> bool:
    if target in TARGETS:
        return TARGETS[target](path, layer)
    return adapters.matches(target, path)


def _first(pairs: tuple[tuple[str, Any], ...], path: str, otherwise: Any) -> Any:
    return next((v for pattern, v in pairs if adapters.matches(pattern, path)), otherwise)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The change that gives networks adapters; see `Change`.

    targets: {network: what is adapted there}, as pairs, the denoiser first.
    blocks: config of a denoiser -> its blocks, where these have numbers of their own.
    training: whether adapters take keys of dropout.
    """

    config: AdaptersConfig
    targets: tuple[tuple[str, tuple[str, ...]], ...]
    blocks: Callable[[Any], BlockLists] | None = None
    training: bool = False

    def __call__(self, name: str, network: Any, rngs: Any) -> None:
        """Attach an adapter to every layer that is a target."""
        targets = dict(self.targets).get(name, ())
        numbered = self.blocks is not None and name == self.targets[0][0]
        lists = self.blocks(network.config) if self.blocks and numbered else None

        def rule(path: str, layer: Layer) -> Rule | None:
            own = self.config.rule(f"{name}.{path}", layer, targets, lists)
            if own is None or self.training:
                return own
            return dataclasses.replace(own, dropout=Dropout())

        adapters.attach(network, rule, rngs)


def numbered_blocks(config: AdaptersConfig, family: Family) -> Callable[[Any], BlockLists] | None:
    """Return (config of a denoiser -> its blocks), where a recipe gives numbers for them.

    Raises:
        UserError: the family has no such lists.
    """
    given = [field for field in BLOCK_LISTS if getattr(config, field)]
    if not given:
        return None
    if family.adapters is None or not family.adapters.ranks_by_block:
        raise UserError(
            f"method.{given[0]} is {getattr(config, given[0])} with {family.title}; such lists are "
            "of the UNets of SD1, SD2 and SDXL: give patterns in method.ranks and method.alphas"
        )
    return family.adapters.blocks


def changes(config: AdaptersConfig, family: Family) -> tuple[Change, ...]:
    """Return the change of a family's denoiser and text encoders."""
    encoders = [(name, config.text_targets) for name in family.encoders]
    targets = ((family.denoiser, config.targets), *encoders)
    return (Adapted(config, targets, numbered_blocks(config, family)),)


def without_adapters(model: Model) -> Model:
    """Return a model without its adapters, and with what else changes its networks."""
    kept = tuple(change for change in model.changes if not isinstance(change, Adapted))
    return dataclasses.replace(model, changes=kept)
