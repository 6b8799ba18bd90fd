"""Teach Stable Diffusion XL a subject by a LoRA, beside pictures of its class.

    python -m sdjax.sample --model=DIFFUSERS_FOLDER --output=class --prompts="a photo of a dog" \\
        --count=100
    python -m sdjax.main --config=configs/sdxl_dreambooth_lora.py --workdir=runs/sks \\
        --config.init_from=DIFFUSERS_FOLDER

Put some five pictures of the subject into the folder `subject`, each with a caption such as "a
photo of sks dog" (0001.jpg, 0001.txt); the first command draws those of the class. Every batch has
as many of both. Rank 4 on the attention, 1e-4, a prior weight of 1 and 100 pictures of the class
are the defaults of diffusers' train_dreambooth_lora_sdxl.py; it adds the means of subject and
class, where this takes the mean of all (docs/inputs.md). One accelerator of 16 GB. Not run at full
size here.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl", method="adapters")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.method.rank = 4
    c.method.init = "gaussian"  # as diffusers' examples

    c.data.name = "image_text_folder"
    c.data.mixture = (
        {"path": "subject", "loss_weight": 1.0},
        {"path": "class", "loss_weight": 1.0},
    )
    c.data.resolution = 1024
    c.data.batch_size = 2

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 1e-4
    c.ema.profiles = ()

    c.train.steps = 500
    c.train.checkpoint_every = 100
    c.train.sample_every = 100
    c.sample.guidance = 5.0
    return c
