"""Which tensor of a single-file checkpoint belongs to what: a network, its average, or nothing.

Training scripts and converters leave tables, counters, losses and heads in such files, which no
network reads. Each is known here by its exact name or by a prefix that holds nothing else. Any
other name may belong to another kind of model, and is an error.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from sdjax.checkpoints.folders import ModelError
from sdjax.families.family import Family, SingleFile
from sdjax.families.registry import FAMILIES
from sdjax.system import paths
from sdjax.system.untrusted import plain

Shapes = Mapping[str, Sequence[int]]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPEN_CLIP = "transformer.", "model."
# Layouts of all families, from the most to the least particular: most text encoders first.
LAYOUTS = sorted(
    ((family, layout) for family in FAMILIES.values() for layout in family.single_files),
    key=lambda pair: -len(pair[1].prefixes),
)
_VAE_PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
_EMA = "model_ema."
_SHOWN = 20  # groups of names that an error shows
# Buffers of ldm/models/diffusion/ddpm.py, ldm/modules/ema.py and sgm's denoiser, counters of
# trainers, and the marks of ComfyUI. None is a weight.
_HARMLESS = frozenset((
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar", "denoiser.sigmas",
    "epoch", "global_step", "model_ema.decay", "model_ema.num_updates", "v_pred", "ztsnr",
))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Contents:
    """The tensors of a file, sorted.

    weights: {name: shape} of the networks.
    averages: names of an average of the UNet, or of an autoencoder that is alone.
    ignored: lines about what no network reads: an exact name, or a prefix with a count.
    """

    weights: Shapes
    averages: tuple[str, ...]
    ignored: tuple[str, ...]


def layout(
    file: paths.Path, shapes: Shapes
) -> tuple[Family | None, SingleFile | None, dict[str, str]]:
    """Return (family, layout, {network: prefix}) of a file; no family of an autoencoder alone.

    Raises:
        ModelError: it has no network of Stable Diffusion.
    """
    has = lambda prefix: any(name.startswith(prefix) for name in shapes)  # noqa: E731
    if "encoder.conv_in.weight" in shapes:
        return None, None, {"vae": ""}
    prefixes = {name: p for name, p in (("unet", UNET), ("vae", VAE)) if has(p)}
    for family, release in LAYOUTS:
        if all(has(prefix) for prefix in release.prefixes.values()):
            return family, release, prefixes | dict(release.prefixes)
    if not prefixes:
        some = ", ".join(map(plain, sorted(shapes)[:4])) or "nothing"
        raise ModelError(
            f"{file}: no Stable Diffusion checkpoint; expected names that begin with {UNET}, {VAE} "
            f"or encoder., found {some}"
        )
    context = shapes.get(f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight", (0, 0))
    width = context[-1] if context else 0
    fitting = [(family, release) for family, release in LAYOUTS if release.width == width]
    return *(fitting[0] if fitting else (None, None)), prefixes


def sort_out(file: paths.Path, shapes: Shapes, prefixes: Mapping[str, str]) -> Contents:
    """Sorts the tensors of a file.

    Raises:
        ModelError: naming tensors that belong to no network and may matter.
    """
    harmless, under = _harmless(prefixes)
    weights: dict[str, Sequence[int]] = {}
    averages: list[str] = []
    ignored: list[str] = []
    unknown: list[str] = []
    for name, shape in shapes.items():
        prefix = next((prefix for prefix in under if name.startswith(prefix)), None)
        scale = name.split(".")[-1] == "logit_scale" and not name.startswith((UNET, VAE))
        if name in harmless or scale:
            ignored.append(name)
        elif prefix is not None:
            ignored.append(f"{prefix}*")
        elif name.startswith(_EMA):
            averages.append(name)
        elif any(within(name, prefix) for prefix in prefixes.values()):
            weights[name] = shape
        else:
            unknown.append(name)
    if unknown:
        raise ModelError(
            f"{file}: sdjax does not know {_named(unknown)}, which may belong to another kind of "
            "model; nothing was read. Remove these if they do not matter"
        )
    return Contents(weights, tuple(averages), tuple(counted(ignored)))


def _harmless(prefixes: Mapping[str, str]) -> tuple[set[str], tuple[str, ...]]:
    """(exact names, prefixes) of what the networks under `prefixes` do not read."""
    names = set(_HARMLESS)
    for encoder, prefix in prefixes.items():
        if encoder in ("unet", "vae"):
            continue
        if is_open_clip(prefix):
            names.add(f"{prefix}attn_mask")
        elif prefix:
            # The head of CLIP-L, which ComfyUI once wrote in one of these places.
            places = (prefix, prefix.removesuffix(_CLIP))
            names |= {f"{p}text_projection{end}" for p in places for end in ("", ".weight")}
    vae = prefixes.get("vae", VAE)
    # Losses of an autoencoder's training. Its average within a pipeline is no part of that.
    return names, (f"{vae}loss.", *([f"{vae}{_EMA}"] if vae else ()))


def counted(labels: Iterable[str]) -> list[str]:
    """Return each label once; those that stand for several tensors with their number."""
    counts = Counter(labels)
    return [
        f"{label} ({count} tensors)" if label.endswith("*") else label
        for label, count in counts.items()
    ]


def _named(names: Iterable[str]) -> str:
    """Return the first name under each first word, and how many more there are."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(name.split(".")[0], []).append(name)
    shown = [
        plain(first) + (f" (and {len(more)} more under {plain(top)}.)" if more else "")
        for top, (first, *more) in list(groups.items())[:_SHOWN]
    ]
    rest = len(groups) - _SHOWN
    return ", ".join([*shown, *([f"and names under {rest} more words"] if rest > 0 else [])])


def whole_average(
    file: paths.Path, network: str, keys: Iterable[str], averages: Sequence[str]
) -> dict[str, str]:
    """{key: name of its average} of every weight of a network; empty if the file has no average.

    LDM drops the dots of the names (ldm/modules/ema.py), which begin at the module it averages:
    the wrapper of the UNet, or an autoencoder.

    Args:
        network: "unet" or "vae".
        keys: names of its weights without its prefix.
        averages: of `Contents`.

    Raises:
        ModelError: the average covers a part of the network, or more than it.
    """
    start = _EMA + ("diffusion_model" if network == "unet" else "")
    # The average of an autoencoder is also one of its losses.
    found = {name for name in averages if network == "unet" or not name.startswith(f"{_EMA}loss")}
    flat = {start + key.replace(".", ""): key for key in keys}
    strange = sorted(found - set(flat))
    if found and (strange or len(found) < len(flat)):
        missing = sorted(set(flat) - found)
        lacks = f", without {missing[0]}" if missing else ""
        more = f", and {len(strange)} that are none of them, as {strange[0]}" if strange else ""
        raise ModelError(
            f"{file}: its average (model_ema.*) has {len(found) - len(strange)} of the {len(flat)} "
            f"weights of the {network}{lacks}{more}; a mixture of both is no model. Take the "
            "weights themselves: sdjax.convert --weights=raw"
        )
    return {flat[name]: name for name in found}


def within(name: str, prefix: str) -> bool:
    """Whether a weight is of the network under a prefix; without one, of an autoencoder."""
    return name.startswith(prefix) if prefix else name.split(".")[0] in _VAE_PARTS


def is_open_clip(prefix: str) -> bool:
    """Whether the encoder under a prefix has the names of OpenCLIP."""
    return prefix.endswith(f".{_OPEN_CLIP}")
