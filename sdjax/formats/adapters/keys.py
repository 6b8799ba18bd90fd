"""The keys of a file of adapters: which module, which factor, in any of the styles in use.

kohya, LyCORIS  STEM.lora_down.weight, .lora_up.weight, .alpha, .dora_scale, .hada_w1_a, ...
PEFT            STEM.lora_A.weight, .lora_B.weight, .lora_B.bias, .lora_magnitude_vector
old diffusers   STEM.lora.down.weight, ATTENTION.processor.to_q_lora.down.weight,
                STEM.lora_linear_layer.up.weight
"""

from __future__ import annotations

import re

ALPHA = "alpha"
PEFT_BIAS = "lora_B.bias"  # times s, as the rest of PEFT's product
PEFT_MAGNITUDE = "lora_magnitude_vector"  # [out] or [1, out, 1, 1]
_OURS = frozenset((
    "lora_down", "lora_up", "lora_mid", ALPHA, "dora_scale", "diff", "diff_b", "set_weight",
    *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
))  # fmt: skip
# Changes of a norm's weight and bias in LyCORIS; a norm's whole scale in Black Forest Labs' files.
_SPELLED = {
    "w_norm": "diff", "b_norm": "diff_b", "scale": "set_weight", "lora_A": "lora_down",
    "lora_B": "lora_up", PEFT_MAGNITUDE: PEFT_MAGNITUDE,
}  # fmt: skip
_TAIL = re.compile(r"(.+)\.([A-Za-z_0-9]+)")
_OLD = re.compile(r"(.+)(?:\.lora|_lora|\.lora_linear_layer)\.(down|up)\.weight")
_PROCESSOR = re.compile(r"(.+)\.processor\.(\w+)")
_WRAPPERS = ("base_model.model.",)  # of PEFT
BUNDLED = "bundle_emb."  # embeddings in the same file, of OneTrainer and LyCORIS


def split(key: str) -> tuple[str, str] | None:
    """Return (name of the module as the file has it, part); None for a key of no adapter.

    The part is a factor of `AdapterLayer`, `ALPHA`, `PEFT_BIAS` or `PEFT_MAGNITUDE`.
    """
    for wrapper in _WRAPPERS:
        key = key.removeprefix(wrapper)
    if old := _OLD.fullmatch(key):
        return _module(old[1]), f"lora_{old[2]}"
    if key.endswith((".lora_B.bias", ".lora_B.default.bias")):
        return _module(key[: key.rindex(".lora_B.")]), PEFT_BIAS
    tail = _TAIL.fullmatch(key.removesuffix(".weight").removesuffix(".default"))
    if tail is None:
        return None
    part = _SPELLED.get(tail[2], tail[2])
    return (_module(tail[1]), part) if part in _OURS or part in _SPELLED else None


def _module(stem: str) -> str:
    """The name of a module without the attention processor of old diffusers."""
    if found := _PROCESSOR.fullmatch(stem):
        return f"{found[1]}.{'to_out.0' if found[2] == 'to_out' else found[2]}"
    return stem
