"""The VAE of configs/emoji.py: 64 px pictures <-> 8x8x16 latents, reconstruction + KL.

python -m sdjax.main --config=configs/emoji_vae.py --workdir=runs/emoji_vae --config.data.path=DIR
"""

from sdjax.config import default


def get_config():
    c = default(method="autoencoder")
    c.model.vae.update(
        sample_size=64,
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,  # as many numbers as 16x16x4, at a quarter of the UNet's work
    )
    c.method.loss = "l1"
    c.method.kl_weight = 1e-6

    c.data.name = "image_text_folder"
    c.data.resolution = 64
    c.data.batch_size = 32

    c.optim.name = "muon"
    c.optim.momentum = 0.95
    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 100
    c.optim.schedule = "cosine"
    c.optim.end_value = 1e-5
    c.ema.profiles = ("warmup-0.999",)

    c.train.steps = 1000
    c.train.sample_every = 500
    return c
