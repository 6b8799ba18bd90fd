"""A small text-to-image model of emoji, or of any folder of captioned pictures, on a laptop.

    python -m sdjax.main --config=configs/emoji_vae.py --workdir=runs/emoji_vae
    --config.data.path=DIR
    python -m sdjax.main --config=configs/emoji.py --workdir=runs/emoji --config.data.path=DIR \\
        --config.vae_from=runs/emoji_vae

DIR holds pictures and a metadata.jsonl with `file_name` and `text` (or train/ and test/ folders of
that kind). Hardware: 2 CPU cores; docs/emoji.md has its pictures, and how long it takes.
"""

from sdjax.config import default


def get_config():
    c = default()
    c.model.text_encoder.update(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
    )
    c.model.unet.update(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(96, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )
    c.tokenizer.vocab_size = 4096

    c.data.name = "image_text_folder"
    c.data.resolution = 64
    c.data.batch_size = 64

    # Objective and optimizer are those of configs/base.py, for the same reasons.
    c.schedule.zero_terminal_snr = True
    c.objective.prediction_type = "v_prediction"
    c.sample.sampler.spacing = "trailing"
    c.objective.caption_dropout = 0.1
    c.objective.stratified = True

    c.optim.name = "muon"
    c.optim.momentum = 0.95
    c.optim.learning_rate = 2e-3
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 50
    c.optim.schedule = "cosine"
    c.ema.profiles = ("warmup-0.999",)

    c.train.steps = 500
    c.train.log_every = 50
    c.train.sample_every = 250
    c.train.checkpoint_every = 250
    c.validation.every = 125
    c.sample.guidance = 3.0
    c.sample.sampler.steps = 25
    return c
