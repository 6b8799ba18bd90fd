"""Single files of FLUX.1: the transformer alone, or ComfyUI's whole pipeline.

Fill, Canny and Depth differ from dev in their shapes alone; Kontext and Krea in nothing. Sources:
black-forest-labs/flux, util.py; ComfyUI, supported_models.py; diffusers'
loaders/single_file_utils.py.
"""

from __future__ import annotations

import dataclasses

from sdjax.diffusion.schedules import ScheduleConfig
from sdjax.families import dit_configs, dit_files, ldm_files
from sdjax.families.flux_names import flux_places
from sdjax.families.single_file import FileNetwork, SingleFile

SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159
_KEY = "double_blocks.0.img_attn.norm.key_norm.scale"
_BARE = (
    "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "double_blocks.",
    "single_blocks.", "final_layer.",
)  # fmt: skip


def _clip_leftover(name: str) -> str:
    """The label of the projection that ComfyUI writes, which FLUX.1 does not use."""
    return name if name == "text_projection.weight" else ""


SCHNELL_FILE = SingleFile(
    name="schnell",
    networks={
        "transformer": FileNetwork(
            (dit_files.TRANSFORMER, ""), dit_configs.flux_config, flux_places, bare=_BARE
        ),
        "text_encoder": dataclasses.replace(
            ldm_files.clip(dit_files.CLIP_L, dit_configs.clip_l_config), leftover=_clip_leftover
        ),
        "text_encoder_2": dit_files.t5(),
        "vae": dit_files.vae(
            "vae.", ldm_files.VAE, scaling_factor=SCALING_FACTOR, shift_factor=SHIFT_FACTOR
        ),
    },
    tells=dit_files.tells(_KEY),
    objective=lambda shapes: (ScheduleConfig(kind="flow"), "flow"),
    scaling_factor=SCALING_FACTOR,
    shift_factor=SHIFT_FACTOR,
    settings={"max_sequence_length": 256},
    leftover=dit_files.leftover,
    predictions=("flow",),
    # As the pipelines of diffusers have it: levels from 1 to 1 / steps, not shifted.
    scheduler={
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
    },
    partial=True,
)
DEV_FILE = dataclasses.replace(
    SCHNELL_FILE,
    name="dev",
    tells=dit_files.tells(_KEY, "guidance_in.in_layer.weight"),
    settings={"max_sequence_length": 512},
    scheduler={
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
)
