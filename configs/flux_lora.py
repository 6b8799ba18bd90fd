"""Train a LoRA for FLUX.1-dev on captioned pictures.

    python -m sdjax.main --config=configs/flux_lora.py --workdir=runs/mine \\
        --config.init_from=FOLDER --config.data.path=IMAGES

Rank 16 on the attention of all 57 blocks, rate 1e-4, as diffusers' train_dreambooth_lora_flux.py;
guidance is 1 in training and schedule.shift exp(1.15), as configs/flux_dev_finetune.py says. The
frozen transformer is 23.8 GB in bfloat16 and T5 9.5 GB: one accelerator of 80 GB, or several with
--config.mesh.fsdp. T5 leaves them before the first step with captions that were encoded ahead
(sdjax.prepare --encode --encode_text). Not run at full size here.
"""

from sdjax.config import default


def get_config():
    c = default(family="flux", preset="dev", method="adapters")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.buckets.step = 64
    c.data.batch_size = 1

    c.schedule.shift = 3.1582
    c.objective.caption_dropout = 0.0

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 1e-4
    c.ema.profiles = ()

    c.train.steps = 2000
    c.train.checkpoint_every = 500
    c.train.sample_every = 250
    return c
