"""Textual inversion in small: a new word for the model of configs/base.py, on a CPU.

    python -m sdjax.main --config=base --workdir=runs/base
    python -m sdjax.main --config=configs/textual_inversion_tiny.py --workdir=runs/word \\
        --config.data.path=PICTURES

PICTURES: some 64 px pictures of one thing, of those that the model knows. Hardware: 2 CPU cores,
4 GiB.
"""

from sdjax.config import default


def get_config():
    c = default(method="embedding")
    c.init_from = "runs/base"

    c.method.tokens = ("<thing>",)
    c.method.initializer = ("circle",)
    # The model knows captions of shapes alone, and spells the words of photos in letters.
    c.data.captions.texts = ("a <thing>", "a large <thing>", "a small <thing>")

    c.data.name = "image_text_folder"
    c.data.eval_split = "train"  # some pictures have none to spare
    c.data.resolution = 64
    c.data.batch_size = 8

    # Times 2.5 of diffusers' rate for SD 1.5: the rows of this model have a norm of 5, not 0.4.
    c.optim.learning_rate = 5e-3
    c.optim.weight_decay = 1e-2
    c.ema.profiles = ()

    c.train.steps = 300
    c.train.checkpoint_every = 100
    c.train.sample_every = 100
    c.validation.examples = 0
    c.sample.count = 4
    c.sample.guidance = 3.0
    c.sample.sampler.steps = 25
    return c
