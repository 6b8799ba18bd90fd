"""Stable Diffusion 2.1: 768 px, v-prediction, attention logits in float32.

    python -m sdjax.main --config=configs/sd21_v.py --workdir=runs/sd21v --config.init_from=DIR \\
        --config.data.path=IMAGES

Continues from a diffusers folder (2.1-base, or 2.1 itself). Full size is checked here by parameter
count and shapes, not by a whole run.
"""

from sdjax.config import default


def get_config():
    c = default(preset="sd2_v")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.objective.prediction_type = "v_prediction"

    c.data.name = "image_text_folder"
    c.data.resolution = 768
    c.data.crop = "random"
    c.data.flip = True
    c.data.batch_size = 2048

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 10_000
    c.optim.groups = ((r"^text_encoder\.", 0.0),)  # frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 150_000
    c.train.log_every = 100
    c.train.checkpoint_every = 5000
    c.train.sample_every = 10_000
    c.train.keep_every = 50_000
    return c
