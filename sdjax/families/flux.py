"""FLUX.1: a transformer of double and single blocks, CLIP's pooled caption, T5's tokens.

The text tokens are the last states of T5, whose padding is not masked: `max_sequence_length` is
part of what the network learns. The pooled caption is CLIP-L's normed last state at the caption's
end, without a projection. "dev" has learned how guided pictures look; it takes the strength of the
guidance as a number, which is 1 in training (diffusers pipeline_flux.py, docs of kohya's trainer).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.errors import UserError
from sdjax.families import flux_files, sd, sd3
from sdjax.families.adapter_names import AdapterNames
from sdjax.families.conditioning import MOST_TOKENS
from sdjax.families.config import ModelConfig
from sdjax.families.family import (
    EDITS,
    FILLS,
    FOLLOWS,
    GUIDANCE,
    Context,
    Family,
    Features,
    Model,
    Networks,
    Part,
    Reading,
)
from sdjax.families.flux_names import flux_blocks, flux_places, xlabs_respelled
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.config import check
from sdjax.models.flux.config import PATCH, FluxConfig
from sdjax.models.flux.network import Flux, mask_channels
from sdjax.models.t5 import T5Config, T5Encoder
from sdjax.models.vae import VAEConfig

CLIP, T5 = "text_encoder", "text_encoder_2"
PARTS = {
    "transformer": Part(Flux, FluxConfig, "FluxTransformer2DModel"),
    CLIP: sd.PARTS["text_encoder"],
    T5: Part(
        T5Encoder, T5Config, "t5", tokens="tokens_2", tokenizer="tokenizer_2",
        tokenizer_kind="t5", length_setting="max_sequence_length",
        tied={"encoder.embed_tokens.weight": "shared.weight"},
    ),
    "vae": sd3.PARTS["vae"],
}  # fmt: skip

# transformer/config.json of black-forest-labs/FLUX.1-dev, -schnell, -Fill-dev and -Canny-dev.
DEV = FluxConfig(guidance_embeds=True)
SCHNELL = FluxConfig(guidance_embeds=False)
FILL = FluxConfig(in_channels=384, out_channels=64, guidance_embeds=True)
CONTROL = FluxConfig(in_channels=128, out_channels=64, guidance_embeds=True)
VAE_FLUX = dataclasses.replace(
    sd3.VAE_SD3,
    scaling_factor=flux_files.SCALING_FACTOR,
    shift_factor=flux_files.SHIFT_FACTOR,
)
TRAINED_GUIDANCE = 1.0


@dataclasses.dataclass(frozen=True)
class FluxModelConfig(ModelConfig):
    """The networks of FLUX.1; the defaults are those of dev."""

    parts = PARTS

    family: str = "flux"
    transformer: FluxConfig = DEV
    vae: VAEConfig = VAE_FLUX
    text_encoder: CLIPTextConfig = CLIPTextConfig()
    text_encoder_2: T5Config = T5Config()
    # Tokens of T5. They are not masked: another number is another input. Of schnell it is 256.
    max_sequence_length: int = 512
    # The transformer edits a reference picture. Its shape is that of dev: folders say it, by the
    # class of their pipeline, and files do not.
    kontext: bool = False

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
    pairs = (
        ("joint_attention_dim", T5, "d_model"),
        ("pooled_projection_dim", CLIP, "hidden_size"),
    )
    for own, name, width in pairs:
        if name not in model.networks:
            raise UserError(
                f"model.{name} is missing: the transformer takes what it makes of text; name a "
                "folder or file with the text encoders in config.text_encoder_from"
            )
        found = getattr(model.networks[name], width)
        if getattr(transformer, own) != found:
            raise UserError(
                f"model.transformer.{own} is {getattr(transformer, own)}, but model.{name}.{width} "
                f"is {found}"
            )


def embed(
    networks: Networks,
    params: Mapping[str, jax.Array],
    tokens: Mapping[str, jax.Array],
    *,
    empty: Callable[[], jax.Array],
    key: jax.Array | None,
) -> Features:
    """Return T5's states and CLIP's pooled caption; see `Embed`."""
    clip, words = networks.module(CLIP, params), tokens[PARTS[CLIP].tokens]
    return {
        "context": networks.module(T5, params)(tokens[PARTS[T5].tokens]),
        "pooled": clip.pooled(clip.normed(clip.hidden_states(words, key=key)[-1]), words),
    }


def context(
    networks: Networks,
    features: Features,
    batch: Mapping[str, jax.Array],
    *,
    target: tuple[int, int],
    negative: bool,
) -> Context:
    """Return the features, and the strength of guidance where the transformer takes one.

    batch may have "guidance" float32 [B]; see `MakeContext`.
    """
    if not networks.denoiser.guidance_embeds:
        return features
    count = len(features["pooled"])
    return {**features, GUIDANCE: batch.get(GUIDANCE, jnp.full(count, TRAINED_GUIDANCE))}


def _picture_and_mask(mask: jax.Array | None, latents: jax.Array) -> jax.Array:
    """The rest of the picture, then each pixel of the mask (diffusers pipeline_flux_fill.py)."""
    assert mask is not None
    side = mask.shape[1] // latents.shape[1]
    return jnp.concatenate([latents, mask_channels(mask, side)], axis=-1)


READINGS = {
    FILLS: Reading(
        lambda latent, side: latent + side**2, _picture_and_mask, field="channels", sampled=True
    ),
    FOLLOWS: Reading(lambda latent, side: latent, field="channels", sampled=True),
    EDITS: Reading(lambda latent, side: 0, field="reference", setting="kontext"),
}


def pipeline_class(model: Model) -> str:
    """Return the class of diffusers that draws with a model."""
    transformer = model.networks["transformer"]
    added = transformer.added_channels
    if added:
        kind = "Control" if added == transformer.latent_channels else "Fill"
    else:
        kind = "Kontext" if model.settings.get("kontext") else ""
    return f"Flux{kind}Pipeline"


def settings_of_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return that a model is Kontext, if the pipeline's class says so."""
    cls = index.get("_class_name")
    return {"kontext": True} if isinstance(cls, str) and cls.startswith("FluxKontext") else {}


