"""Token tables with rows of words that were learnt, and where a caption is pooled."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sdjax.data.text.tokenizer import Tokenizer
from sdjax.errors import UserError
from sdjax.families import embeddings
from sdjax.families.bind import bind
from sdjax.families.embeddings import Embedding, NewRows, with_embeddings
from sdjax.families.family import Model
from sdjax.families.flux import FLUX
from sdjax.families.sdxl import SDXL
from sdjax.models import weights
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.longer_table import LongerEmbed
from sdjax.models.products import Embed
from sdjax.parallel.sharding import param_spec


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a red circle"] * 4, 520, context_length=8)


@pytest.fixture(scope="module")
def encoders(tokenizer):
    """SDXL's two encoders of transformers, small, with configs as published: eos_token_id = 2."""
    import transformers

    from tests.conftest import randomise

    words = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 8, "eos_token_id": 2}
    first = transformers.CLIPTextConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, **words
    )
    second = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
        hidden_act="gelu", projection_dim=10, **words,
    )  # fmt: skip
    made = {
        "text_encoder": transformers.CLIPTextModel(first).eval(),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(second).eval(),
    }
    for seed, network in enumerate(made.values()):
        randomise(network, seed)
    return made


@pytest.fixture(scope="module")
def model(encoders, tokenizer):
    from sdjax.models.weights import from_diffusers

    networks, params = {}, {}
    for name, encoder in encoders.items():
        config, _ = CLIPTextConfig.from_json(
            encoder.config.to_diff_dict() | {"architectures": [type(encoder).__name__]}
        )
        networks[name] = config
        shapes = weights.abstract(SDXL.parts[name].network, config, param_dtype=jnp.float32)[1]
        tensors = {k: v.numpy() for k, v in encoder.state_dict().items()}
        own = from_diffusers(tensors, shapes)
        params |= {f"{name}.{path}": value for path, value in own.items()}
    tokenizers = {"tokens": tokenizer, "tokens_2": tokenizer}
    return Model(SDXL, networks, params=params, tokenizers=tokenizers)


def cat(model, count=1):
    rng = np.random.default_rng(0)
    rows = {
        name: rng.standard_normal((count, config.hidden_size)).astype(np.float32)
        for name, config in model.text_encoders.items()
    }
    return Embedding("<cat>", rows)


def encoded(model, text):
    """(tokens [L], context [L, D], pooled [D]) of the second encoder."""
    networks = bind(model, ("text_encoder_2",))
    tokens = model.tokenizers["tokens_2"].encode([text])
    params = {path: jnp.asarray(value) for path, value in model.params.items()}
    context, pooled = networks.module("text_encoder_2", params).penultimate(jnp.asarray(tokens))
    return tokens[0], context[0], pooled[0]


def test_a_caption_with_a_new_word_is_pooled_at_its_eos(model, encoders, tokenizer):
    """FT-29: [bos, a, NEW, red, eos, ...]; transformers pools at 2, where the highest id is."""
    import torch
    import transformers

    longer = with_embeddings(model, [cat(model)])
    tokens, context, pooled = encoded(longer, "a <cat> red")
    assert tokens.argmax() == 2 and tokens[4] == tokenizer.eos_id
    theirs = encoders["text_encoder_2"]
    state = theirs.state_dict()
    key = next(k for k in state if k.endswith("token_embedding.weight"))
    table = longer.params["text_encoder_2.embeddings.token_embedding.embedding"]
    state[key] = torch.from_numpy(np.array(table))
    found = {}
    for eos in (2, tokenizer.eos_id):
        config = theirs.config.to_dict() | {"vocab_size": len(table), "eos_token_id": eos}
        larger = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
        larger.load_state_dict(state)
        with torch.no_grad():
            out = larger.eval()(torch.from_numpy(tokens[None]).long(), output_hidden_states=True)
        found[eos] = out.text_embeds[0].numpy(), out.hidden_states[-2][0].numpy()
    want, hidden = found[tokenizer.eos_id]
    np.testing.assert_allclose(pooled, want, atol=2e-5)
    np.testing.assert_allclose(context, hidden, atol=2e-5)
    assert np.abs(found[2][0] - want).max() > 0.01  # what transformers takes with the config as is


