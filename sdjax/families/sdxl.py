"""SDXL and its refiner: two text encoders, a pooled caption, and numbers about the picture.

The UNet is told the last but one states of both encoders, side by side, the projected end of the
caption from the second ("pooled"), and six numbers, the time ids: original height and width, top
and left of the crop, height and width of the picture (Podell et al. 2023, sections 2.2; diffusers
pipeline_stable_diffusion_xl.py). The refiner has the second encoder alone, and an aesthetic score
in the place of the last two numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.errors import UserError
from sdjax.families import ldm_configs, ldm_files, ldm_names, sd
from sdjax.families.adapter_names import AdapterNames, unet_blocks
from sdjax.families.config import ModelConfig
from sdjax.families.family import (
    Context,
    Family,
    Features,
    Model,
    Networks,
    Part,
)
from sdjax.families.single_file import FileNetwork, SingleFile
from sdjax.models.clip import CLIPText, CLIPTextConfig, has_projection
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import VAEConfig

SCALING_FACTOR = 0.13025  # vae/config.json
_SECOND_KEY = 2**16 + 1  # of dropout in the second encoder
PARTS = {
    "unet": Part(UNet, UNetConfig, "UNet2DConditionModel", sd.takes_numbers),
    "text_encoder": sd.PARTS["text_encoder"],
    "text_encoder_2": Part(
        CLIPText, CLIPTextConfig, "clip_text_model", has_projection,
        tokens="tokens_2", tokenizer="tokenizer_2", prefix="text_model.",
        surplus=sd.clip_surplus, fitted=sd.pooled_at_eos,
    ),
    "vae": sd.PARTS["vae"],
}  # fmt: skip


# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
UNET_SDXL = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,  # CLIP-L's 768 and OpenCLIP-bigG's 1280
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,  # 1280 + 6 x 256
)
# stabilityai/stable-diffusion-xl-refiner-1.0
UNET_SDXL_REFINER = UNetConfig(
    sample_size=128,
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    attention_head_dim=(6, 12, 24, 24),
    transformer_layers_per_block=4,
    cross_attention_dim=1280,  # OpenCLIP-bigG alone
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2560,  # 1280 + 5 x 256
)
# text_encoder_2/config.json of both: OpenCLIP ViT-bigG/14 with its projection. text_encoder/ of the
# base is CLIP-L, as in SD1.
CLIP_BIGG = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
# vae/config.json of both. Its activations overflow float16, which is what `force_upcast` tells the
# pipelines of diffusers; sdjax computes in float32 or bfloat16, which has float32's range.
VAE_SDXL = VAEConfig(sample_size=1024, scaling_factor=SCALING_FACTOR)


@dataclasses.dataclass(frozen=True)
class SDXLConfig(ModelConfig):
    """The networks of SDXL; the defaults are those of its base."""

    parts = PARTS

    family: str = "sdxl"
    unet: UNetConfig = UNET_SDXL
    vae: VAEConfig = VAE_SDXL
    text_encoder: CLIPTextConfig | None = CLIPTextConfig()  # None for the refiner
    text_encoder_2: CLIPTextConfig = CLIP_BIGG  # with a projection
    # An empty caption is zeros, in training and drawing, and not the encoding of ""
    # (force_zeros_for_empty_prompt in model_index.json).
    zero_empty_prompt: bool = True
    # The score that a refiner is told of every picture, and of what guidance leads away from.
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5


def check(model: Model) -> None:
    """Check that text encoders and UNet belong together.

    Raises:
        UserError: naming the fields that do not.
    """
    encoders, unet = model.text_encoders, model.networks["unet"]
    second = encoders.get("text_encoder_2")
    pooled = second.projection_dim if second is not None else None
    if pooled is None:
        raise UserError(
            "model.unet takes a pooled caption: expected a model.text_encoder_2 with a "
            "projection_dim"
        )
    if unet.addition_embed_type is None:
        raise UserError(
            "model.unet.addition_embed_type is None, which is of the family 'sd', but "
            "model.family is 'sdxl'; expected 'text_time'"
        )
    if len({encoder.max_position_embeddings for encoder in encoders.values()}) > 1:
        raise UserError(
            "max_position_embeddings of model.text_encoder and model.text_encoder_2 differ; "
            "expected equal ones, for their states go side by side"
        )
    names = " + ".join(f"model.{name}.hidden_size" for name in encoders)
    width = sum(encoder.hidden_size for encoder in encoders.values())
    if unet.cross_attention_dim != width:
        raise UserError(
            f"model.unet.cross_attention_dim is {unet.cross_attention_dim}, but {names} is {width}"
        )
    count_time_ids(unet, pooled)


def count_time_ids(unet: UNetConfig, pooled: int) -> int:
    """Return how many numbers the UNet is told, beside a pooled caption of `pooled` channels.

    6 for SDXL, 5 for its refiner.

    Raises:
        UserError: the widths leave room for neither.
    """
    width, sinusoids = unet.projection_class_embeddings_input_dim, unet.addition_time_embed_dim
    assert width and sinusoids
    count, rest = divmod(width - pooled, sinusoids)
    if rest or count not in (5, 6):
        raise UserError(
            f"model.unet.projection_class_embeddings_input_dim = {width}: expected pooled text of "
            f"{pooled} + 5 or 6 times addition_time_embed_dim = {sinusoids}"
        )
    return count


def embed(
    networks: Networks,
    params: Mapping[str, jax.Array],
    tokens: Mapping[str, jax.Array],
    *,
    empty: Callable[[], jax.Array],
    key: jax.Array | None,
) -> Features:
    """Return the states of both encoders, and the pooled caption; see `Embed`."""
    states, pooled = [], None
    for i, name in enumerate(networks.configs):
        encoder = networks.module(name, params)
        own = key if key is None or i == 0 else jax.random.fold_in(key, _SECOND_KEY)
        state, projected = encoder.penultimate(tokens[PARTS[name].tokens], key=own)
        states.append(state)
        pooled = projected if projected is not None else pooled
    assert pooled is not None
    text = {"context": jnp.concatenate(states, axis=-1), "pooled": pooled}
    if networks.settings.get("zero_empty_prompt"):
        none = empty()
        text = {
            name: jnp.where(none.reshape(-1, *[1] * (value.ndim - 1)), 0.0, value)
            for name, value in text.items()
        }
    return text


def context(
    networks: Networks,
    features: Features,
    batch: Mapping[str, jax.Array],
    *,
    target: tuple[int, int],
    negative: bool,
) -> Context:
    """Return text, pooled text and time ids; see `MakeContext`.

    batch may have "size" int32 [B, 4], original height and width, top and left of the crop; by
    default an original of the target's size, whole.
    """
    count = len(features["pooled"])
    size = batch.get("size", jnp.asarray([[*target, 0, 0]] * count))
    last: tuple[float, ...] = target
    if "text_encoder" not in networks.configs:  # the refiner
        score = "negative_aesthetic_score" if negative else "aesthetic_score"
        last = (networks.settings.get(score, getattr(SDXLConfig, score)),)
    rows = jnp.broadcast_to(jnp.asarray(last, jnp.float32), (count, len(last)))
    ids = jnp.concatenate([jnp.asarray(size, jnp.float32), rows], axis=1)
    told = sd.guidance(features, batch) if sd.reads_guidance({"unet": networks.denoiser}) else {}
    return {**features, **told, "numbers": ids}


def _refines(model: Model) -> bool:
    return "text_encoder" not in model.networks


def pipeline_class(model: Model) -> str:
    """Return the class of diffusers that draws with a model."""
    kind = sd.reading(model) or ("Img2Img" if _refines(model) else "")
    return f"StableDiffusionXL{kind}Pipeline"


def index(model: Model) -> dict[str, Any]:
    """Return entries of model_index.json: no image encoder; what a refiner lacks and needs."""
    entries: dict[str, Any] = {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "force_zeros_for_empty_prompt": model.settings.get("zero_empty_prompt", True),
    }
    if _refines(model):
        entries |= {"text_encoder": [None, None], "tokenizer": [None, None]}
        entries["requires_aesthetics_score"] = True
    return entries


def settings_of_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a model_index.json says, or leaves to the default of diffusers."""
    return {"zero_empty_prompt": bool(index.get("force_zeros_for_empty_prompt", True))}


