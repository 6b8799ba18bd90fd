"""The small VAE of the default: 64 px pictures of shapes <-> 8x8x4 latents, reconstruction + KL.

    python -m sdjax.main --config=configs/vae_tiny.py --workdir=runs/vae_tiny

The one that is shipped had its decoder trained further, and was then converted:

    python -m sdjax.main --config=configs/vae_tiny.py --workdir=runs/vae_tiny_decoder \\
        --config.vae_from=runs/vae_tiny --config.method.decoder_only=True \\
        --config.optim.learning_rate=1e-3 --config.train.steps=600
    python -m sdjax.convert --input=runs/vae_tiny_decoder --output=sdjax/models/tiny_vae \\
        --dtype=float16 --force

Hardware: 2 CPU cores.
"""

from sdjax.config import default


def get_config():
    c = default(method="autoencoder")
    c.model.vae.update(
        sample_size=64,
        block_out_channels=(16, 32, 48, 56),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
    )
    c.method.loss = "l1"
    c.method.kl_weight = 1e-6

    c.data.name = "captioned_shapes"
    # With the eight named colours alone, latents of cyan lay on the other side of the background
    # than all others, and a diffusion model had to learn its shapes apart
    # (docs/notes/first_pictures.md).
    c.data.shapes_colours = "any"
    c.data.resolution = 64
    c.data.batch_size = 32

    c.optim.name = "muon"
    c.optim.momentum = 0.95
    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 100
    c.optim.schedule = "cosine"
    c.optim.end_value = 1e-5
    c.optim.weight_decay = 0.0
    c.ema.profiles = ("warmup-0.999",)

    c.train.steps = 1500
    c.train.sample_every = 500
    return c
