"""Fine-tune Stable Diffusion 1.5 on a folder of captioned pictures.

    python -m sdjax.main --config=configs/sd15_finetune.py --workdir=runs/finetune \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

Settings of the diffusers text-to-image example: AdamW 1e-5, constant after 500 steps of warm-up,
gradient clipping at 1, EMA. Hardware: one GPU or TPU chip of 40 GB or more at batch_size 8; with
less memory raise train.accumulation. The text encoder stays frozen: drop `optim.groups` to train
it too.
"""

from sdjax.config import default


def get_config():
    c = default()  # whose networks, schedule and objective are those of SD 1.5
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 512
    c.data.crop = "random"
    c.data.flip = True
    c.data.batch_size = 8

    c.optim.learning_rate = 1e-5
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 500
    c.optim.groups = ((r"^text_encoder\.", 0.0),)  # frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 15_000
    c.train.checkpoint_every = 1000
    c.train.sample_every = 1000
    return c
