"""LCM-LoRA: consistency distillation into the factors of a LoRA, beside the frozen teacher.

Luo et al. 2023, arXiv:2311.05556, and diffusers, train_lcm_distill_lora_sd_wds.py. The student is
the teacher with the LoRA; it reads no guidance scale, and learns pictures as several have them.
The target is the student itself, or its average if the recipe has one.
"""

from __future__ import annotations

import dataclasses
import functools

from sdjax.methods import adapters
from sdjax.methods.adapter_rules import AdaptersConfig, changes
from sdjax.methods.distil import consistency
from sdjax.methods.distil.consistency import ConsistencyConfig
from sdjax.methods.method import Kind, Method, Setup
from sdjax.methods.parts import joined
from sdjax.models.params import Params

# The layers of the released LCM-LoRAs.
LAYERS = (
    r"\.(to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2"
    r"|conv_shortcut|(down|up)samplers\.0\.conv|time_emb_proj)$"
)


@dataclasses.dataclass(frozen=True)
class LCMLoRAConfig(AdaptersConfig, ConsistencyConfig):
    """Distillation into a LoRA: the fields of both."""

    name: str = "lcm_lora"
    rank: int = 64
    targets: tuple[str, ...] = (LAYERS,)

    def __post_init__(self) -> None:
        AdaptersConfig.__post_init__(self)
        ConsistencyConfig.__post_init__(self)
        if self.text_targets:
            raise ValueError(
                f"method.text_targets is {self.text_targets}; expected (): teacher and student "
                "read the same text"
            )


def make(setup: Setup) -> Method:
    """Bind the method to the networks of a model.

    Raises:
        UserError: see the methods `lcm` and `adapters`.
    """
    bind = functools.partial(consistency.bound_method, of_teacher=_itself, trains=lambda path: True)
    method = adapters.denoiser(setup, bind)
    return joined(method, (adapters.factors(setup, method),))


def _itself(every: Params) -> Params:
    """The teacher is what the LoRA is beside."""
    return every


LCM_LORA = Kind(
    config=LCMLoRAConfig,
    make=make,
    networks=tuple,
    draws=True,
    changes=changes,
    folded=adapters.folded,
)
