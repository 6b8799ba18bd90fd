"""Few steps in small: the model of configs/base.py, whose 16 steps are halved to one.

    python -m sdjax.main --config=configs/base.py --workdir=runs/base
    python -m sdjax.main --config=configs/shapes_progressive.py --workdir=runs/progressive \\
        --config.init_from=runs/base

Hardware: 2 CPU cores, 4 GiB. Schedule, prediction and networks are those of the model.
"""

from sdjax.config import default


def get_config():
    c = default(method="progressive")
    # A stage for guidance, then students of 8, 4, 2 and 1 steps.
    c.method.steps = (8, 4, 2, 1)
    c.method.stage_steps = 100
    c.method.guidance = (2.0, 4.0)  # around the 3 that the model is drawn with
    c.method.guidance_width = 64

    c.data.name = "captioned_shapes"
    c.data.resolution = 64
    c.data.batch_size = 64

    c.objective.stratified = True

    c.optim.learning_rate = 3e-4
    c.optim.schedule = "linear"  # to 0 within each stage, as published
    c.optim.cycle_steps = c.method.stage_steps
    c.optim.warmup_steps = 10
    c.ema.profiles = ()

    c.train.steps = 500
    c.train.log_every = 50
    c.train.sample_every = 0
    c.train.checkpoint_every = c.method.stage_steps
    c.train.keep_every = c.method.stage_steps  # the student of each stage
    c.validation.examples = 0  # what a student learns is no mean of pictures
    c.sample.guidance = 1.0  # the student has it in itself
    c.sample.embedded_guidance = 3.0
    c.sample.sampler.spacing = "trailing"
    c.sample.sampler.steps = 1
    c.sample.sampler.distilled = True
    c.sample.fidelity = 512
    return c
