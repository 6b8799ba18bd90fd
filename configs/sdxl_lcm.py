"""Distil Stable Diffusion XL, or a model that was fine-tuned from it, to 1 to 8 steps (LCM).

    python -m sdjax.main --config=configs/sdxl_lcm.py --workdir=runs/lcm \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

The data are pictures with captions such as the model was trained on; the teacher is the model
itself, frozen. Hardware: 8 GPUs or TPU chips of 80 GB, or more of 32 GB, by mesh.fsdp.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl", preset="base", method="lcm")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"
    c.mesh.fsdp = 8

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.crop = "center"
    c.data.flip = True
    c.data.batch_size = 96
    c.train.accumulation = 6

    # As configs/sd15_lcm.py, with the w of 3 to 15 of the paper's SDXL release.
    c.method.guidance = (4.0, 16.0)
    c.model.unet.time_cond_proj_dim = c.method.guidance_width
    c.optim.learning_rate = 8e-6
    c.optim.weight_decay = 0.0
    c.ema.profiles = ("0.95",)

    c.train.steps = 4000
    c.train.checkpoint_every = 500
    c.train.sample_every = 500
    c.sample.guidance = 1.0
    c.sample.embedded_guidance = 8.5
    c.sample.sampler.name = "lcm"
    c.sample.sampler.steps = 4
    return c
