"""Fine-tune Stable Diffusion XL on a folder of captioned pictures.

    python -m sdjax.main --config=configs/sdxl_finetune.py --workdir=runs/finetune \\
        --config.init_from=DIFFUSERS_FOLDER --config.data.path=IMAGES

Whether a dropped caption is zeros or the encoding of "" is read from the folder
(`force_zeros_for_empty_prompt`), so that training agrees with the pipeline that will draw. Text
encoders are frozen. The learning rate is a careful start for a batch of 8. Float32 parameters, two
moments, an EMA and gradients are 51 GB: one accelerator of 80 GB, or several with
--config.mesh.fsdp. Full size is checked here by parameter count and shapes, not by a run.
"""

from sdjax.config import default


def get_config():
    c = default(
        family="sdxl"
    )  # whose text encoder is CLIP-L, and whose noise schedule is SDXL's too
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.buckets.step = 64
    c.data.flip = True
    c.data.batch_size = 8

    c.objective.caption_dropout = 0.1

    c.optim.learning_rate = 4e-6
    c.optim.weight_decay = 0.01
    c.optim.warmup_steps = 500
    c.optim.groups = ((r"^text_encoder", 0.0),)  # both frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 15_000
    c.train.checkpoint_every = 1000
    c.train.sample_every = 1000
    c.sample.guidance = 5.0
    return c
