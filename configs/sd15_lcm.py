"""Distil Stable Diffusion 1.5, or a model that was fine-tuned from it, to 1 to 8 steps (LCM).

    python -m sdjax.main --config=configs/sd15_lcm.py --workdir=runs/lcm \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

The data are pictures with captions such as the model was trained on; the teacher is the model
itself, frozen. SD2 with another init_from. Hardware: one GPU or TPU chip of 80 GB, or several with
mesh.fsdp. A step has three forward passes of a UNet besides the one that is trained.
"""

from sdjax.config import default


def get_config():
    c = default(method="lcm")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 512
    c.data.crop = "center"
    c.data.flip = True

    # diffusers, examples/consistency_distillation/README.md: w of 5 to 15, huber with c = 0.001, an
    # average of 0.95; its 1000 steps of 12 pictures at 1e-6 are for trying it out. The paper has
    # 8e-6 for a batch of 72, and its release took some 4000 steps.
    c.method.guidance = (6.0, 16.0)
    c.model.unet.time_cond_proj_dim = c.method.guidance_width
    c.data.batch_size = 96
    c.train.accumulation = 4
    c.optim.learning_rate = 8e-6
    c.optim.weight_decay = 0.0
    c.ema.profiles = ("0.95",)

    c.train.steps = 4000
    c.train.checkpoint_every = 500
    c.train.sample_every = 500
    c.sample.guidance = 1.0
    c.sample.embedded_guidance = 8.5  # of LatentConsistencyModelPipeline
    c.sample.sampler.name = "lcm"
    c.sample.sampler.steps = 4
    return c
