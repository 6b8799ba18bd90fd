"""An expert for some noise levels: the model of configs/base.py, trained further on those alone.

    python -m sdjax.main --config=configs/shapes_expert.py --workdir=runs/noisy \\
        --config.init_from=runs/base --config.objective.timestep_min=500
    python -m sdjax.main --config=configs/shapes_expert.py --workdir=runs/clear \\
        --config.init_from=runs/base --config.objective.timestep_max=500
    python -m sdjax.sample --model=runs/base --expert=runs/noisy --expert=runs/clear \\
        --prompts="a large red circle" --output=out

As in eDiff-I (Balaji et al. 2022, arXiv:2211.01324, section 4.1): experts begin from one model, and
each sees the noise levels of its interval alone. Without an interval it is the same training at all
levels, to compare with. Hardware: 2 CPU cores, 4 GiB.
"""

from sdjax.config import default


def get_config():
    c = default()
    c.data.name = "captioned_shapes"
    c.data.resolution = 64
    c.data.batch_size = 64

    c.objective.caption_dropout = 0.1
    c.objective.stratified = True

    # As in configs/base.py, at a quarter of its rate.
    c.optim.name = "muon"
    c.optim.momentum = 0.95
    c.optim.learning_rate = 5e-4
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 10
    c.optim.schedule = "cosine"
    c.ema.profiles = ("warmup-0.99",)

    c.train.steps = 200
    c.train.log_every = 20
    c.train.sample_every = 0
    c.train.checkpoint_every = 200
    c.validation.every = 0
    c.validation.examples = 128
    c.validation.train_examples = 0
    c.sample.guidance = 3.0
    c.sample.sampler.spacing = "trailing"  # as of configs/base.py
    c.sample.sampler.steps = 25
    return c
