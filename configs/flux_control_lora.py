"""Train a LoRA that has FLUX.1-dev follow edges, depth or poses, as FLUX.1-Canny and -Depth do.

    python -m sdjax.main --config=configs/flux_control_lora.py --workdir=runs/mine \\
        --config.init_from=FLUX_DEV --config.data.path=IMAGES

The transformer reads the condition's latents beside the noisy ones: x_embedder is given as many
inputs of zeros, which a LoRA of it begins to read. Rank 64 on x_embedder, attention and
feed-forward layers, rate 1e-4 and guidance 30, as diffusers' train_control_lora_flux.py. The
condition is made of each picture (Canny); for others name pictures beside them, as
{"name": "control", "kind": "condition"}. What it writes is loaded by FluxControlPipeline. Not run
at full size here.
"""

from sdjax.config import default


def get_config():
    c = default(family="flux", preset="control", method="condition_adapters")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"
    c.method.rank = 64
    c.method.targets = ("x_embedder", "attention", r"\.ff(_context)?\.net\.")

    c.data.name = "image_text_folder"
    c.data.images = ({"name": "control", "kind": "condition", "made": "canny"},)
    c.data.resolution = 1024
    c.data.buckets.step = 64
    c.data.batch_size = 4

    c.schedule.shift = 3.1582
    c.objective.caption_dropout = 0.0

    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 1e-4
    c.ema.profiles = ()

    c.sample.embedded_guidance = 30.0

    c.train.steps = 5000
    c.train.checkpoint_every = 500
    c.train.sample_every = 250
    return c
