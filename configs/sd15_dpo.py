"""Train Stable Diffusion 1.5 on pairs of a preferred and a rejected picture (Diffusion-DPO).

    python -m sdjax.main --config=configs/sd15_dpo.py --workdir=runs/dpo \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=PAIRS

PAIRS has the preferred picture, its prompt as the caption, and the rejected one, as docs/inputs.md
says. The UNet is trained whole, beside a copy of its start. Hardware: one GPU or TPU chip of 80 GB,
or several with mesh.fsdp; the effective batch is what the paper needs to be large.
"""

from sdjax.config import default


def get_config():
    c = default(method="dpo")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.images = ({"name": "rejected", "kind": "picture"},)
    c.data.resolution = 512
    c.data.crop = "random"
    c.data.flip = True

    # launchers/sd15.sh of the paper's authors: beta 5000, 2000 steps on Pick-a-Pic v2, 500 of
    # warm-up, a rate of 1e-8 times the batch, and a batch of 2048 pairs on 16 GPUs; here it is 128.
    c.method.beta = 5000.0
    c.data.batch_size = 128
    c.train.accumulation = 32
    c.optim.learning_rate = 1.28e-6
    c.optim.warmup_steps = 500
    c.objective.caption_dropout = 0.0
    c.ema.profiles = ()

    c.train.steps = 2000
    c.train.checkpoint_every = 200
    c.train.sample_every = 200
    return c
