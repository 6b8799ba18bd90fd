"""SDXL in small: two text encoders, pooled text and time ids, on coloured shapes, on a laptop.

    python -m sdjax.main --config=configs/sdxl_tiny.py --workdir=runs/sdxl_tiny

Hardware: 2 CPU cores, 4 GiB. For trying out what is SDXL's, and for the tests; for pictures take
configs/base.py.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl")
    c.vae_from = "tiny"

    encoder = dict(
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=24,
    )
    c.model.text_encoder.update(encoder, hidden_size=64)
    c.model.text_encoder_2 = {
        **c.model.text_encoder.to_dict(),
        "hidden_size": 96,
        "hidden_act": "gelu",
        "projection_dim": 48,
    }
    c.model.unet.update(
        sample_size=8,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=64 + 96,
        attention_head_dim=(2, 4),  # diffusers' name for the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=48 + 6 * 32,
    )
    c.tokenizer.vocab_size = 600

    c.data.name = "captioned_shapes"
    c.data.resolution = 64
    c.data.shapes_pairs = 0.2
    c.data.batch_size = 32

    c.objective.weighting = "min_snr"
    c.objective.caption_dropout = 0.1
    c.objective.stratified = True

    c.optim.learning_rate = 1e-3
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 200
    c.optim.schedule = "cosine"
    c.ema.profiles = ("warmup-0.999",)

    c.train.steps = 1500
    c.train.sample_every = 500
    c.train.checkpoint_every = 500
    c.sample.guidance = 3.0
    c.sample.sampler.steps = 25
    return c
