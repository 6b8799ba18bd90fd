"""Diffusion-DPO in small: pairs of pictures teach the model of configs/base.py what somebody likes.

    python -m sdjax.main --config=configs/shapes_dpo.py --workdir=runs/large \\
        --config.init_from=runs/base --config.data.path=runs/pairs

runs/pairs is what `sdjax.prepare --from_ratings` writes. benchmarks/large_shapes.py makes ratings,
as of somebody who likes large shapes (docs/serving.md). Hardware: 2 CPU cores, 4 GiB.
"""

from sdjax.config import default


def get_config():
    c = default(method="dpo")
    c.data.name = "image_text_folder"
    c.data.images = ({"name": "rejected", "kind": "picture"},)
    c.data.resolution = 64
    c.data.batch_size = 32

    # The errors of so small a model differ more between two pictures than those of Stable
    # Diffusion: the paper's beta of 5000 would saturate the sigmoid.
    c.method.beta = 500.0
    c.objective.caption_dropout = 0.0
    c.objective.stratified = True

    c.optim.learning_rate = 1e-4
    c.optim.warmup_steps = 10
    c.ema.profiles = ()

    c.train.steps = 120
    c.train.log_every = 20
    c.train.sample_every = 0
    c.train.checkpoint_every = 120
    c.validation.every = 0
    c.validation.examples = 64
    c.validation.train_examples = 0
    c.sample.guidance = 3.0
    c.sample.sampler.spacing = "trailing"  # as of configs/base.py
    c.sample.sampler.steps = 25
    return c
