"""Train Stable Diffusion 1.5 to inpaint, on a folder of captioned pictures.

    python -m sdjax.main --config=configs/sd15_inpaint.py --workdir=runs/inpaint \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

A folder of four channels is given five more, of zeros; one of nine, as
stable-diffusion-v1-5/stable-diffusion-inpainting, goes on as it is. Hardware: one GPU or TPU chip
of 40 GB or more at batch_size 8; with less memory raise train.accumulation.
"""

from sdjax.config import default


def get_config():
    c = default(method="inpaint")
    c.model.unet.in_channels = 9  # what a plan without init_from counts
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 512
    c.data.crop = "random"
    c.data.flip = True
    c.data.batch_size = 8

    # The model card of stable-diffusion-inpainting: 25 % of the pictures are masked whole, and 10 %
    # of the captions are dropped. It trained 440k steps at batch 2048 and 1e-4; the rate here is
    # that of diffusers' fine-tuning example for batches of this size.
    c.method.whole = 0.25
    c.objective.caption_dropout = 0.1
    c.optim.learning_rate = 1e-5
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 500
    c.optim.groups = ((r"^text_encoder\.", 0.0),)  # frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 20_000
    c.train.checkpoint_every = 1000
    c.train.sample_every = 1000
    return c
