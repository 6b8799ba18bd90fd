"""Stable Diffusion 3.5 medium: the transformer from nothing, at 256 px.

    python -m sdjax.main --config=configs/sd35_medium.py --workdir=runs/sd35 \\
        --config.vae_from=DIR/vae --config.text_encoder_from=DIR --config.data.path=IMAGES

DIR is a folder of SD3.5, whose VAE and text encoders are kept. This is the first of the stages of
Stability's model card: 256, 512, 768, 1024 and 1440 px. The next ones begin from the last,

    --config.init_from=runs/sd35 --config.data.resolution=512 --config.data.buckets.step=64

Stability published no training code. The sources of the numbers:

- Esser et al. 2024 (arXiv:2403.03206): logit-normal timesteps (0, 1), and 46.4 % of the captions
  taken from each text encoder apart, so that the model draws without T5 too. Batch 4,096, 500,000
  steps and the learning rate 1e-4 are theirs at 256 px, from memory: not read again.
- scheduler_config.json of the folder: shift 3, in every stage; what init_from reads keeps its own.
- Warm-up, weight decay and clipping are those of configs/sd21_base.py, the average is that of the
  other recipes.

The text encoders run in every step: 0.8 TFLOP an image beside 2.0 of the transformer. Encoded ahead
(sdjax.prepare --encode --encode_text) they cannot be dropped apart, and
--config.objective.encoder_dropout=0 --config.objective.caption_dropout=0.1 drops whole captions.
Parameters, two moments, an EMA and gradients are 42 GiB in float32, T5 is 9 GiB in bfloat16: shard
them (fsdp). Full size is checked here by parameter count, shapes, FLOPs and plans, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(family="sd3", preset="sd35_medium")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"
    c.model.max_sequence_length = 77  # of T5, as diffusers' SD3 scripts train

    c.data.name = "image_text_folder"
    c.data.resolution = 256
    c.data.crop = "random"
    c.data.flip = True
    c.data.batch_size = 4096

    c.objective.caption_dropout = 0.0
    c.objective.encoder_dropout = 0.464

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 10_000
    c.optim.clip_norm = 1.0
    c.optim.groups = ((r"^text_encoder", 0.0),)  # all three frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 500_000
    c.train.log_every = 100
    c.train.checkpoint_every = 5000
    c.train.sample_every = 10_000
    c.train.keep_every = 50_000
    c.sample.skip.layers = (7, 8, 9)  # as Stability's sd3_infer.py for SD3.5-medium
    return c
