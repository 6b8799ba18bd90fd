"""Fine-tune FLUX.1-dev on pictures that were encoded ahead.

    python -m sdjax.prepare --encode --config=configs/flux_dev_finetune.py --output=DATA \\
        --config.init_from=FOLDER --config.data.path=PICTURES --encode_text
    python -m sdjax.main --config=configs/flux_dev_finetune.py --workdir=runs/finetune \\
        --config.init_from=FOLDER --config.data.name=encoded --config.data.path=DATA \\
        --config.data.text_embeddings=True --config.mesh.fsdp=8

11.9 billion parameters: 222 GiB of parameters, moments, EMA and gradients in float32, shared by
eight accelerators. The transformer reads the strength of guidance as a number, which is 1 in
training, as kohya's docs advise: 3.5 teaches a shift of what it has learned of guidance. No caption
is dropped, since it draws without an empty one. schedule.shift 3.1582 is exp(1.15), FLUX's own
for 1024 px. Not run at full size here.
"""

from sdjax.config import default


def get_config():
    c = default(family="flux", preset="dev")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.buckets.step = 64
    c.data.batch_size = 8

    c.schedule.shift = 3.1582
    c.objective.caption_dropout = 0.0

    c.optim.learning_rate = 1e-5
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 500
    c.optim.groups = ((r"^text_encoder", 0.0),)  # frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 15_000
    c.train.checkpoint_every = 1000
    c.train.sample_every = 1000
    return c
