"""A T2I-Adapter that follows edges, for the small model of coloured shapes, on a laptop.

    python -m sdjax.main --config=configs/base.py --workdir=runs/base
    python -m sdjax.main --config=configs/t2i_adapter_tiny.py --workdir=runs/adapter \\
        --config.init_from=runs/base

Conditions are Canny's edges of the pictures themselves, so that no other data are needed. Hardware:
2 CPU cores, 4 GiB.
"""

from sdjax.config import default


def get_config():
    c = default(method="t2i_adapter")

    c.data.name = "captioned_shapes"
    c.data.resolution = 64
    c.data.batch_size = 32
    c.data.images = ({"name": "control", "kind": "condition", "made": "canny"},)

    # Schedule and prediction are those of the model.
    c.objective.timestep_sampling = "cubic"  # Mou et al. 2023, section 3.4
    c.objective.caption_dropout = 0.0
    c.objective.stratified = True

    # As configs/control_tiny.py.
    c.optim.learning_rate = 1e-3
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 50
    c.optim.schedule = "cosine"
    c.ema.profiles = ("warmup-0.999",)

    c.train.steps = 1000
    c.train.log_every = 50
    c.train.sample_every = 250
    c.train.checkpoint_every = 500
    c.validation.examples = 128
    c.validation.train_examples = 0
    c.sample.guidance = 3.0
    c.sample.sampler.steps = 25
    c.sample.sampler.spacing = "trailing"  # as configs/base.py, whose schedule ends in pure noise
    return c
