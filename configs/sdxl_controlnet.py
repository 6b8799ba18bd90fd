"""Train a ControlNet for Stable Diffusion XL on captioned pictures, each with its condition.

    python -m sdjax.main --config=configs/sdxl_controlnet.py --workdir=runs/control \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

As configs/sd15_controlnet.py. The ControlNet has 1.25 billion parameters: with two moments,
gradients and an average 25 GB, beside 6.9 GB of frozen networks in bfloat16. Hardware: one
accelerator of 80 GB, or several with --config.mesh.fsdp. Full size is checked here by parameter
count and shapes, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl", method="control")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.images = ({"name": "control", "key": "edge", "kind": "condition"},)
    c.data.buckets.step = 64
    c.data.flip = True
    c.data.batch_size = 32  # see configs/sd15_controlnet.py
    c.train.accumulation = 8

    c.objective.caption_dropout = 0.5

    c.optim.learning_rate = 1e-5  # README_sdxl.md of diffusers' examples/controlnet
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 500
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 15_000  # the same
    c.train.checkpoint_every = 1000
    c.train.sample_every = 500
    c.sample.guidance = 5.0
    return c
