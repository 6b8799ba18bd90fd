"""Pivotal tuning: new words and a LoRA are trained in one run, the words for a part of it.

First both are trained, so that the words find their place; then the words are fixed and the LoRA
learns on (diffusers, examples/advanced_diffusion_training: `--train_text_encoder_ti_frac`). With
`factors_begin` the words come first and the LoRA after them, as in cloneofsimo/lora.
"""

from __future__ import annotations

import dataclasses

from sdjax.families.embeddings import in_tables
from sdjax.families.family import Change, Family, Model
from sdjax.methods import adapters, embedding
from sdjax.methods.adapter_rules import AdaptersConfig
from sdjax.methods.adapter_rules import changes as adapter_changes
from sdjax.methods.embedding import EmbeddingConfig
from sdjax.methods.method import Kind, Method, Setup
from sdjax.methods.parts import joined


@dataclasses.dataclass(frozen=True)
class PivotalConfig(AdaptersConfig, EmbeddingConfig):
    """Training of new words and of adapters: the fields of both."""

    name: str = "pivotal"
    std_power: float = 0.1
    words_end: float = 0.5  # the share of the steps after which the words are fixed
    factors_begin: float = 0.0  # the share of the steps before which the factors are not trained

    def __post_init__(self) -> None:
        AdaptersConfig.__post_init__(self)
        EmbeddingConfig.__post_init__(self)
        if not 0 < self.words_end <= 1:
            raise ValueError(f"words_end is {self.words_end}; expected a share in (0, 1]")
        if not 0 <= self.factors_begin < 1:
            raise ValueError(f"factors_begin is {self.factors_begin}; expected a share in [0, 1)")
        if self.factors_begin > self.words_end:
            raise ValueError(
                f"factors_begin is {self.factors_begin} with words_end {self.words_end}: nothing "
                "would be trained between them; expected at most words_end"
            )


def _changes(config: PivotalConfig, family: Family) -> tuple[Change, ...]:
    """See `Kind.changes`."""
    return (*embedding.changes(config, family), *adapter_changes(config, family))


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: see the methods `embedding` and `adapters`.
    """
    words = embedding.words(setup)
    method = adapters.denoiser(setup)
    factors = adapters.factors(setup, method)
    return joined(
        method,
        (
            dataclasses.replace(words, during=(0.0, setup.config.words_end)),
            dataclasses.replace(factors, during=(setup.config.factors_begin, 1.0)),
        ),
    )


def _folded(model: Model) -> Model:
    """See `Kind.folded`."""
    return adapters.folded(in_tables(model))


PIVOTAL = Kind(
    config=PivotalConfig,
    make=make,
    networks=tuple,
    draws=True,
    changes=_changes,
    folded=_folded,
    tokenizers=embedding.tokenizers_with,
    data=embedding.data_with,
)
