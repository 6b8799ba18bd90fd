"""An LCM-LoRA in small: few steps for the model of configs/base.py, as a file beside it.

    python -m sdjax.main --config=configs/base.py --workdir=runs/base
    python -m sdjax.main --config=configs/shapes_lcm_lora.py --workdir=runs/lcm_lora \\
        --config.init_from=runs/base

Hardware: 2 CPU cores, 4 GiB. Schedule, prediction and networks are those of the model.
"""

from sdjax.config import default


def get_config():
    c = default(method="lcm_lora")
    c.method.rank = 32
    c.method.guidance = (3.0, 3.0)  # what the model is drawn with; the student reads no scale

    c.data.name = "captioned_shapes"
    c.data.resolution = 64
    c.data.batch_size = 64

    c.objective.stratified = True

    c.optim.learning_rate = 1e-3
    c.optim.weight_decay = 0.0
    c.optim.warmup_steps = 20
    c.optim.schedule = "cosine"
    c.ema.profiles = ("0.95",)  # the target of the loss

    c.train.steps = 600
    c.train.log_every = 50
    c.train.sample_every = 0
    c.train.checkpoint_every = 200
    c.validation.examples = 128
    c.validation.train_examples = 0
    c.sample.guidance = 1.0  # the student has it in itself
    c.sample.sampler.name = "lcm"
    c.sample.sampler.steps = 4
    c.sample.fidelity = 512
    return c
