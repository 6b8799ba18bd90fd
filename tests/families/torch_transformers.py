"""Tiny pipelines of diffusers for SD3 and FLUX.1, with random weights."""

import diffusers
import tokenizers
import transformers
from transformers import T5TokenizerFast

from tests.conftest import randomise

WORDS = ("a red circle", "a blue square", "a green star and a small red circle")
LENGTH = 12  # of T5's tokens


def t5_tokenizer(folder):
    """A unigram tokenizer of these words, as transformers saves it for T5."""
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram())
    unigram.normalizer = tokenizers.normalizers.Nmt()
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    unigram.decoder = tokenizers.decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    unigram.train_from_iterator(list(WORDS) * 10, trainer)
    unigram.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    made = T5TokenizerFast(
        tokenizer_object=unigram, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_ids=0, model_max_length=LENGTH,
    )  # fmt: skip
    made.save_pretrained(folder)
    return made


def t5(vocab_size):
    """A T5 encoder of width 24."""
    config = transformers.T5Config(
        vocab_size=vocab_size, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


def clip(first, width, projection):
    """A CLIP text encoder with the vocabulary of a tokenizer."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(first), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=first.bos_token_id,
        eos_token_id=first.eos_token_id, projection_dim=projection or 8,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def vae():
    """16 px to 8 x 8 x 4 latents, with a shift and without the convolutions around them."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16), norm_num_groups=4, sample_size=16, latent_channels=4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5, shift_factor=0.06,
    )  # fmt: skip


def sd3(first, folder, *, with_t5=True):
    """`StableDiffusion3Pipeline` of SD3.5-medium's kind: dual attention in the first block."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24,
        caption_projection_dim=32, pooled_projection_dim=14, pos_embed_max_size=12,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    words = t5_tokenizer(folder)
    parts = dict(
        transformer=transformer,
        vae=vae(),
        text_encoder=clip(first, 8, 6),
        text_encoder_2=clip(first, 12, 8),
        text_encoder_3=t5(len(words)) if with_t5 else None,
    )
    for seed, model in enumerate(model for model in parts.values() if model is not None):
        randomise(model.eval(), 20 + seed)
    pipeline = diffusers.StableDiffusion3Pipeline(
        **parts, tokenizer=first, tokenizer_2=first, tokenizer_3=words if with_t5 else None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux(first, folder, *, dev=True):
    """`FluxPipeline` of dev (embedded guidance, dynamic shifting) or of schnell."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=12,
        guidance_embeds=dev, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    words = t5_tokenizer(folder)
    parts = dict(
        transformer=transformer, vae=vae(), text_encoder=clip(first, 12, None),
        text_encoder_2=t5(len(words)),
    )  # fmt: skip
    for seed, model in enumerate(parts.values()):
        randomise(model.eval(), 30 + seed)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0 if dev else 1.0, use_dynamic_shifting=dev
    )
    pipeline = diffusers.FluxPipeline(
        **parts, tokenizer=first, tokenizer_2=words, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
