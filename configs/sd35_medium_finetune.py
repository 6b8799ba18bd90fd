"""Fine-tune Stable Diffusion 3.5 medium on pictures that were encoded ahead.

    python -m sdjax.prepare --encode --config=configs/sd35_medium_finetune.py --output=DATA \\
        --config.init_from=FOLDER --config.data.path=PICTURES --encode_text
    python -m sdjax.main --config=configs/sd35_medium_finetune.py --workdir=runs/finetune \\
        --config.init_from=FOLDER --config.data.name=encoded --config.data.path=DATA \\
        --config.data.text_embeddings=True

Rectified flow with logit-normal timesteps and shift 3, as diffusers' SD3 scripts train. The text
encoders are frozen; encoded ahead, T5 is not on the training chips at all. Stability published no
training code: 1e-5 with gradients clipped at 0.1 is what SimpleTuner advises. Parameters, two
moments, an EMA and gradients take 20 bytes a parameter in float32, 42 GiB: one accelerator of 80
GB, or several with --config.mesh.fsdp. Not run at full size here.
"""

from sdjax.config import default


def get_config():
    c = default(family="sd3", preset="sd35_medium")
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
    c.sample.skip.layers = (7, 8, 9)  # as Stability's sd3_infer.py for SD3.5-medium
    return c
