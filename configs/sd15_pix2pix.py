"""Train Stable Diffusion 1.5 to edit pictures by instructions (InstructPix2Pix).

    python -m sdjax.main --config=configs/sd15_pix2pix.py --workdir=runs/edit \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=PAIRS

PAIRS has a picture after the edit, its instruction as the caption, and the picture before, as
docs/inputs.md says. A folder of four channels is given four more, of zeros; one of eight, as
timbrooks/instruct-pix2pix, goes on as it is. Hardware: one GPU or TPU chip of 40 GB or more.
"""

from sdjax.config import default


def get_config():
    c = default(method="edit")
    c.model.unet.in_channels = 8  # what a plan without init_from counts
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.images = ({"name": "before", "kind": "picture"},)
    # configs/train.yaml of the paper's authors: 256 px, random crop and flip, 1e-4 without warm-up
    # at batch 1024 (8 GPUs x 32 x 4). For smaller ones the README of diffusers'
    # train_instruct_pix2pix.py has 5e-5, 15,000 steps and a dropout of 0.05.
    c.data.resolution = 256
    c.data.crop = "random"
    c.data.flip = True
    c.data.batch_size = 16
    c.optim.learning_rate = 5e-5
    c.optim.weight_decay = 0.01
    c.optim.groups = ((r"^text_encoder\.", 0.0),)  # frozen
    c.ema.profiles = ("warmup-0.9999",)

    # Section 3.2.1: 5 % without words, 5 % without either, 5 % without the picture.
    c.objective.caption_dropout = 0.1

    c.train.steps = 15_000
    c.train.checkpoint_every = 1000
    c.train.sample_every = 1000
    c.sample.guidance = 7.5  # section 3.2.1 and the pipeline
    c.sample.image_guidance = 1.5
    return c
