"""Train a T2I-Adapter for Stable Diffusion 1.5 on captioned pictures, each with its condition.

    python -m sdjax.main --config=configs/sd15_t2i_adapter.py --workdir=runs/adapter \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

IMAGES has a condition beside each picture, as NAME.edge.png; configs/sd15_controlnet.py says how to
do without. docs/control.md compares it with a ControlNet.

UNet, VAE and text encoder are frozen and kept in bfloat16. The adapter has 77 million parameters,
so that with two moments, gradients and an average it takes 1.5 GB. Hardware: one accelerator of
24 GB. Full size is checked here by parameter count and shapes, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(method="t2i_adapter")  # networks, schedule and objective are those of SD 1.5
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 512
    c.data.images = ({"name": "control", "key": "edge", "kind": "condition"},)
    c.data.crop = "random"
    c.data.flip = True  # the condition is mirrored with its picture
    c.data.batch_size = 8  # Mou et al. 2023, section 4.1

    c.objective.timestep_sampling = "cubic"  # section 3.4: shapes are decided where noise is high
    c.objective.caption_dropout = 0.0  # train_t2i_adapter_sdxl.py, --proportion_empty_prompts

    c.optim.learning_rate = 1e-5  # section 4.1
    c.optim.weight_decay = 0.01  # train_t2i_adapter_sdxl.py, --adam_weight_decay
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 50_000  # a guess; the paper has 10 epochs of its pictures
    c.train.checkpoint_every = 2000
    c.train.sample_every = 1000
    return c
