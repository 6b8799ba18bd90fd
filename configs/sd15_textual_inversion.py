"""Teach Stable Diffusion 1.5 a new word by some 5 pictures; nothing else of it changes.

    python -m sdjax.main --config=configs/sd15_textual_inversion.py --workdir=runs/cat-toy \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=PICTURES \\
        --config.method.tokens="('<cat-toy>',)" --config.method.initializer="('toy',)"

Numbers of diffusers' example (examples/textual_inversion/README.md): AdamW at 5e-4 times the batch
of 4 (--scale_lr), which is 2e-3, constant; weight decay 1e-2; 3000 steps; 512 px; mirrored at
random; captions that are templates around the word. An hour on a V100 there; not run at full size
here. For a style set method.templates to "style"; SD2 and SDXL take the same settings with their
own folder, family and data.resolution (docs/embeddings.md).
"""

from sdjax.config import default


def get_config():
    c = default(method="embedding")  # whose networks, schedule and objective are those of SD 1.5
    c.model.dtype = "bfloat16"  # the new rows and their gradients are float32
    c.model.remat = "block"

    c.method.tokens = ("<cat-toy>",)
    c.method.initializer = ("toy",)
    c.method.vectors = 1  # --num_vectors
    c.method.templates = "object"  # --learnable_property

    c.data.name = "image_text_folder"
    c.data.eval_split = "train"  # five pictures have none to spare
    c.data.resolution = 512
    c.data.flip = True
    c.data.batch_size = 4  # --train_batch_size 1, --gradient_accumulation_steps 4

    c.optim.learning_rate = 2e-3
    c.optim.weight_decay = 1e-2
    c.ema.profiles = ()

    c.train.steps = 3000
    c.train.checkpoint_every = 500
    c.train.sample_every = 500
    c.validation.examples = 0
    c.sample.count = 4
    return c
