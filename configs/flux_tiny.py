"""FLUX.1 in small: double and single blocks with rotary positions, on coloured shapes.

    python -m sdjax.main --config=configs/flux_tiny.py --workdir=runs/flux_tiny

Hardware: 2 CPU cores, 4 GiB. Rectified flow, a CLIP encoder and a T5, all from nothing, on the
latents of the small VAE that comes with sdjax. For trying out what is FLUX.1's, and for the tests.
"""

from sdjax.config import default


def get_config():
    c = default(family="flux", preset="schnell")
    c.vae_from = "tiny"

    encoder = dict(
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,  # the longest caption takes 17
    )
    c.model.text_encoder.update(encoder, hidden_size=48)
    c.model.text_encoder_2.update(d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4)
    c.model.max_sequence_length = 20
    c.model.transformer.update(
        in_channels=16,  # squares of 2 x 2 latents of 4 channels
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=4,
        attention_head_dim=32,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=96,
        pooled_projection_dim=48,
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
