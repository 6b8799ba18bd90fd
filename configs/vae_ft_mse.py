"""Fine-tune the decoder of a Stable Diffusion VAE as stabilityai/sd-vae-ft-mse was.

    python -m sdjax.main --config=configs/vae_ft_mse.py --workdir=runs/vae_ft_mse \\
        --config.vae_from=VAE_FOLDER --config.data.path=IMAGES \\
        --config.method.lpips_from=vgg16-397923af.pth

The encoder stays as it is to the bit, and so do all latents: every model that draws with the VAE
draws with this one too. Settings are those of the model card: the decoder alone, MSE + 0.1 LPIPS, a
batch of 192, 280,000 steps (from 560,001 to 840,001), and the average of the weights. The card says
nothing of the optimizer or of a critic; both are latent-diffusion's, see configs/vae_kl_f8.py. The
VAE that the card begins with had seen 313,198 steps with L1 + LPIPS (sd-vae-ft-ema):
--config.method.loss=l1 --config.method.lpips_weight=1.0 makes it.

Hardware: 16 accelerators of 40 GB, as the card's; smaller batches take longer and fit one. Full
size is checked here by parameter counts, shapes and losses against PyTorch, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(method="autoencoder")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.method.decoder_only = True
    c.method.loss = "l2"
    c.method.lpips_weight = 0.1
    c.method.reduction = "sum"
    c.method.critic_weight = 0.5
    # Nobody publishes the critic of Stable Diffusion, so it begins anew and learns alone at first.
    c.method.critic_start = 0
    c.method.critic_loss_start = 5000

    c.data.name = "image_text_folder"
    c.data.resolution = 256
    c.data.crop = "random"
    c.data.flip = True
    c.data.batch_size = 192

    c.optim.name = "adam"
    # A guess: latent-diffusion's rule for the 12 pictures of one GPU. For all 192 it gives 8.6e-4,
    # which is much for weights that are good already.
    c.optim.learning_rate = 12 * 4.5e-6
    c.optim.b1 = 0.5
    c.optim.b2 = 0.9
    c.optim.weight_decay = 0.0
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 0
    c.optim.clip_norm = 0.0
    c.ema.profiles = ("0.9999",)

    c.train.steps = 280_000
    c.train.checkpoint_every = 5000
    c.train.sample_every = 2500
    c.validation.every = 5000
    return c
