"""The methods by name."""

from __future__ import annotations

from sdjax.methods.adapted import (
    CONDITION_ADAPTERS,
    DPO_ADAPTERS,
    EDIT_ADAPTERS,
    INPAINT_ADAPTERS,
)
from sdjax.methods.adapters import ADAPTERS
from sdjax.methods.autoencoder import AUTOENCODER
from sdjax.methods.condition import CONDITION
from sdjax.methods.control import CONTROL
from sdjax.methods.denoise import DENOISE
from sdjax.methods.distil.consistency import LCM
from sdjax.methods.distil.consistency_lora import LCM_LORA
from sdjax.methods.distil.dmd import DMD
from sdjax.methods.distil.dmd_lora import DMD_LORA
from sdjax.methods.distil.progressive import PROGRESSIVE
from sdjax.methods.dpo import DPO
from sdjax.methods.edit import EDIT
from sdjax.methods.embedding import EMBEDDING
from sdjax.methods.inpaint import INPAINT
from sdjax.methods.ip_adapter import IP
from sdjax.methods.method import Kind
from sdjax.methods.pivotal import PIVOTAL
from sdjax.methods.t2i_adapter import T2I

METHODS: dict[str, Kind] = {
    "denoise": DENOISE,
    "autoencoder": AUTOENCODER,
    "inpaint": INPAINT,
    "edit": EDIT,
    "condition": CONDITION,
    "dpo": DPO,
    "adapters": ADAPTERS,
    "lcm": LCM,
    "lcm_lora": LCM_LORA,
    "progressive": PROGRESSIVE,
    "dmd": DMD,
    "dmd_lora": DMD_LORA,
    "control": CONTROL,
    "t2i_adapter": T2I,
    "ip_adapter": IP,
    "embedding": EMBEDDING,
    "pivotal": PIVOTAL,
    "inpaint_adapters": INPAINT_ADAPTERS,
    "edit_adapters": EDIT_ADAPTERS,
    "condition_adapters": CONDITION_ADAPTERS,
    "dpo_adapters": DPO_ADAPTERS,
}
