"""FLOPs of the matrix products and convolutions in the text of a compiled program."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping

from sdjax.planning.hlo_text import Instruction, Module

# The roles of the operands and the result of cuDNN's calls, in terms of the forward convolution.
_FORWARD = ("image", "kernel", "result")
_CONVOLUTIONS = {
    "__cudnn$convBackwardInput": ("result", "kernel", "image"),
    "__cudnn$convBackwardFilter": ("image", "result", "kernel"),
}


def library_call(instruction: Instruction) -> str:
    """The target of a call of cuDNN or cuBLAS for a convolution or product; else ""."""
    if instruction.opcode != "custom-call":
        return ""
    found = re.search(r'custom_call_target="(__cudnn\$conv[^"]*|__cublas\$[^"]*)"',
                      instruction.attributes)  # fmt: skip
    return found.group(1) if found else ""


def product_flops(
    module: Module, instruction: Instruction, names: Mapping[str, Instruction]
) -> float:
    """The multiplications and additions of an instruction's products, those of a fusion included.

    `names`: the instructions of the computation that it is in, for the shapes of its operands.
    Products with padding or with the zeros of a dilation are not counted, as in XLA
    (`HloCostAnalysis::HandleConvolution`).
    """
    if instruction.opcode == "fusion":
        inside = module.computations.get(instruction.attribute("calls"), [])
        inner = {one.name: one for one in inside}
        return math.fsum(product_flops(module, one, inner) for one in inside)
    call = library_call(instruction)
    if instruction.opcode not in ("convolution", "dot") and not call:
        return 0.0
    arrays = [names[name].arrays[0].dims for name in instruction.operands[:2]]
    arrays.append(instruction.arrays[0].dims)
    if instruction.opcode == "dot" or call.startswith("__cublas"):
        summed = re.search(
            r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.attributes
        )
        left, _, out = arrays
        axes = re.findall(r"\d+", summed.group(1)) if summed else []
        return 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None  # every convolution has them
    dims = dict(zip(_CONVOLUTIONS.get(call, _FORWARD), arrays, strict=True))
    image, kernel, result = (
        dict(zip(order, dims[name], strict=True))
        for order, name in zip(labels.groups(), _FORWARD, strict=True)
    )
    flops = 2.0 * result["b"] * result["f"] * kernel["i"]
    for axis, window in enumerate(_windows(instruction.attributes)):
        flops *= _pairs(image[str(axis)], result[str(axis)], *window)
    return flops


def _windows(attributes: str) -> list[tuple[int, int, int, int, int]]:
    """The window of each dimension: size, stride, padding before, dilation of image and kernel."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(re.findall(r"(\w+)=([\d\-x_]+)", found.group(1))) if found else {}
    columns = [
        [int(word.split("_")[0]) for word in given[key].split("x")] if key in given else []
        for key in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")
    ]
    defaults = (1, 1, 0, 1, 1)
    return [
        tuple(defaults[i] if value is None else value for i, value in enumerate(row))  # type: ignore[misc]
        for row in itertools.zip_longest(*columns)
    ]


@functools.lru_cache(4096)
def _pairs(
    image: int, result: int, size: int, stride: int, pad: int, spread: int, step: int
) -> int:
    """The number of (result, kernel) positions along a dimension that meet a value of the image.

    `spread` and `step`: dilation of the image and of the kernel.
    """
    places = (there * stride + here * step - pad for there in range(result) for here in range(size))
    return sum(0 <= place <= (image - 1) * spread and place % spread == 0 for place in places)
