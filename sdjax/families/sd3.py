"""Stable Diffusion 3 and 3.5: an MMDiT, three text encoders, a VAE of 16 channels.

The text tokens are rows of two kinds, one after the other: the last but one states of both CLIP
encoders side by side, padded with zeros to T5's width, then the last states of T5. The pooled
caption is the projected ends of both CLIP encoders (Esser et al. 2024, section 4; diffusers
pipeline_stable_diffusion_3.py). Padding is not masked, so the number of T5's tokens is part of what
the network learns: `max_sequence_length`. A model without T5 has rows of zeros in their place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.errors import UserError
from sdjax.families import sd, sd3_files, sdxl
from sdjax.families.adapter_names import AdapterNames
from sdjax.families.conditioning import MOST_TOKENS
from sdjax.families.config import ModelConfig
from sdjax.families.family import Context, Family, Features, Model, Networks, Part
from sdjax.families.sd3_names import sd3_places
from sdjax.models.clip import CLIPText, CLIPTextConfig, has_projection
from sdjax.models.config import check
from sdjax.models.mmdit.network import MMDiT, MMDiTConfig
from sdjax.models.t5 import T5Config, T5Encoder
from sdjax.models.vae import VAEConfig

CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
PARTS = {
    "transformer": Part(MMDiT, MMDiTConfig, "SD3Transformer2DModel"),
    "text_encoder": Part(
        CLIPText, CLIPTextConfig, "clip_text_model", has_projection,
        tokens="tokens", tokenizer="tokenizer", prefix="text_model.", surplus=sd.clip_surplus,
        fitted=sd.pooled_at_eos,
    ),
    "text_encoder_2": sdxl.PARTS["text_encoder_2"],
    T5: Part(
        T5Encoder, T5Config, "t5", tokens="tokens_3", tokenizer="tokenizer_3",
        tokenizer_kind="t5", length_setting="max_sequence_length",
        tied={"encoder.embed_tokens.weight": "shared.weight"},
    ),
    "vae": dataclasses.replace(sd.PARTS["vae"], filled={"shift_factor": 0.0}),
}  # fmt: skip

# transformer/config.json of stabilityai/stable-diffusion-3-medium, -3.5-medium and -3.5-large;
# turbo has the shape of large.
SD3_MEDIUM = MMDiTConfig()
SD35_MEDIUM = MMDiTConfig(
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
)
SD35_LARGE = MMDiTConfig(
    num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
)
# text_encoder/config.json: CLIP-L with a projection.
CLIP_L = CLIPTextConfig(projection_dim=768)
# vae/config.json of all of them.
VAE_SD3 = VAEConfig(
    sample_size=1024,
    latent_channels=16,
    scaling_factor=sd3_files.SCALING_FACTOR,
    shift_factor=sd3_files.SHIFT_FACTOR,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


@dataclasses.dataclass(frozen=True)
class SD3Config(ModelConfig):
    """The networks of Stable Diffusion 3; the defaults are those of SD3.5-medium."""

    parts = PARTS

    family: str = "sd3"
    transformer: MMDiTConfig = SD35_MEDIUM
    vae: VAEConfig = VAE_SD3
    text_encoder: CLIPTextConfig = CLIP_L
    text_encoder_2: CLIPTextConfig = sdxl.CLIP_BIGG
    text_encoder_3: T5Config | None = T5Config()  # None: zeros in place of its states
    # Tokens of T5. They are not masked: another number is another input. Pipelines of diffusers
    # draw with 256; 512 is the most that they take.
    max_sequence_length: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        length = self.max_sequence_length
        check(
            2 <= length <= MOST_TOKENS, "model.max_sequence_length", length, f"2 to {MOST_TOKENS}"
        )


def check_model(model: Model) -> None:
    """Check that text encoders and transformer belong together.

    Raises:
        UserError: naming the fields that do not.
    """
    transformer = model.networks["transformer"]
    clips = []
    for name in CLIPS:
        if name not in model.networks:
            raise UserError(
                f"model.{name} is missing: the transformer takes its pooled captions; name a "
                "folder or file with the text encoders in config.text_encoder_from"
            )
        if model.networks[name].projection_dim is None:
            raise UserError(
                f"model.{name}.projection_dim is None; expected the encoder with its projection"
            )
        clips.append(model.networks[name])
    width, pooled = transformer.joint_attention_dim, transformer.pooled_projection_dim
    if T5 in model.networks and model.networks[T5].d_model != width:
        raise UserError(
            f"model.transformer.joint_attention_dim is {width}, but model.{T5}.d_model is "
            f"{model.networks[T5].d_model}"
        )
    found = sum(clip.hidden_size for clip in clips)
    if found > width:
        raise UserError(
            f"model.transformer.joint_attention_dim is {width}, but the hidden_size of both CLIP "
            f"encoders add up to {found}"
        )
    found = sum(clip.projection_dim for clip in clips)
    if found != pooled:
        raise UserError(
            f"model.transformer.pooled_projection_dim is {pooled}, but the projection_dim of both "
            f"CLIP encoders add up to {found}"
        )


def embed(
    networks: Networks,
    params: Mapping[str, jax.Array],
    tokens: Mapping[str, jax.Array],
    *,
    empty: Callable[[], jax.Array],
    key: jax.Array | None,
) -> Features:
    """Return the text tokens and the pooled caption; see `Embed`."""
    states, pooled = [], []
    for i, name in enumerate(CLIPS):
        encoder = networks.module(name, params)
        own = None if key is None else jax.random.fold_in(key, i)
        state, projected = encoder.penultimate(tokens[PARTS[name].tokens], key=own)
        states.append(state)
        pooled.append(projected)
    clip = jnp.concatenate(states, axis=-1)  # [B, L, D_L + D_G]
    width = networks.denoiser.joint_attention_dim
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, width - clip.shape[-1])))
    if T5 in networks.configs:
        t5 = networks.module(T5, params)(tokens[PARTS[T5].tokens])
    else:
        length = networks.settings.get("max_sequence_length", SD3Config.max_sequence_length)
        t5 = jnp.zeros((len(clip), length, width), clip.dtype)
    return {
        "context": jnp.concatenate([clip, t5], axis=1),  # [B, L + max_sequence_length, width]
        "pooled": jnp.concatenate(pooled, axis=-1),
    }


def context(
    networks: Networks,
    features: Features,
    batch: Mapping[str, jax.Array],
    *,
    target: tuple[int, int],
    negative: bool,
) -> Context:
    """Return the features, which are all that the transformer reads; see `MakeContext`."""
    return features


def pipeline_class(model: Model) -> str:
    """Return the class of diffusers that draws with a model."""
    transformer = model.networks["transformer"]
    inpaints = transformer.in_channels != transformer.out_channels
    return f"StableDiffusion3{'Inpaint' if inpaints else ''}Pipeline"


def index(model: Model) -> dict[str, Any]:
    """Return entries of model_index.json: no image encoder, and what is missing of T5."""
    entries: dict[str, Any] = {"image_encoder": [None, None], "feature_extractor": [None, None]}
    if T5 not in model.networks:
        entries |= {T5: [None, None], PARTS[T5].tokenizer: [None, None]}
    return entries


def adapter_facts(model: Model) -> dict[str, str]:
    """Return what a LoRA's metadata says of its model, as kohya's trainer writes it.

    Source: kohya-ss/sd-scripts, library/sd3_utils.py (analyze_state_dict_state).
    """
    transformer = model.networks["transformer"]
    large = transformer.num_layers == SD35_LARGE.num_layers
    release = "5-medium" if transformer.dual_attention_layers else "5-large" if large else "medium"
    return {
        "ss_base_model_version": release,
        "ss_v2": "False",
        "modelspec.architecture": f"stable-diffusion-3-{release}",
        "modelspec.implementation": "diffusers",
    }


SD3 = Family(
    name="sd3",
    title="SD3 and SD3.5",
    config=SD3Config,
    parts=PARTS,
    denoiser="transformer",
    fixed=("max_sequence_length",),
    encodes=("max_sequence_length",),
    halvings=lambda networks: networks["transformer"].patch_size.bit_length() - 1,
    check=check_model,
    embed=embed,
    context=context,
    features=("context", "pooled"),
    numbers={},
    pipelines=tuple(f"StableDiffusion3{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint")),
    pipeline_class=pipeline_class,
    index=index,
    settings_of_index=lambda index: {},
    scheduler_changes=lambda pipeline: {},
    single_files=(sd3_files.SD3_FILE,),
    single_file=lambda model: "sd3",
    presets={
        "base": SD3Config(),
        "sd35_medium": SD3Config(),
        "sd35_large": SD3Config(transformer=SD35_LARGE),
        "sd3_medium": SD3Config(transformer=SD3_MEDIUM),
    },
    skips_layers=True,
    adapters=AdapterNames(
        {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", T5: "lora_te3"},
        sd3_places,
        native=True,
        entrance="pos_embed.proj",
        facts=adapter_facts,
    ),
    # scheduler/scheduler_config.json; guidance as Stability's cards advise for SD3.5-medium.
    defaults={
        "schedule.kind": "flow",
        "schedule.shift": 3.0,
        "objective.prediction_type": "flow",
        "objective.timestep_sampling": "logit_normal",
        "sample.sampler.name": "flow_euler",
        "sample.sampler.steps": 28,
        "sample.guidance": 5.0,
    },
)
