"""Train a LoRA for Stable Diffusion 3.5 medium on captioned pictures.

    python -m sdjax.main --config=configs/sd35_lora.py --workdir=runs/mine \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

The folder decides the networks: that of SD3.5 large goes as well. Rank 16 on the joint attention,
the layers of diffusers' train_dreambooth_lora_sd3.py; rate 1e-4 and logit-normal timesteps as
there. T5 is 9.5 GB in bfloat16, which leaves the accelerators before the first step with captions
encoded ahead by sdjax.prepare --encode --encode_text, as configs/sd35_medium_finetune.py shows. Not
run at full size here.
"""

from sdjax.config import default


def get_config():
    c = default(family="sd3", preset="sd35_medium", method="adapters")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.buckets.step = 64
    c.data.batch_size = 1

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 1e-4
    c.ema.profiles = ()

    c.train.steps = 2000
    c.train.checkpoint_every = 500
    c.train.sample_every = 250
    return c
