"""Train a LoRA for Stable Diffusion XL, or a model made of it, on captioned pictures.

    python -m sdjax.main --config=configs/sdxl_lora.py --workdir=runs/mine \\
        --config.init_from=DIFFUSERS_FOLDER_OR_FILE --config.data.path=IMAGES

runs/mine/adapter then has pytorch_lora_weights.safetensors, for diffusers, and mine.safetensors,
for A1111, Forge and ComfyUI. Rank 16 on what kohya's networks.lora adapts, every dense
layer and 1x1 convolution in the UNet's transformer blocks, with alpha = rank: 42.6 M parameters,
85 MB in float16. A rate of 1e-4 is that of diffusers' SDXL examples. (kohya's alpha is 1 by
default: a rate that was found there goes with method.alpha=1.) The frozen UNet is kept in bfloat16,
5 GB; one accelerator of 16 GB at batch 1. Not run at full size here.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl", method="adapters")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.method.targets = ("transformer",)

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.buckets.step = 64
    c.data.batch_size = 1

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 0.01
    c.ema.profiles = ()

    c.train.steps = 2000
    c.train.checkpoint_every = 500
    c.train.sample_every = 250
    c.sample.guidance = 5.0
    return c
