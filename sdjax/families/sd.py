"""Stable Diffusion 1 and 2: one UNet, one VAE, one CLIP text encoder.

The UNet reads the normed last state of the text encoder (SD2's encoder comes without its last
layer, so that this is the last but one; Stability's v2-inference.yaml, layer: penultimate).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.diffusion.schedules import ScheduleConfig
from sdjax.errors import UserError
from sdjax.families import ldm_configs, ldm_files, ldm_names
from sdjax.families.adapter_names import AdapterNames, unet_blocks
from sdjax.families.config import ModelConfig
from sdjax.families.family import (
    EDITS,
    FILLS,
    GUIDANCE,
    Context,
    Family,
    Features,
    Model,
    Networks,
    Part,
    Reading,
)
from sdjax.families.single_file import Shapes, SingleFile
from sdjax.models.clip import CLIPText, CLIPTextConfig, has_projection
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import VAE, VAEConfig

CLIP_SKIP = "_sdjax_clip_skip"  # in model_index.json
KINDS = ("", "Img2Img", "Inpaint", "InstructPix2Pix")  # of pipelines
SCALING_FACTOR = 0.18215  # vae/config.json; LDM, appendix G


def takes_numbers(data: Mapping[str, Any]) -> bool:
    """Whether the config.json of a UNet is of one that takes numbers about the picture."""
    return data.get("addition_embed_type") == "text_time"


def clip_surplus(config: CLIPTextConfig, key: str) -> str:
    """Return the label of a weight of a whole CLIPModel that its text encoder lacks, or ""."""
    head = ("text_projection.weight",) if config.projection_dim is None else ()
    if key in ("logit_scale", "visual_projection.weight", *head):
        return key
    return "vision_model.*" if key.startswith("vision_model.") else ""


def pooled_at_eos(config: CLIPTextConfig, tokenizer: Any) -> CLIPTextConfig:
    """Return the config of an encoder that pools at the EOS of a tokenizer with added tokens.

    A config with eos_token_id = 2 pools at the highest id of a caption, which is EOS only as long
    as no token was added after it (huggingface/transformers#24650).
    """
    largest = getattr(tokenizer, "largest_id", None)  # stand-ins have no ids
    if config.eos_token_id != 2 or largest is None or tokenizer.eos_id == largest:
        return config
    return dataclasses.replace(config, eos_token_id=tokenizer.eos_id)


PARTS = {
    "unet": Part(UNet, UNetConfig, "UNet2DConditionModel", lambda data: not takes_numbers(data)),
    "text_encoder": Part(
        CLIPText, CLIPTextConfig, "clip_text_model", lambda data: not has_projection(data),
        tokens="tokens", tokenizer="tokenizer", prefix="text_model.",
        surplus=clip_surplus, fitted=pooled_at_eos,
    ),
    "vae": Part(VAE, VAEConfig, "AutoencoderKL"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SDConfig(ModelConfig):
    """The networks of Stable Diffusion 1 and 2; the defaults are SD1.5's."""

    parts = PARTS

    family: str = "sd"
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text_encoder: CLIPTextConfig = CLIPTextConfig()
    # SD1 alone: which state of the text encoder the UNet reads, counted from the end, normed. 2 for
    # descendants of NAI's model; diffusers calls that clip_skip=1.
    clip_skip: int = 1


# stabilityai/stable-diffusion-2-1-base, unet/config.json
UNET_SD2 = UNetConfig(
    attention_head_dim=(5, 10, 20, 20),  # heads per level, each of 64 channels
    cross_attention_dim=1024,
    use_linear_projection=True,
)
# stabilityai/stable-diffusion-2-1: 768 px
UNET_SD2_V = UNetConfig(
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    sample_size=96,
    upcast_attention=True,
    use_linear_projection=True,
)
# text_encoder/config.json of both: OpenCLIP ViT-H/14 without its last layer
CLIP_H = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
)


def halvings(networks: Mapping[str, Any]) -> int:
    """Return how often the UNet halves latents."""
    return len(networks["unet"].block_out_channels) - 1


