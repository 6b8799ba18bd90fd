"""Train a ControlNet for Stable Diffusion 1.5 on captioned pictures, each with its condition.

    python -m sdjax.main --config=configs/sd15_controlnet.py --workdir=runs/control \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

IMAGES has a condition beside each picture, as NAME.edge.png. A condition that follows from the
picture needs no files: --config.data.images="({'name': 'control', 'kind': 'condition', 'made':
'canny'},)". docs/control.md has the layouts, and what to expect when.

UNet, VAE and text encoder are frozen and kept in bfloat16. The ControlNet has 361 million
parameters, so that with two moments, gradients and an average it takes 7.2 GB. Hardware: one
accelerator of 24 GB or more at 4 pictures a micro-batch. Full size is checked here by parameter
count and shapes, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(method="control")  # whose networks, schedule and objective are those of SD 1.5
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 512
    c.data.images = ({"name": "control", "key": "edge", "kind": "condition"},)
    c.data.crop = "random"
    c.data.flip = True  # the condition is mirrored with its picture
    # The paper and train_controlnet.py of diffusers have 4. ControlNet's authors advise more, by
    # accumulation ("More Consideration" on their page about training).
    c.data.batch_size = 32
    c.train.accumulation = 8

    c.objective.caption_dropout = 0.5  # Zhang et al. 2023, section 3.3; diffusers' default is 0

    # The paper's rate, and that of diffusers' README; the default of its script is 5e-6.
    c.optim.learning_rate = 1e-5
    c.optim.weight_decay = 0.01  # train_controlnet.py, --adam_weight_decay
    c.optim.warmup_steps = 500  # --lr_warmup_steps
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 15_000
    c.train.checkpoint_every = 1000
    c.train.sample_every = 500  # to see the step from which the condition is followed
    return c
