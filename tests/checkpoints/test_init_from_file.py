"""Runs that begin from single files of SD3 and FLUX.1, with and without text encoders inside.

The files are as other programs leave them: no header says what the networks are.
"""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.references import Reference, digest, follow
from sdjax.config import default, resolve
from sdjax.errors import UserError
from sdjax.families import flux, sd3
from sdjax.families.bind import bind
from sdjax.families.family import Model
from sdjax.families.flux_files import SCALING_FACTOR, SHIFT_FACTOR
from sdjax.families.registry import model_of
from sdjax.formats.folders import ModelError
from sdjax.formats.single_file_writer import write_single_file
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.flux.config import FluxConfig
from sdjax.models.mmdit.network import MMDiTConfig
from sdjax.models.t5 import T5Config
from tests.families.torch_transformers import t5_tokenizer

VOCABULARY = 600
T5 = T5Config(VOCABULARY, d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=3)
VAE = {"block_out_channels": (32,), "layers_per_block": 1, "latent_channels": 4}


def clip(width, **fields):
    return CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=16, **fields,
    )  # fmt: skip


def vae(config):
    kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return dataclasses.replace(config, **VAE, **kinds)


NETWORKS = {
    "sd3": {
        "transformer": MMDiTConfig(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32,
            pooled_projection_dim=14, pos_embed_max_size=8, dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        "text_encoder": clip(8, projection_dim=8),
        "text_encoder_2": clip(12, projection_dim=6, hidden_act="gelu"),
        "text_encoder_3": T5,
        "vae": vae(sd3.VAE_SD3),
    },
    "flux": {
        "transformer": FluxConfig(
            in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=1,
            joint_attention_dim=24, pooled_projection_dim=12,
        ),
        "text_encoder": clip(12),
        "text_encoder_2": T5,
        "vae": vae(flux.VAE_FLUX),
    },
}  # fmt: skip
FAMILIES = {"sd3": sd3.SD3, "flux": flux.FLUX}


@pytest.fixture(scope="module")
def tokenizers(torch_pipeline, tmp_path_factory):
    """A folder with a tokenizer for each text encoder, as a pipeline's without its weights."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for family, t5 in (("sd3", "tokenizer_3"), ("flux", "tokenizer_2")):
        for name in ("tokenizer", "tokenizer_2"):
            torch_pipeline.tokenizer.save_pretrained(folder / family / name)
        t5_tokenizer(folder / family / t5)
    return folder


@pytest.fixture(scope="module")
def models():
    """{family: a model with random weights}; CLIP-L of SD3 has the projection that files lack."""
    found = {}
    for name, networks in NETWORKS.items():
        model = Model(FAMILIES[name], networks, {})
        params = {k: np.asarray(v) for k, v in bind(model).init(jax.random.key(0)).items()}
        head = "text_encoder.text_projection.kernel"
        if head in params:
            params[head] = np.eye(8, dtype=np.float32)
        schedule, prediction = model.family.single_files[0].objective({})
        found[name] = dataclasses.replace(
            model, params=params, schedule=schedule, prediction_type=prediction
        )
    return found


@pytest.fixture
def write(models, tmp_path):
    """`write(family, networks)` is a file with these networks and nothing else."""

    def written(family, names=None, file="m.safetensors"):
        model = models[family]
        names = names or tuple(model.networks)
        params = {k: v for k, v in model.params.items() if k.split(".")[0] in names}
        part = dataclasses.replace(
            model, networks={n: model.networks[n] for n in names}, params=params
        )
        write_single_file(tmp_path / file, part)
        save_file(load_file(tmp_path / file), tmp_path / file)
        return str(tmp_path / file)

    return written


def recipe(family, **fields):
    made = default(family=family)
    made.update(fields)
    return made


def assert_same_bits(ours, theirs, names):
    theirs = {k: v for k, v in theirs.items() if k.split(".")[0] in names}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.array_equal(ours[name], value), name


@pytest.mark.parametrize("family", NETWORKS)
def test_whole_file_needs_tokenizers_alone(family, models, write, tokenizers):
    config = recipe(family, init_from=write(family))
    with pytest.raises(ModelError, match="no tokenizer.*config.tokenizer.path.*text_encoder_from"):
        assemble(resolve(config))
    config.tokenizer.path = str(tokenizers / family)
    config.model.max_sequence_length = 77  # of which a file says nothing
    found = assemble(resolve(config))
    assert_same_bits(found.params, models[family].params, NETWORKS[family])
    assert found.config.model.max_sequence_length == 77
    assert found.config.model.vae == NETWORKS[family]["vae"]
    lengths = {field: t.context_length for field, t in found.tokenizers.items()}
    t5 = "tokens_3" if family == "sd3" else "tokens_2"
    assert lengths.pop(t5) == 77 and set(lengths.values()) == {16}
    if family == "sd3":  # OpenCLIP pads with token 0, whatever its folder says
        padded = found.tokenizers["tokens_2"].encode(["a"])[0]
        assert padded[-1] == found.tokenizers["tokens_2"].vocabulary["!"]


@pytest.mark.parametrize("family", NETWORKS)
def test_plan_of_a_whole_file_needs_none(family, write):
    config = resolve(recipe(family, init_from=write(family)))
    found = assemble(config, with_tokenizer=False)
    assert found.config.model.transformer == NETWORKS[family]["transformer"]


@pytest.mark.parametrize("family", NETWORKS)
def test_encoders_of_another_file_replace_those_inside(family, models, write, tokenizers):
    encoders = [name for name in NETWORKS[family] if "text" in name]
    whole = write(family)
    tensors = load_file(whole)
    other = {k: 2 * v if k.startswith("text_encoders.") else v for k, v in tensors.items()}
    save_file(other, whole.replace("m.safe", "other.safe"))
    config = recipe(
        family, init_from=whole, text_encoder_from=whole.replace("m.safe", "other.safe")
    )
    config.tokenizer.path = str(tokenizers / family)
    found = assemble(resolve(config)).params
    for name, value in models[family].params.items():
        doubled = name.split(".")[0] in encoders and "text_projection" not in name
        if "text_projection" not in name:
            assert np.array_equal(found[name], value * (2 if doubled else 1)), name


@pytest.mark.parametrize("family", NETWORKS)
def test_transformer_and_autoencoder_and_encoders_of_three_files(family, models, write, tokenizers):
    encoders = tuple(name for name in NETWORKS[family] if "text" in name)
    config = recipe(
        family,
        init_from=write(family, ("transformer",), "transformer.safetensors"),
        vae_from=write(family, ("vae",), "ae.safetensors"),
        text_encoder_from=write(family),
    )
    config.tokenizer.path = str(tokenizers / family)
    found = assemble(resolve(config))
    assert_same_bits(found.params, models[family].params, NETWORKS[family])
    # A file with an autoencoder alone does not say its scale: it is the recipe's.
    assert found.config.model.vae == NETWORKS[family]["vae"]
    places = {name: source.path.rsplit("/")[-1] for name, source in found.sources.items()}
    assert places["transformer"] == "transformer.safetensors" and places["vae"] == "ae.safetensors"
    assert {places[name] for name in encoders} == {"m.safetensors"}


def test_autoencoder_of_flux_brings_its_scale_into_a_recipe_of_sd3(write):
    config = recipe("sd3", vae_from=write("flux"))  # a whole file says which VAE it is
    found = assemble(resolve(config), with_tokenizer=False).config.model.vae
    assert (found.scaling_factor, found.shift_factor) == (SCALING_FACTOR, SHIFT_FACTOR)


@pytest.mark.parametrize("family", NETWORKS)
def test_file_without_t5_decides_that_there_is_none(family, write, tokenizers):
    names = [name for name in NETWORKS[family] if NETWORKS[family][name] is not T5]
    config = recipe(family, init_from=write(family, names))
    config.tokenizer.path = str(tokenizers / family)
    found = assemble(resolve(config))
    assert (
        T5 not in found.config.model.networks.values() and len(found.tokenizers) == len(names) - 2
    )
    model = model_of(found.config.model)
    if family == "sd3":
        model.family.check(model)
    else:
        with pytest.raises(UserError, match="text_encoder_2 is missing.*config.text_encoder_from"):
            model.family.check(model)


@pytest.mark.parametrize(
    "names, read", [(("vae",), "vae"), (None, "vae"), (None, "text_encoder_3")]
)
def test_frozen_network_of_a_file_is_read_again(names, read, models, write, tmp_path):
    params = {k: v for k, v in models["sd3"].params.items() if k.startswith(f"{read}.")}
    reference = Reference("init_from", write("sd3", names), digest=digest(params))
    assert_same_bits(follow(tmp_path, read, reference, read_run=None), params, (read,))
