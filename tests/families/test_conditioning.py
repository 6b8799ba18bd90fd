"""What the UNet is told: against the pipelines of diffusers, and the rule for empty captions."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.errors import UserError
from sdjax.families import flux, sd, sdxl
from sdjax.families.conditioning import blank_tokenizers, encode_text, make_conditioner
from sdjax.families.registry import model_of
from sdjax.families.sd import SDConfig
from sdjax.families.sdxl import SDXLConfig, count_time_ids
from sdjax.formats.diffusers_folder import read_diffusers

PROMPTS = ["a red circle", "a green star and a small red circle"]


@pytest.fixture(scope="module")
def read(xl_folder):
    return read_diffusers(xl_folder, components=("unet", "text_encoder", "text_encoder_2"))


@pytest.fixture(scope="module")
def tokenizers(read):
    return read.tokenizers


def conditioner_of(read, tokenizers, *, zeros):
    model = dataclasses.replace(read, settings={"zero_empty_prompt": zeros})
    return make_conditioner(model, tokenizers)


def assert_close(ours, theirs):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(np.abs(theirs).max(), 1e-3))


@pytest.mark.parametrize("negative", [None, "a blue square"])
def test_context_is_that_of_the_pipeline(read, tokenizers, torch_xl_pipeline, negative):
    import torch

    with torch.no_grad():
        wanted = torch_xl_pipeline.encode_prompt(
            PROMPTS,
            negative_prompt=None if negative is None else [negative] * 2,
            do_classifier_free_guidance=True,
        )
        text, null_text, pooled, null_pooled = (x.numpy() for x in wanted)
        ids = torch_xl_pipeline._get_add_time_ids(
            (500, 300), (12, 34), (24, 16), dtype=torch.float32,
            text_encoder_projection_dim=read.networks["text_encoder_2"].projection_dim,
        ).numpy()  # fmt: skip
    conditioner = conditioner_of(read, tokenizers, zeros=True)
    size = np.array([[500, 300, 12, 34]] * 2, np.int32)
    with jax.default_matmul_precision("highest"):
        ours, null = (
            conditioner(
                read.params, {**encode_text(tokenizers, texts), "size": size}, target=(24, 16)
            )
            for texts in (PROMPTS, [negative or ""] * 2)
        )
    assert_close(ours["context"], text)
    assert_close(ours["pooled"], pooled)
    assert_close(null["context"], null_text)
    assert_close(null["pooled"], null_pooled)
    assert np.any(null_text) == (negative is not None)
    for found in (ours, null):
        np.testing.assert_array_equal(found["numbers"], np.tile(ids, (2, 1)))
    whole = conditioner(read.params, encode_text(tokenizers, PROMPTS), target=(24, 16))
    np.testing.assert_array_equal(whole["numbers"], [[24, 16, 0, 0, 24, 16]] * 2)


def test_without_zeros_an_empty_caption_is_encoded(read, tokenizers):
    tokens = encode_text(tokenizers, ["", PROMPTS[0]])
    zeros, encoded = (
        conditioner_of(read, tokenizers, zeros=zeros).embed(read.params, tokens)
        for zeros in (True, False)
    )
    for name in ("context", "pooled"):
        assert not np.any(zeros[name][0]) and np.abs(encoded[name][0]).max() > 0.1
        np.testing.assert_array_equal(zeros[name][1], encoded[name][1])


def test_a_refiner_is_told_a_score_in_place_of_the_target(read, tokenizers):
    import diffusers
    import torch

    unet = dataclasses.replace(
        read.denoiser, cross_attention_dim=32, projection_class_embeddings_input_dim=20 + 5 * 8
    )
    second_encoder = read.networks["text_encoder_2"]
    model = dataclasses.replace(
        read, networks={"unet": unet, "text_encoder_2": second_encoder}, settings={}
    )
    second = {"tokens_2": tokenizers["tokens_2"]}
    tokens = encode_text(second, PROMPTS)
    size = np.array([[500, 300, 12, 34]] * 2, np.int32)
    conditioner = make_conditioner(model, second)
    good, bad = (
        conditioner(read.params, {**tokens, "size": size}, target=(24, 16), negative=negative)
        for negative in (False, True)
    )
    # What the pipeline looks at, without a whole one.
    linear = types.SimpleNamespace(in_features=unet.projection_class_embeddings_input_dim)
    fake = types.SimpleNamespace(
        config=types.SimpleNamespace(requires_aesthetics_score=True),
        unet=types.SimpleNamespace(
            config=unet, add_embedding=types.SimpleNamespace(linear_1=linear)
        ),
    )
    ids, negative_ids = diffusers.StableDiffusionXLImg2ImgPipeline._get_add_time_ids(
        fake, (500, 300), (12, 34), (24, 16), 6.0, 2.5, (500, 300), (12, 34), (24, 16),
        dtype=torch.float32, text_encoder_projection_dim=20,
    )  # fmt: skip
    np.testing.assert_array_equal(good["numbers"], np.tile(ids.numpy(), (2, 1)))
    np.testing.assert_array_equal(bad["numbers"], np.tile(negative_ids.numpy(), (2, 1)))
    assert good["context"].shape == (2, 16, 32) and good["pooled"].shape == (2, 20)


def test_both_encoders_are_trained_through_the_context(read, tokenizers):
    """The last layer of the first one is left out, and nothing else."""
    conditioner = conditioner_of(read, tokenizers, zeros=True)
    tokens = encode_text(tokenizers, PROMPTS)
    params = {k: jnp.asarray(v) for k, v in read.params.items() if k.startswith("text_encoder")}

    def total(params):
        text = conditioner.embed(params, tokens)
        return jnp.sum(text["context"] ** 3) + jnp.sum(text["pooled"] ** 3)

    gradients = jax.jit(jax.grad(total))(params)
    last = read.networks["text_encoder"].num_hidden_layers - 1
    unused = (f"text_encoder.encoder.layers.{last}.", "text_encoder.final_layer_norm.")
    for path, gradient in gradients.items():
        assert np.any(gradient) != path.startswith(unused), path


def test_published_networks_fit_together():
    for group in (SDConfig(), *sd.SD.presets.values(), *sdxl.SDXL.presets.values()):
        model = model_of(group)
        model.family.check(model)
    assert count_time_ids(sdxl.UNET_SDXL, 1280) == 6
    assert count_time_ids(sdxl.UNET_SDXL_REFINER, 1280) == 5
    refiner = model_of(sdxl.SDXL.presets["refiner"])
    assert list(blank_tokenizers(model_of(SDXLConfig()))) == ["tokens", "tokens_2"]
    assert list(blank_tokenizers(refiner)) == ["tokens_2"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_encoder": None}, "cross_attention_dim is 2048, but .*text_encoder_2.* is 1280"),
        ({"text_encoder_2": None}, "expected a model.text_encoder_2 with a projection_dim"),
        ({"text_encoder_2": sd.CLIP_H}, "with a projection_dim"),
        (
            {"text_encoder_2": dataclasses.replace(sdxl.CLIP_BIGG, projection_dim=1000)},
            "projection_class_embeddings_input_dim = 2816.*pooled text of 1000",
        ),
        (
            {"text_encoder_2": dataclasses.replace(sdxl.CLIP_BIGG, max_position_embeddings=64)},
            "max_position_embeddings .* differ",
        ),
        ({"unet": sd.UNET_SD2}, "is of the family 'sd', but model.family is 'sdxl'"),
    ],
)
def test_networks_that_do_not_fit_are_refused(changes, words):
    model = model_of(dataclasses.replace(SDXLConfig(), **changes))
    with pytest.raises(UserError, match=words):
        model.family.check(model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unet": sd.UNET_SD2}, "cross_attention_dim is 1024, but .*hidden_size is 768"),
        ({"unet": sdxl.UNET_SDXL}, "is of the family 'sdxl', but model.family is 'sd'"),
        ({"text_encoder": None}, "model.text_encoder is missing"),
    ],
)
def test_networks_of_sd_that_do_not_fit_are_refused(changes, words):
    model = model_of(dataclasses.replace(SDConfig(), **changes))
    with pytest.raises(UserError, match=words):
        model.family.check(model)


def test_flux_dev_is_trained_at_a_guidance_of_one():
    """At 3.5 it would unlearn what the number means (huggingface/diffusers#11181)."""

    def told(embeds, batch):
        networks = types.SimpleNamespace(denoiser=types.SimpleNamespace(guidance_embeds=embeds))
        features = {"context": jnp.zeros((3, 5, 4)), "pooled": jnp.zeros((3, 4))}
        return flux.context(networks, features, batch, target=(8, 8), negative=False)

    trained = told(True, {})["guidance"]
    assert trained.dtype == jnp.float32 and trained.tolist() == [1.0] * 3
    drawn = jnp.asarray([3.5, 1.0, 30.0])
    assert told(True, {"guidance": drawn})["guidance"] is drawn
    assert "guidance" not in told(False, {"guidance": drawn})
