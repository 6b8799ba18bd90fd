"""Checks of weights as they are read: quantised ones are refused, NaN and Inf are counted.

Quantised weights are integers or small floats that mean nothing without scales beside them. Every
tool stores the scales in its own way. The names of the scales reveal such a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# Parts of names that only quantised weights have.
_QUANTISED = frozenset((
    # ComfyUI: quant_ops.py, and utils.py, convert_old_quants
    "scaled_fp8", "scale_weight", "scale_input", "weight_scale", "weight_scale_2", "input_scale",
    "comfy_quant",
    # bitsandbytes: Int8Params and QuantState.as_dict
    "SCB", "weight_format", "absmax", "quant_map", "nested_absmax", "nested_quant_map",
    "quant_state",
    # GPTQ, AWQ, SVDQuant; optimum-quanto; torchao; compressed-tensors
    "qweight", "qzeros", "scales", "wscales", "_data", "_scale", "qdata", "_weight_qdata",
    "weight_scale_inv", "weight_packed",
))  # fmt: skip
_SHOWN = 8
PLAIN = "sdjax reads float32, float16, bfloat16 and plain float8; write it so where it came from"


def quantised(names: Iterable[str]) -> str:
    """Return why the weights with these names cannot be read, or "" if they are not quantised."""
    marks = sorted(name for name in names if not _QUANTISED.isdisjoint(re.split("[.:]", name)))
    if not marks:
        return ""
    shown = ", ".join(marks[:3]) + (f" and {len(marks) - 3} more" if len(marks) > 3 else "")
    return f"its weights are quantised and need the scales beside them ({shown}); {PLAIN}"


def quantised_config(config: Mapping[str, Any]) -> str:
    """Return why a network with this config.json cannot be read, or "" if it is not quantised."""
    settings = config.get("quantization_config")
    if not settings:
        return ""
    method = settings.get("quant_method", "") if isinstance(settings, Mapping) else settings
    return f"quantization_config ({method or 'of some kind'}): its weights are quantised; {PLAIN}"


def is_finite(array: np.ndarray) -> bool:
    """Whether no value of an array is NaN or Inf."""
    return bool(np.isfinite(array).all())


def describe(name: str, array: np.ndarray) -> str:
    """Return a line that counts the NaN and Inf of an array."""
    counts = {"NaN": int(np.isnan(array).sum()), "Inf": int(np.isinf(array).sum())}
    found = " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return f"{name}: {found} among {array.size:,} values"


def not_finite(lines: list[str], total: int) -> str:
    """Return the message about `lines` of `describe`, for a network of `total` arrays."""
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return (
        f"{len(lines)} of {total} weights are not finite: the file is damaged, or what wrote it "
        "had diverged or overflowed. Get it again, or another:\n  "
        + "\n  ".join([*lines[:_SHOWN], *more])
    )
