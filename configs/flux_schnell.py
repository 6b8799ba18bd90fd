"""Continue the training of FLUX.1-schnell, which draws in four steps.

    python -m sdjax.prepare --encode --config=configs/flux_schnell.py --output=DATA \\
        --config.init_from=FOLDER --config.data.path=PICTURES --encode_text
    python -m sdjax.main --config=configs/flux_schnell.py --workdir=runs/finetune \\
        --config.init_from=FOLDER --config.data.name=encoded --config.data.path=DATA \\
        --config.data.text_embeddings=True --config.mesh.fsdp=8

schnell was distilled to four steps and reads no guidance. Trained on as a plain flow, it drifts
back to needing many: a few thousand steps at a small rate for a new style, no more. T5 has 256
tokens here, as its pipeline draws. Memory is that of configs/flux_dev_finetune.py. Not run at full
size here.
"""

from sdjax.config import default


def get_config():
    c = default(family="flux", preset="schnell")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.buckets.step = 64
    c.data.batch_size = 8

    c.objective.caption_dropout = 0.0

    c.optim.learning_rate = 2e-6
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 500
    c.optim.groups = ((r"^text_encoder", 0.0),)  # frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 2000
    c.train.checkpoint_every = 500
    c.train.sample_every = 500
    c.sample.sampler.steps = 4
    return c
