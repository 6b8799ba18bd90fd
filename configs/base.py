"""The embedded default: a small text-to-image model of coloured shapes, from nothing, on a laptop.

    python -m sdjax.main --config=configs/base.py --workdir=runs/base

Hardware: 2 CPU cores, 4 GiB. It generates its own captioned pictures, and trains a CLIP-style text
encoder and a UNet on the latents of the small VAE that comes with sdjax (configs/vae_tiny.py makes
it).
"""

from sdjax.config import default


def get_config():
    c = default()
    c.vae_from = "tiny"

    c.model.text_encoder.update(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,  # the longest caption takes 17
    )
    c.model.unet.update(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )
    c.tokenizer.vocab_size = 640  # with 600, rare words such as "below" are spelled in letters

    c.data.name = "captioned_shapes"
    c.data.resolution = 64
    c.data.batch_size = 64

    # What a caption says of places is learned where the noise hides the picture. v-prediction gives
    # these timesteps a say, and without a signal in the last one drawing begins as training did.
    c.schedule.zero_terminal_snr = True
    c.objective.prediction_type = "v_prediction"
    c.sample.sampler.spacing = "trailing"
    c.objective.caption_dropout = 0.1
    c.objective.stratified = True

    # After five minutes of one core 76 % of places are right; with AdamW, 12 %, which is chance
    # (docs/notes/first_pictures.md).
    c.optim.name = "muon"
    c.optim.momentum = 0.95
    c.optim.learning_rate = 2e-3
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 50
    c.optim.schedule = "cosine"
    c.ema.profiles = ("warmup-0.999",)

    c.train.steps = 1700
    c.train.log_every = 50
    c.train.sample_every = 425
    c.train.checkpoint_every = 425
    c.validation.examples = 128  # a validation then takes some seconds
    c.validation.train_examples = 128
    c.sample.guidance = 3.0
    c.sample.sampler.steps = 25
    c.sample.fidelity = 512
    return c
