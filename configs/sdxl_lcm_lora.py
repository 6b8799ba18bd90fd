"""An LCM-LoRA of Stable Diffusion XL, or of a model that was fine-tuned from it: 2 to 8 steps.

    python -m sdjax.main --config=configs/sdxl_lcm_lora.py --workdir=runs/lcm_lora \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

The data are pictures with captions such as the model was trained on. Hardware: one GPU or TPU chip
of 40 GB or more.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl", preset="base", method="lcm_lora")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.crop = "center"
    c.data.flip = True

    # diffusers, examples/consistency_distillation/README.md: rank 64, 1e-4, a batch of 12, huber.
    c.method.rank = 64
    c.method.guidance = (4.0, 16.0)
    c.data.batch_size = 12
    c.train.accumulation = 12
    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 0.0
    c.ema.profiles = ()  # the target is the student itself

    c.train.steps = 1000
    c.train.checkpoint_every = 250
    c.train.sample_every = 250
    c.sample.guidance = 1.0
    c.sample.sampler.name = "lcm"
    c.sample.sampler.steps = 4
    return c
