"""Distil Stable Diffusion XL, or a model that was fine-tuned from it, to 4 steps (DMD2).

    python -m sdjax.main --config=configs/sdxl_dmd2.py --workdir=runs/dmd2 \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

The data are pictures with captions, for the head; the teacher is the model itself, frozen. As a
LoRA with --config.method.name=dmd_lora and a rate of 5e-5. Hardware: 8 GPUs or TPU chips of 80 GB,
by mesh.fsdp: student, fake and teacher are three UNets.
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl", preset="base", method="dmd")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"
    c.mesh.fsdp = 8

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.crop = "center"
    c.data.flip = True
    # tianweiy/DMD2, experiments/sdxl/sdxl_cond999_8node_lr5e-7_denoising4step_..._backsim_scratch:
    # 64 GPUs with 2 pictures each, 5e-7 for both, a gradient norm of 10, guidance 8, five updates
    # of the fake for one of the student, 5e-3 and 1e-2 for the head; AdamW (0.9, 0.999) with a
    # decay of 0.01, and a warm-up of 500 steps over 64 processes (main/train_sd.py). What was
    # published had 19,000 steps of fake and head.
    c.data.batch_size = 128
    c.train.accumulation = 8
    c.method.student_steps = 4
    c.method.teacher_guidance = 8.0
    c.method.fake_updates = 5
    c.method.gan_weight = 5e-3
    c.method.head_weight = 1e-2
    c.optim.learning_rate = 5e-7
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 8
    c.optim.clip_norm = 10.0
    c.ema.profiles = ()

    c.train.steps = 19000
    c.train.checkpoint_every = 500
    c.train.sample_every = 500
    c.sample.guidance = 1.0
    c.sample.sampler.name = "lcm"
    c.sample.sampler.steps = 4
    c.sample.sampler.original_steps = 100
    return c
