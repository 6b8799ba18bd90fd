"""Single files of Stable Diffusion 3 and 3.5, with or without text encoders.

CLIP-L has no projection in them, and none is applied: the identity in the words of a diffusers
folder. Sources: Stability-AI/sd3.5, sd3_infer.py; ComfyUI, supported_models.py; diffusers'
loaders/single_file_utils.py.
"""

from __future__ import annotations

from sdjax.diffusion.schedules import ScheduleConfig
from sdjax.families import dit_configs, dit_files, ldm_files, ldm_names
from sdjax.families.sd3_names import sd3_places
from sdjax.families.single_file import FileNetwork, SingleFile

SCALING_FACTOR, SHIFT_FACTOR = 1.5305, 0.0609
SHIFT = 3.0
_BARE = (
    "pos_embed", "x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.",
    "joint_blocks.", "final_layer.",
)  # fmt: skip
SD3_FILE = SingleFile(
    name="sd3",
    networks={
        "transformer": FileNetwork(
            (dit_files.TRANSFORMER, ""), dit_configs.mmdit_config, sd3_places, bare=_BARE
        ),
        "text_encoder": FileNetwork(
            (dit_files.CLIP_L,), dit_configs.projected_clip_l_config, dit_files.clip_places,
            spelling=ldm_names.clip_spelling, vocabulary=ldm_files.CLIP_VOCABULARY,
        ),
        "text_encoder_2": FileNetwork(
            (dit_files.CLIP_G,), dit_configs.clip_g_config, ldm_names.clip_places,
            spelling=ldm_names.clip_spelling, pad_token="!",
            vocabulary=ldm_files.CLIP_VOCABULARY,
        ),
        "text_encoder_3": dit_files.t5(),
        "vae": dit_files.vae(
            ldm_files.VAE, scaling_factor=SCALING_FACTOR, shift_factor=SHIFT_FACTOR
        ),
    },
    tells=dit_files.tells("joint_blocks.0.context_block.adaLN_modulation.1.weight"),
    objective=lambda shapes: (ScheduleConfig(kind="flow", shift=SHIFT), "flow"),
    scaling_factor=SCALING_FACTOR,
    shift_factor=SHIFT_FACTOR,
    settings={"max_sequence_length": 256},
    leftover=dit_files.leftover,
    predictions=("flow",),
    scheduler={
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": SHIFT,
    },
    partial=True,
)  # fmt: skip