def test_models_without_new_words_pool_where_they_did(model, tokenizer):
    networks = bind(model, ("text_encoder_2",))
    assert networks.configs["text_encoder_2"].eos_token_id == 2
    longer = with_embeddings(model, [cat(model)])
    assert longer.networks["text_encoder_2"].eos_token_id == tokenizer.eos_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_rows_are_those_of_a_longer_table_and_get_all_of_the_gradient(dtype):
    rng = np.random.default_rng(1)
    table, rows = rng.standard_normal((5, 3)), rng.standard_normal((2, 3))
    network = Embed(
        5, 3, embedding_init=lambda *a: jnp.asarray(table, jnp.float32), dtype=jnp.dtype(dtype),
        rngs=weights.Keys(jax.random.key(0)),
    )  # fmt: skip
    longer = LongerEmbed(network, 2, rngs=weights.Keys(jax.random.key(1)))
    graph, params = weights.split(longer)
    params["rows"] = jnp.asarray(rows, jnp.float32)
    index = jnp.asarray([[0, 5, 4], [6, 5, 1]])

    def looked_up(params):
        return weights.merge(graph, params)(index)

    whole = np.concatenate([table, rows]).astype(np.float32)[index]
    np.testing.assert_array_equal(looked_up(params), whole.astype(jnp.dtype(dtype)))
    dy = jnp.asarray(rng.standard_normal((2, 3, 3)), jnp.float32)
    grads = jax.grad(lambda p: jnp.sum(looked_up(p).astype(jnp.float32) * dy))(params)
    rounded = np.asarray(dy.astype(dtype), np.float32)
    want = np.stack([rounded[0, 1] + rounded[1, 1], rounded[1, 0]])
    np.testing.assert_allclose(grads["rows"], want, rtol=1e-2 if dtype == "bfloat16" else 1e-6)


def test_a_model_with_changes_reads_as_one_with_longer_tables(model):
    """A workdir's rows lie apart; whoever reads it gets them in the tables."""
    word = cat(model, 2)
    want = with_embeddings(model, [word])
    apart = dataclasses.replace(
        model,
        tokenizers=want.tokenizers,
        changes=embeddings.new_rows(SDXL, 2),
        params=model.params | {embeddings.rows_path(n): x for n, x in word.rows.items()},
    )
    assert apart.changes == (NewRows("text_encoder", 2), NewRows("text_encoder_2", 2))
    assert bind(apart).abstract.keys() == apart.params.keys()
    found = embeddings.in_tables(apart)
    assert found.networks == want.networks and found.changes == ()
    assert found.params.keys() == want.params.keys()
    for path, value in want.params.items():
        np.testing.assert_array_equal(found.params[path], value, err_msg=path)
    for one, other in zip(encoded(apart, "a <cat>"), encoded(want, "a <cat>"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_averages_of_rows_take_their_place_in_a_table(model):
    """As `convert --ema_length` puts the averages of a run into the model that is read from it."""
    word, table = cat(model, 2), embeddings.table_path("text_encoder")
    longer = with_embeddings(model, [word])
    average = {embeddings.rows_path("text_encoder"): np.full((2, 12), 3, np.float32), "x": 1}
    found = embeddings.tables_with(longer.params, average)
    assert found.keys() == {table, "x"} and found["x"] == 1
    np.testing.assert_array_equal(found[table][:-2], model.params[table])
    np.testing.assert_array_equal(found[table][-2:], average[embeddings.rows_path("text_encoder")])


def test_words_are_refused_where_ids_and_rows_would_not_meet(model, tokenizer):
    config = dataclasses.replace(
        model.networks["text_encoder"], vocab_size=tokenizer.vocab_size + 8
    )
    padded = dataclasses.replace(model, networks={**model.networks, "text_encoder": config})
    with pytest.raises(UserError, match="has 528 rows, and its tokenizer 520 tokens"):
        with_embeddings(padded, [cat(model)])


def test_two_embeddings_of_one_word_are_an_error(model):
    with pytest.raises(UserError, match="'<cat>' in its vocabulary already"):
        with_embeddings(model, [cat(model), cat(model)])


def test_new_rows_are_split_as_a_table_is():
    """By columns: a look-up in rows that are split would add up batches over all devices."""
    mesh = types.SimpleNamespace(shape={"tensor": 1, "fsdp": 2})
    for path in (embeddings.rows_path("text_encoder"), embeddings.table_path("text_encoder")):
        assert param_spec(path, (16, 1280), mesh) == PartitionSpec(None, "fsdp")


def test_families_with_other_encoders_than_clips_take_no_words():
    with pytest.raises(UserError, match="'flux' has others"):
        embeddings.check_family(FLUX)
