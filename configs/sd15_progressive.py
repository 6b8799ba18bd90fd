"""Distil Stable Diffusion 1.5, or a model that was fine-tuned from it, to 4 steps, by halving.

    python -m sdjax.main --config=configs/sd15_progressive.py --workdir=runs/progressive \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

The data are pictures with captions such as the model was trained on; the teacher is the model
itself, and then each student. SD2 with another init_from. Hardware: one GPU or TPU chip of 80 GB,
or several with mesh.fsdp. A step has two forward passes besides the one that is trained.
"""

from sdjax.config import default


def get_config():
    c = default(method="progressive")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 512
    c.data.crop = "center"
    c.data.flip = True

    # google-research, the configs of Meng et al. (two stages, CIFAR-10 and ImageNet at 64 pixels):
    # 50,000 steps a stage, 2e-4 for 10,000, 1e-4 for 50,000, linearly to 0 in each; Adam, a
    # gradient norm of 1, truncated SNR, no dropped captions. Those of Stable Diffusion were not
    # published with numbers; a rate of fine-tuning stands here, and shorter stages.
    c.method.steps = (32, 16, 8, 4)
    c.method.stage_steps = 10000
    c.method.guidance = (3.0, 15.0)
    c.model.unet.time_cond_proj_dim = c.method.guidance_width
    c.data.batch_size = 96
    c.train.accumulation = 4
    c.optim.name = "adam"
    c.optim.learning_rate = 1e-5
    c.optim.schedule = "linear"
    c.optim.cycle_steps = c.method.stage_steps
    c.optim.clip_norm = 1.0
    c.ema.profiles = ()  # the rate goes to 0: a stage ends with what an average would be

    c.train.steps = 50000
    c.train.checkpoint_every = 1000
    c.train.keep_every = c.method.stage_steps  # the student of each stage
    c.train.sample_every = 1000
    c.sample.guidance = 1.0
    c.sample.embedded_guidance = 8.5
    c.sample.sampler.spacing = "trailing"
    c.sample.sampler.steps = 4
    c.sample.sampler.distilled = True
    return c
