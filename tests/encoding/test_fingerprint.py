"""The digest of an encoder has what changes features, and nothing else."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from sdjax.encoding.dataset import fingerprint
from sdjax.families.conditioning import make_conditioner
from sdjax.families.registry import FAMILIES, model_of
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.mmdit.network import MMDiTConfig
from sdjax.models.t5 import T5Config

CLIP = CLIPTextConfig(
    vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=6,
)  # fmt: skip
PROJECTING = dataclasses.replace(CLIP, projection_dim=5)
T5 = T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
TRANSFORMER = MMDiTConfig(
    num_layers=1, num_attention_heads=1, caption_projection_dim=64, joint_attention_dim=16,
    pooled_projection_dim=10,
)  # fmt: skip
UNET = FAMILIES["sd"].presets["base"].unet
UNET_XL = FAMILIES["sdxl"].presets["base"].unet
FLUX = FAMILIES["flux"].presets["base"].transformer
ENCODERS = {
    "sd": {"unet": dataclasses.replace(UNET, cross_attention_dim=8), "text_encoder": CLIP},
    "sdxl": {
        "unet": dataclasses.replace(
            UNET_XL, cross_attention_dim=16, projection_class_embeddings_input_dim=5 + 6 * 256
        ),
        "text_encoder": CLIP,
        "text_encoder_2": PROJECTING,
    },
    "sd3": {
        "transformer": TRANSFORMER,
        "text_encoder": PROJECTING,
        "text_encoder_2": PROJECTING,
        "text_encoder_3": T5,
    },
    "flux": {
        "transformer": dataclasses.replace(FLUX, joint_attention_dim=16, pooled_projection_dim=8),
        "text_encoder": CLIP,
        "text_encoder_2": T5,
    },
}
# Another value of each field that leaves the shapes of the weights as they are.
OTHERS = {
    CLIPTextConfig: {
        "num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-2,
        "attention_dropout": 0.5, "bos_token_id": 7, "eos_token_id": 4, "pad_token_id": 9,
    },
    T5Config: {
        "relative_attention_max_distance": 9, "layer_norm_epsilon": 1e-2, "pad_token_id": 9,
        "eos_token_id": 7,
    },
}  # fmt: skip
# Other weights say these: their shapes or names differ.
SHAPES = {
    CLIPTextConfig: {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "projection_dim",
        "max_position_embeddings",
    },
    T5Config: {
        "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj",
        "relative_attention_num_buckets",
    },
}  # fmt: skip
SETTINGS = {
    "clip_skip": 2, "zero_empty_prompt": False, "aesthetic_score": 1.0,
    "negative_aesthetic_score": 1.0, "max_sequence_length": 13, "kontext": True,
}  # fmt: skip
# Nobody pools these encoders: their end of the caption changes nothing, and stands in the digest.
UNPOOLED = {("sd", "text_encoder.eos_token_id"), ("sdxl", "text_encoder.eos_token_id")}


class Words:
    """Stands in for a tokenizer."""

    identity = "words"

    def __init__(self, length):
        self.context_length = length

    def encode(self, texts):
        rows = [[(len(text) * (i + 3)) % 23 for i in range(self.context_length)] for text in texts]
        return np.asarray(rows, np.int32)


def group_of(family):
    config = FAMILIES[family].presets["base"]
    length = {"max_sequence_length": 12} if "max_sequence_length" in config.settings else {}
    return dataclasses.replace(config, **ENCODERS[family], **length)


def changes_of(config):
    """(field, the group with another value of it) of each setting and field of an encoder."""
    for name in config.settings:
        yield name, dataclasses.replace(config, **{name: SETTINGS[name]})
    for name, encoder in config.text_encoders.items():
        kind = type(encoder)
        assert {f.name for f in dataclasses.fields(kind)} == OTHERS[kind].keys() | SHAPES[kind]
        for field, value in OTHERS[kind].items():
            other = dataclasses.replace(encoder, **{field: value})
            yield f"{name}.{field}", dataclasses.replace(config, **{name: other})


def made(config):
    """(the program that makes features of captions, digests of the text encoders)."""
    model = model_of(config)
    parts = model.family.parts
    tokenizers = {
        parts[name].tokens: Words(model.text_length(name)) for name in model.text_encoders
    }
    conditioner = make_conditioner(model, tokenizers)
    words = {field: tokenizer.encode(["a cat"]) for field, tokenizer in tokenizers.items()}
    program = jax.jit(conditioner.embed).lower(conditioner.networks.abstract, words).as_text()
    params = {n: np.zeros(x.shape, x.dtype) for n, x in conditioner.networks.abstract.items()}
    assembled = types.SimpleNamespace(
        config=types.SimpleNamespace(model=config), params=params, tokenizers=tokenizers
    )
    return program, [fingerprint(assembled, name) for name in model.text_encoders]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_digest_changes_with_the_program_of_features_and_with_nothing_else(family):
    config = group_of(family)
    program, digests = made(config)
    for field, other in changes_of(config):
        changed, digest = made(other)
        changes = (family, field) in UNPOOLED or changed != program
        assert (digest != digests) == changes, field


def test_text_encoded_for_dev_is_that_of_kontext():
    config = group_of("flux")
    assert made(dataclasses.replace(config, kontext=True))[1] == made(config)[1]
