"""Train a T2I-Adapter for Stable Diffusion XL on captioned pictures, each with its condition.

    python -m sdjax.main --config=configs/sdxl_t2i_adapter.py --workdir=runs/adapter \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

As configs/sd15_t2i_adapter.py. The adapter has 79 million parameters, where a ControlNet has 1,251:
with two moments, gradients and an average 1.6 GB, beside 6.9 GB of frozen networks in bfloat16.
Hardware: one accelerator of 40 GB. Full size is checked here by parameter count and shapes, not by
a run.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl", method="t2i_adapter")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.images = ({"name": "control", "key": "edge", "kind": "condition"},)
    c.data.buckets.step = 64
    c.data.flip = True
    # The published adapters: 20,000 to 35,000 steps of 128 pictures at a constant 1e-5
    # (huggingface.co/blog/t2i-sdxl-adapters).
    c.data.batch_size = 128
    c.train.accumulation = 32
    c.optim.learning_rate = 1e-5
    c.train.steps = 20_000

    c.objective.timestep_sampling = "cubic"  # train_t2i_adapter_sdxl.py, "Cubic sampling"
    c.objective.caption_dropout = 0.0  # --proportion_empty_prompts
    c.optim.weight_decay = 0.01  # --adam_weight_decay
    c.ema.profiles = ("warmup-0.9999",)

    c.train.checkpoint_every = 1000
    c.train.sample_every = 500
    c.sample.guidance = 5.0
    return c
