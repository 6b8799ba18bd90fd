"""Train an autoencoder of the shape of SD 3's and FLUX.1's: f8, 16 channels, with EQ-VAE.

    python -m sdjax.main --config=configs/vae_16ch.py --workdir=runs/vae_16ch \\
        --config.data.path=IMAGES --config.method.lpips_from=vgg16-397923af.pth

Neither has published how its autoencoder was trained. Losses and optimizer are those of
configs/vae_kl_f8.py, with the regulariser of EQ-VAE (arXiv:2502.09509) at its authors' shares: four
times the numbers in each latent make pictures sharper and latents harder to model, which it mends.
They draw one of 24 scales; here are three, each of which is a program of its own.
--config.method.equivariance=0 --config.method.smaller_pictures=0 leaves it out.

Hardware: one accelerator of 80 GB. Full size is checked here by parameter counts, shapes and losses
against PyTorch, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(method="autoencoder")
    # vae/config.json of stable-diffusion-3-medium-diffusers; scale and shift are measured at the
    # end (docs/autoencoders.md).
    c.model.vae.update(
        sample_size=256,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
    )
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.method.loss = "l1"
    c.method.reduction = "sum"
    c.method.kl_weight = 1e-6
    c.method.lpips_weight = 1.0
    c.method.critic_weight = 0.5
    c.method.critic_start = 45_001
    c.method.critic_loss_start = 50_001
    c.method.equivariance = 0.5
    c.method.smaller_pictures = 0.25
    c.method.equivariance_scales = (0.25, 0.5, 0.75)

    c.data.name = "image_text_folder"
    c.data.resolution = 256
    c.data.crop = "random"
    c.data.flip = True
    c.data.batch_size = 24

    c.optim.name = "adam"
    c.optim.learning_rate = 24 * 4.5e-6
    c.optim.b1 = 0.5
    c.optim.b2 = 0.9
    c.optim.weight_decay = 0.0
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 0
    c.optim.clip_norm = 0.0
    c.ema.profiles = ("0.9999",)

    c.train.steps = 250_000
    c.train.checkpoint_every = 5000
    c.train.sample_every = 2500
    c.validation.every = 5000
    return c
