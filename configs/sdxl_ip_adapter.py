"""Train an IP-Adapter for Stable Diffusion XL on captioned pictures, which it learns to see.

    python -m sdjax.main --config=configs/sdxl_ip_adapter.py --workdir=runs/ip \\
        --config.init_from=DIFFUSERS_FOLDER --config.method.image_encoder_from=TOWER \\
        --config.data.path=IMAGES

As configs/sd15_ip_adapter.py. TOWER is CLIP ViT-bigG/14, as sdxl_models/image_encoder beside the
published ones. With ViT-H/14 in its place set --config.method.embedding_dim=1024. The adapter has
351 million parameters: with two moments, gradients and an average 7.0 GB. Hardware: one accelerator
of 80 GB. Full size is checked here by parameter count and shapes, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl", method="ip_adapter")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.buckets.step = 64
    c.data.batch_size = 64  # see configs/sd15_ip_adapter.py
    c.train.accumulation = 16

    c.objective.caption_dropout = 0.1
    c.method.image_dropout = 0.05
    c.method.both_dropout = 0.05
    c.method.embedding_dim = 1280

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 0.01
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 1_000_000
    c.train.checkpoint_every = 5000
    c.train.sample_every = 1000
    c.sample.guidance = 5.0
    return c
