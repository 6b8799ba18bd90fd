"""Teach Stable Diffusion XL a word and a LoRA for it in one run (pivotal tuning).

    python -m sdjax.main --config=configs/sdxl_pivotal.py --workdir=runs/toy \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=PICTURES

PICTURES: some 5 to 20 pictures of one subject; they need no captions. The word `<toy>` has two
rows in each text encoder, which begin at random. Words and LoRA are trained together for half of
the steps, then the LoRA alone. runs/toy then has adapter/ and embedding/, which go together.

Two rows, the half, rank, rate and start of the LoRA are defaults of diffusers'
train_dreambooth_lora_sdxl_advanced.py; three times the rate for the rows is that of
replicate/cog-sdxl (ti_lr 3e-4, lora_lr 1e-4). The frozen networks are kept in bfloat16: one
accelerator of 24 GB at batch 1. Not run at full size here.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl", method="pivotal")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.method.tokens = ("<toy>",)
    c.method.vectors = 2  # --num_new_tokens_per_abstraction
    c.method.words_end = 0.5  # --train_text_encoder_ti_frac
    c.method.rank = 4
    c.method.init = "gaussian"

    c.data.name = "image_text_folder"
    c.data.eval_split = "train"  # few pictures have none to spare
    c.data.captions.texts = ("a photo of <toy>",)  # --instance_prompt
    c.data.resolution = 1024
    c.data.batch_size = 1

    c.optim.learning_rate = 1e-4
    c.optim.groups = ((r"\.rows$", 3.0),)
    c.optim.weight_decay = 1e-4
    c.ema.profiles = ()

    c.train.steps = 1000
    c.train.checkpoint_every = 250
    c.train.sample_every = 250
    c.validation.examples = 0
    c.sample.count = 4
    c.sample.guidance = 5.0
    return c
