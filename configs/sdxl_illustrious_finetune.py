"""Fine-tune Illustrious, or Pony V6, on a folder of pictures that are captioned with tags.

    python -m sdjax.convert --input=illustrious.safetensors --output=models/illustrious \\
        --config_from=SDXL_FOLDER
    python -m sdjax.main --config=configs/sdxl_illustrious_finetune.py --workdir=runs/mine \\
        --config.init_from=models/illustrious --config.data.path=IMAGES
    python -m sdjax.convert --input=runs/mine --output=mine.safetensors --dtype=float16

Captions are tags between commas: who and how many first, then quality, then the rest. Both models
predict epsilon and read the last but one states of the text encoders, which is what other programs
call clip skip 2: there is nothing to set. A sentence is one tag; leave the tags' order to it.
Nobody has published a learning rate for such fine-tunes that was compared with others. This one is
that of sdxl_finetune. Full size is checked here by parameter count and shapes, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024  # of Pony V6 and of SDXL
    c.data.buckets.step = 64  # SDXL's own buckets (arXiv 2307.01952, appendix I)
    c.data.flip = False  # tags name sides, and signatures are no mirror images
    c.data.batch_size = 8
    # Tags come in any order in prompts; the first ("1girl", a trigger word) stays in front. So has
    # it bmaltais/kohya_ss, presets/finetune/adafactor.json, where the caption's dropout is 0.1 too.
    c.data.captions.shuffle_tags = True
    c.data.captions.keep_tags = 1
    c.data.captions.tag_dropout = 0.1  # a choice: the model should do without some of the tags

    c.objective.caption_dropout = 0.1

    c.optim.learning_rate = 4e-6  # as sdxl_finetune, for a batch of 8
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 500
    c.optim.groups = ((r"^text_encoder", 0.0),)  # both frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 15_000
    c.train.checkpoint_every = 1000
    c.train.sample_every = 1000
    c.sample.sampler.name = "euler_ancestral"  # the usual one for these models
    c.sample.guidance = 5.0
    c.sample.negative_prompt = "worst quality, lowres"
    return c
