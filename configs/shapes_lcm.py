"""Few steps in small: the model of configs/base.py, distilled so that 4 steps draw its pictures.

    python -m sdjax.main --config=configs/base.py --workdir=runs/base
    python -m sdjax.main --config=configs/shapes_lcm.py --workdir=runs/lcm \\
        --config.init_from=runs/base

Hardware: 2 CPU cores, 4 GiB. Schedule, prediction and networks are those of the model.
"""

from sdjax.config import default


def get_config():
    c = default(method="lcm")
    c.method.guidance = (2.0, 4.0)  # around the 3 that the model is drawn with
    c.method.guidance_width = 64

    c.data.name = "captioned_shapes"
    c.data.resolution = 64
    c.data.batch_size = 64

    c.objective.stratified = True

    c.optim.learning_rate = 3e-4
    c.optim.weight_decay = 0.0
    c.optim.warmup_steps = 20
    c.optim.schedule = "cosine"
    c.ema.profiles = ("0.95",)  # of diffusers' script; the target of the loss

    c.train.steps = 600
    c.train.log_every = 50
    c.train.sample_every = 200
    c.train.checkpoint_every = 200
    c.validation.examples = 128
    c.validation.train_examples = 0
    c.sample.guidance = 1.0  # the student has it in itself
    c.sample.embedded_guidance = 3.0
    c.sample.sampler.name = "lcm"
    c.sample.sampler.steps = 4
    c.sample.fidelity = 512
    return c
