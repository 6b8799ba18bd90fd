"""Train an IP-Adapter for Stable Diffusion 1.5 on captioned pictures, which it learns to see.

    python -m sdjax.main --config=configs/sd15_ip_adapter.py --workdir=runs/ip \\
        --config.init_from=DIFFUSERS_FOLDER --config.method.image_encoder_from=TOWER \\
        --config.data.path=IMAGES

TOWER is the folder of a CLIP image tower of transformers: CLIP ViT-H/14, as models/image_encoder
beside the published IP-Adapters. For another one set method.embedding_dim to its projection_dim.

UNet, VAE, text encoder and tower (632 million parameters) are frozen and kept in bfloat16. The
adapter has 22 million parameters. Hardware: one accelerator of 24 GB. Full size is checked here by
parameter count and shapes, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(method="ip_adapter")  # networks, schedule and objective are those of SD 1.5
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 512
    c.data.crop = "center"  # as the tower sees pictures
    c.data.flip = False
    c.data.batch_size = 64  # Ye et al. 2023, section 4.1: 8 on each of 8 devices
    c.train.accumulation = 8

    # Section 3.2.2 and tutorial_train.py: 5 % of the examples lose their caption, as many the
    # picture, as many both. The first and the last are the share that loses its caption.
    c.objective.caption_dropout = 0.1
    c.method.image_dropout = 0.05
    c.method.both_dropout = 0.05

    c.optim.learning_rate = 1e-4  # section 4.1
    c.optim.weight_decay = 0.01
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 1_000_000  # the same; of 10 million pictures
    c.train.checkpoint_every = 5000
    c.train.sample_every = 1000
    return c
