"""Stable Diffusion XL base: the UNet from nothing, or from a diffusers folder.

    # continue from a checkpoint, all networks and the schedule read from the folder
    python -m sdjax.main --config=configs/sdxl.py --workdir=runs/sdxl --config.init_from=DIR \\
        --config.data.path=IMAGES --config.mesh.fsdp=8
    # from nothing: the VAE and both text encoders still come from folders
    python -m sdjax.main --config=configs/sdxl.py --workdir=runs/sdxl --config.vae_from=DIR/vae \\
        --config.text_encoder_from=DIR --config.data.path=IMAGES --config.mesh.fsdp=8

The last stage of Podell et al. 2023 (SDXL, sections 2.2 to 2.5): aspect-ratio buckets of about 1024
x 1024 pixels, offset noise 0.05, batch 2,048, conditioned on original size and crop. Their first
two stages are --config.data.resolution=256 (600,000 steps) and 512 (200,000 steps) with
--config.data.buckets.step=0 --config.objective.offset_noise=0. They give no learning rate; this one
is that of SD 1.5. Parameters, two moments and an EMA are 41 GB in float32, so shard them (fsdp).
Full size is checked here by parameter count, shapes and FLOPs, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(
        family="sdxl"
    )  # whose text encoder is CLIP-L, and whose noise schedule is SDXL's too
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.buckets.step = 64
    c.data.crop = "random"
    c.data.flip = True
    c.data.batch_size = 2048

    c.objective.caption_dropout = 0.1
    c.objective.offset_noise = 0.05

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 10_000
    c.optim.groups = ((r"^text_encoder", 0.0),)  # both frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 200_000
    c.train.log_every = 100
    c.train.checkpoint_every = 5000
    c.train.sample_every = 5000
    c.train.keep_every = 50_000
    c.sample.guidance = 5.0  # the default of diffusers' pipeline
    return c