def check(model: Model) -> None:
    """Check that text encoder and UNet belong together.

    Raises:
        UserError: naming the fields that do not.
    """
    unet, encoder = model.networks["unet"], model.networks.get("text_encoder")
    if encoder is None:
        raise UserError(
            "model.text_encoder is missing: text-to-image training and drawing take one"
        )
    if unet.addition_embed_type is not None:
        raise UserError(
            f"model.unet.addition_embed_type is {unet.addition_embed_type!r}, which is of the "
            "family 'sdxl', but model.family is 'sd'; expected None"
        )
    skip = model.settings.get("clip_skip", 1)
    most = encoder.num_hidden_layers if encoder.hidden_act == "quick_gelu" else 1
    if not 1 <= skip <= most:
        raise UserError(
            f"model.clip_skip is {skip}; expected 1 to {most}"
            + (", for SD2's text encoder comes without its last layer" if most == 1 else "")
        )
    if unet.cross_attention_dim != encoder.hidden_size:
        raise UserError(
            f"model.unet.cross_attention_dim is {unet.cross_attention_dim}, but "
            f"model.text_encoder.hidden_size is {encoder.hidden_size}"
        )


def embed(
    networks: Networks,
    params: Mapping[str, jax.Array],
    tokens: Mapping[str, jax.Array],
    *,
    empty: Callable[[], jax.Array],
    key: jax.Array | None,
) -> Features:
    """Return the last state of the text encoder, or an earlier one, normed; see `Embed`."""
    encoder = networks.module("text_encoder", params)
    states = encoder.hidden_states(tokens["tokens"], key=key)
    return {"context": encoder.normed(states[-networks.settings.get("clip_skip", 1)])}


def context(
    networks: Networks,
    features: Features,
    batch: Mapping[str, jax.Array],
    *,
    target: tuple[int, int],
    negative: bool,
) -> Context:
    """Return the text, and the strength of guidance where the UNet reads it; see `MakeContext`."""
    if not reads_guidance({"unet": networks.denoiser}):
        return features["context"]
    return {**features, **guidance(features, batch)}


def guidance(features: Features, batch: Mapping[str, jax.Array]) -> Features:
    """Return the strength of guidance of a batch; 1 is none."""
    return {GUIDANCE: batch.get(GUIDANCE, jnp.ones(len(features["context"])))}


def reads_guidance(networks: Mapping[str, Any]) -> bool:
    """Return whether the UNet was distilled to draw guided pictures from a number."""
    return networks["unet"].time_cond_proj_dim is not None


def pipeline_class(model: Model) -> str:
    """Return the class of diffusers that draws with a model."""
    return f"StableDiffusion{reading(model)}Pipeline"


def inpaints(model: Model) -> bool:
    """Whether the UNet takes latents, a mask and masked latents."""
    unet = model.networks["unet"]
    return unet.in_channels == 2 * unet.out_channels + 1


def reading(model: Model) -> str:
    """Return the word for the UNet's other inputs in the name of a pipeline, or ""."""
    unet = model.networks["unet"]
    edits = unet.in_channels == 2 * unet.out_channels
    return "Inpaint" if inpaints(model) else "InstructPix2Pix" if edits else ""


def _mask_and_picture(mask: jax.Array | None, latents: jax.Array) -> jax.Array:
    """The mask, then the rest of the picture (diffusers pipeline_stable_diffusion_inpaint.py).

    The mask of a latent is its pixel at the top left, as torch's nearest `interpolate` takes it.
    """
    assert mask is not None
    side = mask.shape[1] // latents.shape[1]
    return jnp.concatenate([mask[:, ::side, ::side], latents], axis=-1)


READINGS = {
    FILLS: Reading(lambda latent, side: latent + 1, _mask_and_picture, sampled=True),
    # Of mode and not scaled, as InstructPix2Pix (its pipeline, prepare_image_latents).
    EDITS: Reading(lambda latent, side: latent, scaled=False, guided=True),
}


def index(model: Model) -> dict[str, Any]:
    """Return entries of model_index.json: no safety checker, and a clip skip other than 1."""
    skip = model.settings.get("clip_skip", 1)
    return {
        **({CLIP_SKIP: skip} if skip != 1 else {}),
        # The pipeline for inpainting refuses an index without a version above 0.5.1
        # (pipeline_loading_utils.py, _maybe_raise_warning_for_inpainting).
        **({"_diffusers_version": "0.6.0"} if inpaints(model) else {}),
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }


def settings_of_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return the clip skip that a model_index.json of sdjax's says."""
    skip = index.get(CLIP_SKIP)
    return {"clip_skip": skip} if isinstance(skip, int) and skip >= 1 else {}


def scheduler_changes(pipeline: str) -> dict[str, Any]:
    """Return what a pipeline of diffusers corrects in a scheduler file that it reads.

    The constructors in pipelines/stable_diffusion/ correct files from before diffusers 0.5: all but
    InstructPix2Pix set steps_offset to 1, those that do not inpaint clip_sample to False, the one
    that does skip_prk_steps to True.
    """
    if pipeline == "StableDiffusionInstructPix2PixPipeline":
        return {}
    if pipeline == "StableDiffusionInpaintPipeline":
        return {"steps_offset": 1, "skip_prk_steps": True}
    return {"steps_offset": 1, "clip_sample": False}


