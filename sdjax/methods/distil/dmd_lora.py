"""Distribution matching by a LoRA beside the frozen teacher, which is the student's base.

Yin et al. 2024 (DMD2), and tianweiy/DMD2, train_sd.py with --generator_lora. The fake network is
whole.
"""

from __future__ import annotations

import dataclasses

from sdjax.methods import adapters
from sdjax.methods.adapter_rules import AdaptersConfig, changes
from sdjax.methods.distil import dmd
from sdjax.methods.distil.consistency_lora import LAYERS
from sdjax.methods.distil.dmd import MatchingConfig
from sdjax.methods.method import Kind, Method, Phase, Setup
from sdjax.methods.parts import joined


@dataclasses.dataclass(frozen=True)
class DMDLoRAConfig(AdaptersConfig, MatchingConfig):
    """Distribution matching by a LoRA: the fields of both."""

    name: str = "dmd_lora"
    rank: int = 64
    targets: tuple[str, ...] = (LAYERS,)

    def __post_init__(self) -> None:
        AdaptersConfig.__post_init__(self)
        MatchingConfig.__post_init__(self)
        if self.text_targets:
            raise ValueError(
                f"method.text_targets is {self.text_targets}; expected (): student, teacher and "
                "fake read the same text"
            )


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: see the methods `dmd` and `adapters`.
    """
    fakes: list[Phase] = []

    def base(own: Setup) -> Method:
        method, fake = dmd.bound_method(own, lambda every: every, keep_teacher=False)
        fakes.append(fake)
        return method

    method = adapters.denoiser(setup, base)
    method = joined(method, (adapters.factors(setup, method),))
    student = dataclasses.replace(method.phases[0], name="student", every=setup.config.fake_updates)
    return dataclasses.replace(method, phases=(fakes[0], student))


DMD_LORA = Kind(
    config=DMDLoRAConfig,
    make=make,
    networks=tuple,
    draws=True,
    changes=changes,
    folded=adapters.folded,
)
