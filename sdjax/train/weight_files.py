"""Finding the weights in a folder of a diffusers or transformers checkpoint.

A network's folder has one of, or several:

    STEM.safetensors                        the weights
    STEM.safetensors.index.json             a list of the files they are spread over
    STEM.VARIANT.safetensors,
    STEM.safetensors.index.VARIANT.json     the same, in half precision or without EMA
    STEM.bin                                a pickle, which sdjax does not read: it can run code
"""

from __future__ import annotations

from sdjax import paths
from sdjax.models.weights import WeightsError

STEMS = ("diffusion_pytorch_model", "model")  # of diffusers and of transformers
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack")


def find_weights(folder: paths.Path, variant: str = "") -> paths.Path:
    """The safetensors file of a network, or the index of its files.

    Args:
        folder: of the network.
        variant: which one, as "fp16" or "non_ema". "" takes the plain one, and the only variant
            where there is no plain one.

    Raises:
        WeightsError: there is none, or a choice has to be made; says which there are.
    """
    found = _by_variant(folder)
    if variant in found:
        return found[variant]
    if variant:
        has = ", ".join(_label(name) for name in found) or "none"
        raise WeightsError(f"{folder}: no weights of variant {variant!r}; it has: {has}")
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise WeightsError(
            f"{folder}: weights of several variants and none without: {', '.join(found)}; "
            "say which (--variant), or delete the others"
        )
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLES)
    if pickles:
        raise WeightsError(
            f"{folder}: weights only as {', '.join(pickles)}, which sdjax does not read, as a "
            "pickle can run code. Write safetensors where torch is installed: load the pipeline "
            "with from_pretrained(DIR), then save_pretrained(NEW, safe_serialization=True)"
        )
    raise WeightsError(
        f"{folder}: no weights; expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors"
    )


def _by_variant(folder: paths.Path) -> dict[str, paths.Path]:
    """{variant: file}, "" for the plain weights. A single file wins over an index."""
    found: dict[str, paths.Path] = {}
    for stem in STEMS:
        for file in sorted(folder.glob(f"{stem}.*json")):
            middle = file.name.removeprefix(stem).removesuffix(".json").removesuffix(".index")
            # "X.safetensors.index.fp16" or, with an older diffusers, "X.fp16.safetensors.index"
            parts = [part for part in middle.split(".") if part not in ("", "safetensors", "index")]
            if ".safetensors" in middle:
                found[".".join(parts)] = file
        for file in sorted(folder.glob(f"{stem}.*safetensors")):
            middle = file.name.removeprefix(stem).removesuffix("safetensors")
            if "-of-" not in middle:  # not one of several files
                found[middle.strip(".")] = file
    return found


def _label(variant: str) -> str:
    return repr(variant) if variant else "one without a variant"
