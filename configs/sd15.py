"""Stable Diffusion 1.5: the UNet from nothing, or from a diffusers folder.

    # continue from a checkpoint, all networks and the schedule read from the folder
    python -m sdjax.main --config=configs/sd15.py --workdir=runs/sd15 --config.init_from=DIR \\
        --config.data.path=IMAGES
    # from nothing: the VAE and CLIP-L still come from folders
    python -m sdjax.main --config=configs/sd15.py --workdir=runs/sd15 --config.vae_from=DIR/vae \\
        --config.text_encoder_from=DIR --config.data.path=IMAGES

Recipe of the CompVis/RunwayML model cards: AdamW 1e-4, batch 2,048, 10,000 steps of warm-up then
constant, caption dropout 0.1, EMA 0.9999, 512 px. Hardware: 32 x A100 there; set batch_size and
train.accumulation to yours. Full size is checked here by parameter count and shapes, not by a
whole run.
"""

from sdjax.config import default


def get_config():
    c = default()  # whose networks, schedule and objective are those of SD 1.5
    c.model.dtype = "bfloat16"

    c.data.name = "image_text_folder"
    c.data.resolution = 512
    c.data.crop = "random"
    c.data.flip = True
    c.data.batch_size = 2048

    c.objective.caption_dropout = 0.1

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 10_000
    c.optim.groups = ((r"^text_encoder\.", 0.0),)  # frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 500_000
    c.train.log_every = 100
    c.train.checkpoint_every = 5000
    c.train.sample_every = 5000
    c.train.keep_every = 50_000
    c.mesh.fsdp = 1
    return c
