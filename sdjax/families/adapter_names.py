"""How users of adapters name the modules of a family, in files and in lists of numbers.

Blocks of a UNet have the numbers of the original code: IN00 is `input_blocks.0` of LDM, M00 the
first part of its `middle_block`, OUT00 `output_blocks.0`. SD1 and SD2 have 12 of each side, SDXL 9.
Those of FLUX.1 are in `flux_names.py`.

Sources: networks/lora.py of kohya-ss/sd-scripts, `get_block_index` and `block_dims`;
scripts/lora_block_weight.py of hako-mikan/sd-webui-lora-block-weight, `BLOCKID12` to `BLOCKID26`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdjax.errors import UserError
from sdjax.families.ldm_names import unet_name
from sdjax.families.single_file import Places, own_name
from sdjax.models.unet_config import UNetConfig

KOHYA_DENOISER = "lora_unet"  # in every family: networks/lora*.py of kohya-ss/sd-scripts
ONLY_ENCODER = "lora_te"  # of a model with one text encoder
# Of the denoiser's keys with underscores, to read: LyCORIS outside kohya's trainer, OneTrainer.
DENOISER_PREFIXES = (KOHYA_DENOISER, "lycoris", "lycoris_unet", "lora_transformer")
# Before names of diffusers, and before those of the authors' code: PEFT, ComfyUI.
DOTTED_PREFIXES = ("", "diffusion_model.")
NATIVE_PREFIXES = ("", "diffusion_model.", "model.diffusion_model.")

TEXT = "BASE"  # the text encoders in lists of weights
_MIDDLE = ("M00", "M01", "M02")
_SIDES = {"input_blocks": "IN", "middle_block": "M", "output_blocks": "OUT"}
_ENDS = {"time_embed": "EMB", "label_emb": "EMB", "out": "END"}
OUTSIDE = ("EMB", "END")  # what is before and after the blocks

Order = tuple[tuple[str, ...], ...]  # the blocks that each number of a list is for


def unchanged_key(key: str) -> str:
    """Return a key as it is."""
    return key


@dataclasses.dataclass(frozen=True)
class BlockLists:
    """The blocks of one denoiser.

    of: path of a module within the denoiser -> its block.
    weights: the orders that lists of weights have; of a UNet's blocks with attention, and of all.
    ranks: the order of kohya's `block_dims`; () where they have none.
    texts: {text encoder: its block}; others are `TEXT`.
    """

    of: Callable[[str], str]
    weights: tuple[Order, ...]
    ranks: Order = ()
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class AdapterNames:
    """The names of a family's modules in files of adapters.

    prefixes: {text encoder: prefix of its keys in kohya's files}; that of a model's only encoder is
        `ONLY_ENCODER`.
    places: config of the denoiser -> places of its weights under the names of its authors' code.
    native: whether kohya's files have these names; else they have those of diffusers.
    entrance: the module of the denoiser that reads latents, whose inputs a model may have added to.
    facts: model -> entries of a file's metadata that say what it is an adapter of.
    respelled: key -> the same in the style of kohya, for layouts that this family alone has.
    blocks: config of the denoiser -> its blocks; None where no lists of numbers are in use.
    ranks_by_block: whether these have an order of ranks.
    """

    prefixes: Mapping[str, str]
    places: Callable[[Any], Places] = own_name
    native: bool = False
    entrance: str = ""
    facts: Callable[[Any], dict[str, str]] = lambda model: {}
    respelled: Callable[[str], str] = unchanged_key
    blocks: Callable[[Any], BlockLists] | None = None
    ranks_by_block: bool = False


def unet_blocks(config: UNetConfig, *, ends: bool) -> BlockLists:
    """Return the blocks of a UNet.

    Args:
        ends: whether kohya's lists have numbers for embeddings, for each part of the middle and for
            the last layers, as those of SDXL.
    """
    per_level = config.layers_per_block + 1
    count = per_level * len(config.block_out_channels)
    ins, outs = ([(f"{side}{i:02}",) for i in range(count)] for side in ("IN", "OUT"))
    middle: list[tuple[str, ...]] = [_MIDDLE]
    attending = [
        *(
            (f"IN{per_level * level + i + 1:02}",)
            for level, kind in enumerate(config.down_block_types)
            for i in range(config.layers_per_block)
            if kind == "CrossAttnDownBlock2D"
        ),
        *middle,
        *(
            (f"OUT{per_level * level + i:02}",)
            for level, kind in enumerate(config.up_block_types)
            for i in range(per_level)
            if kind == "CrossAttnUpBlock2D"
        ),
    ]
    ranks = [*ins, *middle, *outs]
    if ends:
        ranks = [("EMB",), *ins, *((part,) for part in _MIDDLE), *outs, ("END",)]
    every = [(TEXT,), *ins, *middle, *outs]
    weights = ((TEXT,), *attending), tuple(every)
    return BlockLists(functools.partial(_unet_block, config), weights, tuple(ranks))


def _unet_block(config: UNetConfig, module: str) -> str:
    """The block of a module, by its path within the UNet."""
    side, number, *_ = f"{unet_name(f'{module}.weight', config)}.".split(".")
    return f"{_SIDES[side]}{int(number):02}" if side in _SIDES else _ENDS[side]


def by_block(numbers: Sequence[float], orders: Sequence[Order], name: str) -> dict[str, float]:
    """Return {block: number} of a list.

    Args:
        orders: of which its length chooses one.
        name: of the list, for the error.

    Raises:
        UserError: it has as many numbers as none of them.
    """
    for order in orders:
        if len(order) == len(numbers):
            return {
                block: number
                for blocks, number in zip(order, numbers, strict=True)
                for block in blocks
            }
    expected = " or ".join(f"{len(order)} ({_shown(order)})" for order in orders)
    raise UserError(f"{name} has {len(numbers)} numbers; expected {expected}")


def _shown(order: Order) -> str:
    """The blocks of an order in short: IN00-IN11 M00 OUT00-OUT11."""
    runs: list[list[str]] = []
    for first, *_ in order:
        side = re.sub(r"\d", "", first)
        if (
            runs
            and re.sub(r"\d", "", runs[-1][-1]) == side
            and _number(first) == (_number(runs[-1][-1]) + 1)
        ):
            runs[-1].append(first)
        else:
            runs.append([first])
    return " ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _number(block: str) -> int:
    return int(re.sub(r"\D", "", block) or -1)
