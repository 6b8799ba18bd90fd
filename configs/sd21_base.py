"""Stable Diffusion 2.1-base: 512 px, epsilon prediction, OpenCLIP-H text encoder.

    python -m sdjax.main --config=configs/sd21_base.py --workdir=runs/sd21 \\
        --config.vae_from=DIR/vae --config.text_encoder_from=DIR --config.data.path=IMAGES

From nothing, with the recipe of the Stability/MosaicML replications: AdamW 1e-4, weight decay
0.01, batch 2,048, 10,000 steps of warm-up then constant, global-norm clipping at 1 (without which
it diverges now and then), caption dropout 0.1. `--config.init_from=DIR` continues from a diffusers
folder instead. Full size is checked here by parameter count and shapes, not by a whole run.
"""

from sdjax.config import default


def get_config():
    c = default(preset="sd2")
    c.model.dtype = "bfloat16"

    c.data.name = "image_text_folder"
    c.data.resolution = 512
    c.data.crop = "random"
    c.data.flip = True
    c.data.batch_size = 2048

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 10_000
    c.optim.clip_norm = 1.0
    c.optim.groups = ((r"^text_encoder\.", 0.0),)  # frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 1_400_000
    c.train.log_every = 100
    c.train.checkpoint_every = 5000
    c.train.sample_every = 10_000
    c.train.keep_every = 50_000
    return c
