"""Train a LoRA for Stable Diffusion XL on pairs of a preferred and a rejected picture.

    python -m sdjax.main --config=configs/sdxl_dpo_lora.py --workdir=runs/preferred \\
        --config.init_from=DIFFUSERS_FOLDER_OR_FILE --config.data.path=PAIRS

PAIRS has the preferred picture, its prompt as the caption, and the rejected one, as docs/inputs.md
says. The reference of Diffusion-DPO is the UNet without the LoRA: there is no second copy of it,
and runs/preferred/adapter has the files for diffusers, A1111 and ComfyUI. Hardware: one GPU or TPU
chip of 24 GB. Not run at full size here.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl", method="dpo_adapters")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.images = ({"name": "rejected", "kind": "picture"},)
    c.data.resolution = 1024
    c.data.crop = "center"
    c.data.flip = True

    # diffusers, examples/research_projects/diffusion_dpo: the README's command for SDXL, and
    # train_diffusion_dpo_sdxl.py where that leaves a default. 16 pairs a step, here one by one.
    c.method.beta = 5000.0
    c.method.rank = 8
    c.method.init = "gaussian"
    c.method.targets = ("attention",)
    c.data.batch_size = 16
    c.train.accumulation = 16
    c.optim.learning_rate = 1e-5
    c.optim.weight_decay = 0.01
    c.objective.caption_dropout = 0.0
    c.ema.profiles = ()

    c.train.steps = 2000
    c.train.checkpoint_every = 500
    c.train.sample_every = 250
    c.sample.guidance = 5.0
    return c