def adapter_facts(model: Model) -> dict[str, str]:
    """Return what a LoRA's metadata says of its model, as kohya's trainer writes it."""
    release = "refiner" if _refines(model) else "base"
    return {
        "ss_base_model_version": f"sdxl_{release}_v1-0",
        "ss_v2": "False",
        "modelspec.architecture": f"stable-diffusion-xl-v1-{release}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "v" if model.prediction_type == "v_prediction" else "epsilon",
    }


def _open_clip(prefix: str) -> FileNetwork:
    return ldm_files.open_clip(
        prefix, lambda shapes, _: ldm_configs.open_clip_config(shapes, penultimate=False)
    )


_UNET_IN_FILE = ldm_files.unet(lambda shapes, _: ldm_configs.unet_config(shapes, sample_size=128))
_VAE_IN_FILE = ldm_files.vae(
    lambda shapes, _: ldm_configs.vae_config(
        shapes, scaling_factor=SCALING_FACTOR, sample_size=1024
    )
)
_FIRST, _SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_ONLY = "conditioner.embedders.0.model."  # of the refiner
BASE_FILE = SingleFile(
    name="sdxl",
    networks={
        "unet": _UNET_IN_FILE,
        "text_encoder": ldm_files.clip(_FIRST, lambda shapes, _: ldm_configs.clip_config(shapes)),
        "text_encoder_2": _open_clip(_SECOND),
        "vae": _VAE_IN_FILE,
    },
    tells=ldm_files.text_tells(_FIRST, _SECOND, width=2048),
    objective=ldm_files.objective,
    scaling_factor=SCALING_FACTOR,
    settings={"zero_empty_prompt": True},
    leftover=ldm_files.leftover,
    marks=ldm_files.marks,
)
REFINER_FILE = dataclasses.replace(
    BASE_FILE,
    name="refiner",
    networks={
        "unet": _UNET_IN_FILE,
        "text_encoder_2": _open_clip(_ONLY),
        "vae": _VAE_IN_FILE,
    },
    tells=ldm_files.text_tells(_ONLY, width=1280),
    settings={"zero_empty_prompt": False},  # as Stability's model_index.json
)
SDXL = Family(
    name="sdxl",
    title="SDXL",
    config=SDXLConfig,
    parts=PARTS,
    denoiser="unet",
    fixed=("zero_empty_prompt",),
    encodes=("zero_empty_prompt",),
    halvings=sd.halvings,
    check=check,
    embed=embed,
    context=context,
    features=("context", "pooled"),
    numbers={"size": (4,)},
    pipelines=tuple(f"StableDiffusionXL{kind}Pipeline" for kind in sd.KINDS),
    pipeline_class=pipeline_class,
    index=index,
    settings_of_index=settings_of_index,
    scheduler_changes=lambda pipeline: {},
    single_files=(BASE_FILE, REFINER_FILE),
    single_file=lambda model: "refiner" if _refines(model) else "sdxl",
    reads_guidance=sd.reads_guidance,
    readings=sd.READINGS,
    adapters=AdapterNames(
        {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        ldm_names.unet_places,
        native=True,
        entrance="conv_in",
        facts=adapter_facts,
        blocks=functools.partial(unet_blocks, ends=True),
        ranks_by_block=True,
    ),
    presets={
        "base": SDXLConfig(),
        "refiner": SDXLConfig(unet=UNET_SDXL_REFINER, text_encoder=None, zero_empty_prompt=False),
    },
)  # fmt: skip
