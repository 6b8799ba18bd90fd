"""Fine-tune NoobAI XL v-pred on a folder of pictures that are captioned with tags.

    python -m sdjax.convert --input=noobai_vpred.safetensors --output=models/noobai \\
        --config_from=SDXL_FOLDER
    python -m sdjax.main --config=configs/sdxl_noobai_vpred_finetune.py --workdir=runs/mine \\
        --config.init_from=models/noobai --config.data.path=IMAGES
    python -m sdjax.convert --input=runs/mine --output=mine.safetensors --dtype=float16

The model predicts v, on a schedule that ends in pure noise. Newer files say so by the marks v_pred
and ztsnr; for older ones this recipe does. What is written has the marks. Full size is checked here
by parameter count and shapes, not by a run.

Where nothing else is said, the numbers are those of Aozora-XL 0.15, a fine-tune of the same model
(civitai.com/models/1719708).
"""

from sdjax.config import default


def get_config():
    c = default(family="sdxl")
    c.model.dtype = "bfloat16"
    c.model.remat = "block"

    c.init_prediction_type = c.objective.prediction_type = "v_prediction"
    c.init_zero_terminal_snr = c.schedule.zero_terminal_snr = True

    c.data.name = "image_text_folder"
    c.data.resolution = 1024
    c.data.buckets.step = 64  # SDXL's own buckets (arXiv 2307.01952, appendix I)
    c.data.flip = False  # tags name sides, and signatures are no mirror images
    c.data.batch_size = 64  # by accumulation
    c.train.accumulation = 8
    c.data.captions.shuffle_tags = True  # as sdxl_illustrious_finetune
    c.data.captions.keep_tags = 1
    c.data.captions.tag_dropout = 0.1

    c.objective.weighting = "min_snr"
    c.objective.min_snr_gamma = 5.0
    c.objective.input_perturbation = 0.1
    c.objective.caption_dropout = 0.1

    c.optim.learning_rate = 8e-7
    c.optim.weight_decay = 0.01  # AdamW's own
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 390  # a tenth of the run
    c.optim.groups = ((r"^text_encoder", 0.0),)  # both frozen
    c.ema.profiles = ("warmup-0.9999",)

    c.train.steps = 3906  # 250,000 pictures
    c.train.checkpoint_every = 500
    c.train.sample_every = 500
    # From pure noise down, which such a schedule needs (arXiv 2305.08891, sections 3.3 and 3.4).
    c.sample.sampler.name = "euler"
    c.sample.sampler.spacing = "trailing"
    c.sample.guidance = 5.0
    c.sample.guidance_rescale = 0.7
    c.sample.negative_prompt = "worst quality, lowres"
    return c
