"""Train the autoencoder of Stable Diffusion from nothing: f8, 4 channels, with LPIPS and a critic.

    python -m sdjax.main --config=configs/vae_kl_f8.py --workdir=runs/vae_kl_f8 \\
        --config.data.path=IMAGES --config.method.lpips_from=vgg16-397923af.pth

IMAGES is a folder of pictures, whose captions are not read. docs/autoencoders.md says what each
term does and how its curve looks.

Losses and optimizer are those of latent-diffusion's configs/autoencoder/autoencoder_kl_32x32x4.yaml
(kl-f8): batch 12, two of which are accumulated for each GPU. With a critic nothing is accumulated
here, so the batch is 24; the learning rate is theirs by its own rule, 4.5e-6 for each picture of
the batch (main.py, scale_lr).

Hardware: one accelerator of 80 GB. Full size is checked here by parameter counts, shapes and losses
against PyTorch, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(method="autoencoder")  # the shape of the VAE is that of SD 1.5
    c.model.vae.sample_size = 256
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.method.loss = "l1"
    c.method.reduction = "sum"
    c.method.kl_weight = 1e-6
    c.method.lpips_weight = 1.0
    c.method.critic_weight = 0.5  # times the adaptive weight
    # The critic learns for some thousand steps before it counts, which theirs does not: one that
    # enters untrained can break the autoencoder.
    c.method.critic_start = 45_001
    c.method.critic_loss_start = 50_001

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

    c.train.steps = 246_803  # of the first VAE of Stable Diffusion
    c.train.checkpoint_every = 5000
    c.train.sample_every = 2500
    c.validation.every = 5000
    return c
