"""Fine-tune Stable Diffusion 3.5 large on pictures that were encoded ahead.

    python -m sdjax.prepare --encode --config=configs/sd35_large_finetune.py --output=DATA \\
        --config.init_from=FOLDER --config.data.path=PICTURES --encode_text
    python -m sdjax.main --config=configs/sd35_large_finetune.py --workdir=runs/finetune \\
        --config.init_from=FOLDER --config.data.name=encoded --config.data.path=DATA \\
        --config.data.text_embeddings=True --config.mesh.fsdp=8

As configs/sd35_medium_finetune.py, for 8.06 billion parameters: 150 GiB of parameters, moments,
EMA and gradients, so eight accelerators share them. SimpleTuner found 1e-5 to be stable and 4e-5
not. Not run at full size here.
"""

from sdjax.config import default


def get_config():
    c = default(family="sd3", preset="sd35_large")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.buckets.step = 64
    c.data.batch_size = 8

    c.objective.caption_dropout = 0.1

    c.optim.learning_rate = 1e-5
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 500
    c.optim.clip_norm = 0.1
    c.optim.groups = ((r"^text_encoder", 0.0),)  # frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 15_000
    c.train.checkpoint_every = 1000
    c.train.sample_every = 1000
    c.sample.guidance = 4.5  # Stability's card of SD3.5-large
    return c
