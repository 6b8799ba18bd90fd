"""Train a LoRA for Stable Diffusion 1.5 on a folder of captioned pictures.

    python -m sdjax.main --config=configs/sd15_lora.py --workdir=runs/mine \\
        --config.init_from=DIFFUSERS_FOLDER_OR_FILE --config.data.path=IMAGES

runs/mine/adapter then has pytorch_lora_weights.safetensors, for diffusers, and mine.safetensors,
for A1111, Forge and ComfyUI. Rank 4 on the attention of the UNet, alpha = rank, AdamW
1e-4 with weight decay 0.01, constant, gradients clipped at 1: the defaults of diffusers'
train_text_to_image_lora.py, but for its batch of 16, which is 4 here. 0.8 M parameters are trained;
one accelerator of 8 GB. Not run at full size here.
"""

from sdjax.config import default


def get_config():
    c = default(method="adapters")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.method.rank = 4
    c.method.init = "gaussian"  # as diffusers' examples

    c.data.name = "image_text_folder"
    c.data.resolution = 512
    c.data.crop = "random"
    c.data.batch_size = 4

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 0.01
    c.ema.profiles = ()

    c.train.steps = 2000
    c.train.checkpoint_every = 500
    c.train.sample_every = 250
    return c
