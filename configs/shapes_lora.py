"""A LoRA in small: 20 pictures teach the model of configs/base.py a new word, on a laptop.

    python benchmarks/new_colour.py make runs/pink
    python -m sdjax.main --config=configs/shapes_lora.py --workdir=runs/pink_lora \\
        --config.init_from=runs/base --config.data.path=runs/pink

Hardware: 2 CPU cores, 2 GiB. The text encoder learns too: it has never seen the word.
"""

from sdjax.config import default


def get_config():
    c = default(method="adapters")
    c.method.rank = 8
    c.method.targets = ("transformer",)
    c.method.text_targets = ("transformer",)

    c.data.name = "image_text_folder"
    c.data.resolution = 64
    c.data.batch_size = 20
    c.data.eval_split = "train"  # 20 pictures leave none to judge by; docs/finetuning.md does

    c.objective.caption_dropout = 0.1
    c.objective.stratified = True

    c.optim.learning_rate = 4e-4
    c.optim.schedule = "cosine"
    c.ema.profiles = ()

    c.train.steps = 400
    c.train.log_every = 50
    c.train.sample_every = 0
    c.train.checkpoint_every = 400
    c.sample.prompts = (
        "a large pink circle in the center",
        "a small pink square at the top left",
        "a large red triangle on the right",
        "a small pink cross to the left of a large blue circle",
    )
    c.sample.guidance = 3.0
    c.sample.sampler.steps = 25
    return c