def adapter_facts(model: Model) -> dict[str, str]:
    """Return what a LoRA's metadata says of its model, as kohya's trainer writes it.

    Sources: kohya-ss/sd-scripts, library/sai_model_spec.py and flux_utils.py.
    """
    guided = model.networks["transformer"].guidance_embeds
    return {
        "ss_base_model_version": "flux1",
        "ss_v2": "False",
        "modelspec.architecture": f"flux-1-{'dev' if guided else 'schnell'}",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
    }


FLUX = Family(
    name="flux",
    title="FLUX.1",
    config=FluxModelConfig,
    parts=PARTS,
    denoiser="transformer",
    fixed=("max_sequence_length", "kontext"),
    encodes=("max_sequence_length",),
    halvings=lambda networks: 1,
    check=check_model,
    embed=embed,
    context=context,
    features=("context", "pooled"),
    numbers={},
    pipelines=tuple(
        f"Flux{kind}Pipeline"
        for kind in ("", "Img2Img", "Inpaint", "Fill", "Control", "Kontext", "KontextInpaint")
    ),
    pipeline_class=pipeline_class,
    index=lambda model: {"image_encoder": [None, None], "feature_extractor": [None, None]},
    settings_of_index=settings_of_index,
    # The pipelines give levels of their own, from 1 to 1 / steps.
    scheduler_changes=lambda pipeline: {"timestep_spacing": "trailing"},
    single_files=(flux_files.DEV_FILE, flux_files.SCHNELL_FILE),
    single_file=lambda model: "dev" if model.networks["transformer"].guidance_embeds else "schnell",
    latent_channels=lambda denoiser: denoiser.latent_channels + denoiser.added_channels,
    reads_guidance=lambda networks: networks["transformer"].guidance_embeds,
    readings=READINGS,
    widened=lambda denoiser, count: dataclasses.replace(
        denoiser,
        in_channels=denoiser.in_channels + PATCH**2 * count,
        out_channels=denoiser.outputs,
    ),
    # T5's prefix is ComfyUI's, which has the second encoder of others in between.
    adapters=AdapterNames(
        {CLIP: "lora_te1", T5: "lora_te3"},
        flux_places,
        native=True,
        entrance="x_embedder",
        facts=adapter_facts,
        respelled=xlabs_respelled,
        blocks=functools.partial(flux_blocks, texts={CLIP: "CLIP", T5: "T5"}),
    ),
    presets={
        "base": FluxModelConfig(),
        "dev": FluxModelConfig(),
        "schnell": FluxModelConfig(transformer=SCHNELL, max_sequence_length=256),
        "fill": FluxModelConfig(transformer=FILL),
        "control": FluxModelConfig(transformer=CONTROL),
        "kontext": FluxModelConfig(kontext=True),
    },
    defaults={
        "schedule.kind": "flow",
        "objective.prediction_type": "flow",
        "objective.timestep_sampling": "logit_normal",
        "sample.sampler.name": "flow_euler",
        "sample.sampler.spacing": "trailing",
        "sample.sampler.steps": 28,
        "sample.guidance": 1.0,
        "sample.embedded_guidance": 3.5,
    },
)
