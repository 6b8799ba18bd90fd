"""Inpainting in small: the model of coloured shapes learns to fill masks, on a laptop.

    python -m sdjax.main --config=configs/base.py --workdir=runs/base
    python -m sdjax.main --config=configs/inpaint_tiny.py --workdir=runs/inpaint \\
        --config.init_from=runs/base

Its UNet is given five channels: the mask, and the latents of the masked picture. Hardware: 2 CPU
cores, 4 GiB.
"""

from sdjax.config import default


def get_config():
    c = default(method="inpaint")

    c.data.name = "captioned_shapes"
    c.data.resolution = 64
    c.data.batch_size = 32

    # Schedule and prediction are those of the model.
    c.objective.caption_dropout = 0.1
    c.objective.stratified = True

    # As configs/base.py, at half of its rate: most of the network knows its task.
    c.optim.name = "muon"
    c.optim.momentum = 0.95
    c.optim.learning_rate = 1e-3
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 20
    c.optim.schedule = "cosine"
    c.optim.groups = ((r"^text_encoder\.", 0.0),)
    c.ema.profiles = ("warmup-0.999",)

    c.train.steps = 600
    c.train.log_every = 50
    c.train.sample_every = 300
    c.train.checkpoint_every = 300
    c.validation.examples = 128
    c.validation.train_examples = 0
    c.sample.guidance = 3.0
    c.sample.sampler.steps = 25
    c.sample.sampler.spacing = "trailing"  # as configs/base.py, whose schedule ends in pure noise
    return c
