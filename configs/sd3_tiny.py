"""Stable Diffusion 3 in small: joint attention over words and patches, on coloured shapes.

    python -m sdjax.main --config=configs/sd3_tiny.py --workdir=runs/sd3_tiny

Hardware: 2 CPU cores, 4 GiB. Rectified flow, two CLIP encoders and a T5, all from nothing, on the
latents of the small VAE that comes with sdjax. For trying out what is SD3's, and for the tests.
"""

from sdjax.config import default


def get_config():
    c = default(family="sd3", preset="sd3_medium")
    c.vae_from = "tiny"

    encoder = dict(
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,  # the longest caption takes 17
    )
    c.model.text_encoder.update(encoder, hidden_size=48, projection_dim=48)
    c.model.text_encoder_2.update(encoder, hidden_size=48, projection_dim=48)
    c.model.text_encoder_3.update(d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4)
    c.model.max_sequence_length = 20
    c.model.transformer.update(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        patch_size=1,  # the latents of 64 px are 8 x 8
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=96,
        caption_projection_dim=128,
        pooled_projection_dim=96,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    c.tokenizer.vocab_size = 640

    c.data.name = "captioned_shapes"
    c.data.resolution = 64
    c.data.batch_size = 64

    c.objective.caption_dropout = 0.1
    c.objective.stratified = True

    c.optim.name = "muon"
    c.optim.momentum = 0.95
    c.optim.learning_rate = 2e-3
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 50
    c.optim.schedule = "cosine"
    c.ema.profiles = ("warmup-0.999",)

    c.train.steps = 1500
    c.train.log_every = 50
    c.train.sample_every = 500
    c.train.checkpoint_every = 500
    c.validation.examples = 128
    c.validation.train_examples = 128
    c.sample.guidance = 3.0
    c.sample.fidelity = 512
    return c