def _vae(sample_size: int) -> Callable[[Shapes, str], Any]:
    return lambda shapes, prediction: ldm_configs.vae_config(
        shapes, scaling_factor=SCALING_FACTOR, sample_size=sample_size
    )


def _unet_sd2(shapes: Shapes, prediction: str) -> UNetConfig:
    large = prediction == "v_prediction"  # the 768 px models
    return ldm_configs.unet_config(shapes, sample_size=96 if large else 64, upcast=large)


def _vae_sd2(shapes: Shapes, prediction: str) -> VAEConfig:
    return _vae(768 if prediction == "v_prediction" else 512)(shapes, prediction)


def _objective_sd2(shapes: Shapes) -> tuple[ScheduleConfig, str]:
    schedule, prediction = ldm_files.objective(shapes)
    return schedule, prediction if prediction == "v_prediction" else ""


_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
SD1_FILE = SingleFile(
    name="sd1",
    networks={
        "unet": ldm_files.unet(lambda shapes, _: ldm_configs.unet_config(shapes, sample_size=64)),
        "text_encoder": ldm_files.clip(_CLIP, lambda shapes, _: ldm_configs.clip_config(shapes)),
        "vae": ldm_files.vae(_vae(512)),
    },
    tells=ldm_files.text_tells(_CLIP, width=768),
    objective=ldm_files.objective,
    scaling_factor=SCALING_FACTOR,
    leftover=ldm_files.leftover,
)
SD2_FILE = SingleFile(
    name="sd2",
    networks={
        "unet": ldm_files.unet(_unet_sd2),
        "text_encoder": ldm_files.open_clip(
            _OPEN_CLIP, lambda shapes, _: ldm_configs.open_clip_config(shapes, penultimate=True)
        ),
        "vae": ldm_files.vae(_vae_sd2),
    },
    tells=ldm_files.text_tells(_OPEN_CLIP, width=1024),
    objective=_objective_sd2,
    scaling_factor=SCALING_FACTOR,
    question="a Stable Diffusion 2 file does not say what its UNet predicts; give "
    "--prediction_type, epsilon for the 512 px models (2-base, 2.1-base), v_prediction for the "
    "768 px ones",
    leftover=ldm_files.leftover,
)


def adapter_facts(model: Model) -> dict[str, str]:
    """Return what a LoRA's metadata says of its model, as kohya's trainer writes it.

    Sources: kohya-ss/sd-scripts, library/train_util.py (get_sai_model_spec) and train_network.py.
    """
    second = model.networks["unet"].cross_attention_dim == UNET_SD2.cross_attention_dim
    v = model.prediction_type == "v_prediction"
    release = "stable-diffusion-v1" if not second else f"stable-diffusion-v2-{768 if v else 512}"
    return {
        "ss_base_model_version": f"sd_v{2 if second else 1}" + "_v" * v,
        "ss_v2": str(second),
        "modelspec.architecture": release + "-v" * (second and v),
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "v" if v else "epsilon",
    }


SD = Family(
    name="sd",
    title="SD1 and SD2",
    config=SDConfig,
    parts=PARTS,
    denoiser="unet",
    fixed=("clip_skip",),
    encodes=("clip_skip",),
    halvings=halvings,
    check=check,
    embed=embed,
    context=context,
    features=("context",),
    numbers={},
    pipelines=tuple(f"StableDiffusion{kind}Pipeline" for kind in KINDS),
    pipeline_class=pipeline_class,
    index=index,
    settings_of_index=settings_of_index,
    scheduler_changes=scheduler_changes,
    single_files=(SD2_FILE, SD1_FILE),
    single_file=lambda model: (
        "sd1" if model.networks["text_encoder"].hidden_act == "quick_gelu" else "sd2"
    ),
    reads_guidance=reads_guidance,
    readings=READINGS,
    adapters=AdapterNames(
        {"text_encoder": "lora_te"},
        ldm_names.unet_places,
        entrance="conv_in",
        facts=adapter_facts,
        blocks=functools.partial(unet_blocks, ends=False),
        ranks_by_block=True,
    ),
    presets={
        "base": SDConfig(),
        "sd2": SDConfig(unet=UNET_SD2, text_encoder=CLIP_H),
        "sd2_v": SDConfig(unet=UNET_SD2_V, text_encoder=CLIP_H),
    },
)  # fmt: skip
