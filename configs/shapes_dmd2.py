"""Distribution matching (DMD2) in small: the model of configs/base.py in two steps.

    python -m sdjax.main --config=configs/base.py --workdir=runs/base
    python -m sdjax.main --config=configs/shapes_dmd2.py --workdir=runs/dmd2 \\
        --config.init_from=runs/base

Hardware: 2 CPU cores, 4 GiB. Schedule, prediction and networks are those of the model.
"""

from sdjax.config import default


def get_config():
    c = default(method="dmd")
    c.method.student_steps = 2  # 999 and 499
    c.method.teacher_guidance = 3.0  # what the model is drawn with
    c.method.fake_updates = 2
    c.method.gan_weight = 1e-2
    c.method.head_weight = 1e-1

    c.data.name = "captioned_shapes"
    c.data.resolution = 64
    c.data.batch_size = 16

    c.optim.learning_rate = 3e-4
    c.optim.weight_decay = 0.0
    c.optim.warmup_steps = 10
    c.ema.profiles = ()

    c.train.steps = 250
    c.train.log_every = 10
    c.train.sample_every = 0
    c.train.checkpoint_every = 125
    c.validation.examples = 0
    c.sample.guidance = 1.0  # the student has it in itself
    c.sample.sampler.name = "lcm"
    c.sample.sampler.steps = c.method.student_steps
    c.sample.sampler.original_steps = 100
    c.sample.fidelity = 512
    return c
