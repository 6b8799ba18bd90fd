"""Stable Diffusion XL's refiner: the last 200 of 1,000 noise levels, one text encoder.

    python -m sdjax.main --config=configs/sdxl_refiner.py --workdir=runs/refiner \\
        --config.init_from=REFINER_FOLDER --config.data.path=IMAGES --config.mesh.fsdp=8
    # from nothing: VAE and OpenCLIP-bigG of an SDXL folder
    python -m sdjax.main --config=configs/sdxl_refiner.py --workdir=runs/refiner \\
        --config.vae_from=DIR/vae --config.text_encoder_from=DIR --config.data.path=IMAGES

Podell et al. 2023 (SDXL), section 2.5: it learns the first 200 discrete noise scales only. In place
of the target size its time ids have an aesthetic score: every picture counts as
model.aesthetic_score, 6 by default, so choose pictures that deserve it. Pictures drawn while it
trains start from pure noise, which it does not learn, so they say little; judge it by its loss, or
behind a base model in diffusers' StableDiffusionXLImg2ImgPipeline. Full size is checked here by
parameter count and shapes, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl", preset="refiner")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.buckets.step = 64
    c.data.crop = "random"
    c.data.flip = True
    c.data.batch_size = 256

    c.objective.timestep_max = 200
    c.objective.caption_dropout = 0.1

    c.optim.learning_rate = 1e-5
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 1000
    c.optim.groups = ((r"^text_encoder", 0.0),)  # frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 100_000
    c.train.log_every = 100
    c.train.checkpoint_every = 5000
    c.train.sample_every = 0
    c.sample.guidance = 5.0
    return c
