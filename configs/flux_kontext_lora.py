"""Train a LoRA for FLUX.1-Kontext on pictures before and after, with instructions.

    python -m sdjax.main --config=configs/flux_kontext_lora.py --workdir=runs/mine \\
        --config.init_from=FLUX_KONTEXT_DEV --config.data.path=PAIRS

PAIRS has 0001.jpg (after), 0001.txt (the instruction) and 0001.before.jpg. Rank 16 on the attention
of all 57 blocks and rate 1e-4, as diffusers' train_dreambooth_lora_flux_kontext.py; the picture
before is tokens after the noisy ones, of which no loss is taken. init_from may be FLUX.1-dev too,
which then learns to read them. Guidance is 1 in training, and pictures are drawn with 2.5, the
pipeline's. A step takes some 8,700 tokens at 1024 px: twice those of FLUX.1-dev. Not run at full
size here.
"""

from sdjax.config import default


def get_config():
    c = default(family="flux", preset="kontext", method="edit_adapters")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.images = ({"name": "before"},)
    c.data.resolution = 1024
    c.data.buckets.step = 64
    c.data.batch_size = 1

    c.schedule.shift = 3.1582
    c.objective.caption_dropout = 0.0

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 1e-4
    c.ema.profiles = ()

    c.sample.embedded_guidance = 2.5

    c.train.steps = 2000
    c.train.checkpoint_every = 500
    c.train.sample_every = 250
    return c
