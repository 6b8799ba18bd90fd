"""The text encoder against `transformers.CLIPTextModel` with random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdjax.families import sd, sdxl
from sdjax.models import weights
from sdjax.models.clip import CLIPText, CLIPTextConfig
from sdjax.models.config import ConfigError

SMALL = CLIPTextConfig(
    vocab_size=99, hidden_size=48, intermediate_size=160, num_hidden_layers=3,
    num_attention_heads=4, max_position_embeddings=20, eos_token_id=98,
)  # fmt: skip
CASES = {
    "clip_l_like": SMALL,
    "openclip_h_like": CLIPTextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=256, num_hidden_layers=5,
        num_attention_heads=4, max_position_embeddings=20, hidden_act="gelu",
    ),
    "odd": CLIPTextConfig(
        vocab_size=31, hidden_size=30, intermediate_size=44, num_hidden_layers=1,
        num_attention_heads=3, max_position_embeddings=7, layer_norm_eps=1e-3,
    ),
    "openclip_bigg_like": CLIPTextConfig(
        vocab_size=99, hidden_size=40, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=5, max_position_embeddings=20, hidden_act="gelu", projection_dim=28,
    ),
}  # fmt: skip
# Published configs: SD1.5's and SD2.1's text_encoder/config.json on the hub.
SD1 = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0", "vocab_size": 49408,
}  # fmt: skip
SD2 = SD1 | {
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_hidden_layers": 23, "projection_dim": 512,
}  # fmt: skip
# text_encoder_2/config.json of SDXL
BIGG = SD1 | {
    "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
    "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32,
    "projection_dim": 1280,
}  # fmt: skip


def torch_model(config):
    """The class of `config.architecture`, every parameter random, biases and norm scales too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, config.architecture)
    model = cls(transformers.CLIPTextConfig(**config.to_json())).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * (1.0 if "embed" in name else parameter.shape[1] ** -0.5))
    return model


def numpy_state(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def tokens_for(config, batch=3, length=None):
    rng = np.random.default_rng(1)
    length = length or config.max_position_embeddings
    tokens = rng.integers(0, config.vocab_size - 1, (batch, length)).astype(np.int32)
    tokens[:, length // 2 :: 2] = config.vocab_size - 1  # several EOS, as padding with it gives
    return tokens


def assert_close(ours, theirs, what):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * scale, err_msg=what)


@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient_match_transformers(name):
    torch = pytest.importorskip("torch")
    config = CASES[name]
    reference = torch_model(config)
    graphdef, shapes = weights.abstract(CLIPText, config)
    params = weights.from_diffusers(numpy_state(reference), shapes)
    tokens = tokens_for(config)
    cotangent = np.random.default_rng(2).normal(size=(*tokens.shape, config.hidden_size))
    cotangent = cotangent.astype(np.float32)

    output = getattr(reference, "text_model", reference)(torch.from_numpy(tokens).long())
    (output.last_hidden_state * torch.from_numpy(cotangent)).sum().backward()

    @jax.jit
    def run(params):
        model = weights.merge(graphdef, params)
        hidden = model(jnp.asarray(tokens))
        return jnp.sum(hidden * cotangent), (hidden, model.pooled(hidden, jnp.asarray(tokens)))

    (_, (hidden, pooled)), grads = jax.value_and_grad(run, has_aux=True)(params)
    assert hidden.dtype == jnp.float32
    assert_close(hidden, output.last_hidden_state.detach(), "last hidden state")
    assert_close(pooled, output.pooler_output.detach(), "pooled")
    ours = weights.to_diffusers(grads)
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    assert ours.keys() == {name.removeprefix("text_model.") for name in theirs}
    if config.projection_dim:  # not in this output; its gradient is compared below
        assert not np.any(ours["text_projection.weight"]) and not theirs.pop(
            "text_projection.weight"
        )
    theirs = {name: gradient.numpy() for name, gradient in theirs.items()}
    for name, gradient in theirs.items():
        # A key's bias moves all logits of a row alike: its gradient is zero but for rounding.
        if name.endswith("k_proj.bias"):
            weight = np.abs(theirs[name.replace("bias", "weight")]).max()
            assert np.abs(ours[name.removeprefix("text_model.")]).max() <= 1e-5 * weight
        else:
            assert_close(ours[name.removeprefix("text_model.")], gradient, name)


@pytest.mark.parametrize("name", ["clip_l_like", "openclip_bigg_like"])
def test_what_sdxl_takes_matches_transformers_with_every_gradient(name):
    """hidden_states[-2] and the projection of the last state at the EOS."""
    torch = pytest.importorskip("torch")
    config = CASES[name]
    reference = torch_model(config)
    graphdef, shapes = weights.abstract(CLIPText, config)
    params = weights.from_diffusers(numpy_state(reference), shapes)
    tokens = tokens_for(config)
    output = reference(torch.from_numpy(tokens).long(), output_hidden_states=True)
    rng = np.random.default_rng(2)
    wanted = {"context": output.hidden_states[-2]}
    if config.projection_dim:
        wanted["pooled"] = output.text_embeds
    cotangents = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in wanted.items()}
    sum((v * torch.from_numpy(cotangents[k])).sum() for k, v in wanted.items()).backward()

    @jax.jit
    def run(params):
        context, pooled = weights.merge(graphdef, params).penultimate(jnp.asarray(tokens))
        found = {"context": context} | ({} if pooled is None else {"pooled": pooled})
        return sum(jnp.sum(v * cotangents[k]) for k, v in found.items()), found

    (_, found), grads = jax.value_and_grad(run, has_aux=True)(params)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert value.dtype == jnp.float32
        assert_close(value, wanted[key].detach(), key)
    ours = weights.to_diffusers(grads)
    for path, parameter in reference.named_parameters():
        gradient = ours[path.removeprefix("text_model.")]
        if parameter.grad is None:  # of the last layer and the norm, where nothing is projected
            assert not np.any(gradient)
        elif not path.endswith("k_proj.bias"):  # zero but for rounding
            assert_close(gradient, parameter.grad.numpy(), path)


def test_every_hidden_state_matches_transformers():
    torch = pytest.importorskip("torch")
    reference = torch_model(SMALL)
    graphdef, shapes = weights.abstract(CLIPText, SMALL)
    model = weights.merge(graphdef, weights.from_diffusers(numpy_state(reference), shapes))
    tokens = tokens_for(SMALL, length=11)
    theirs = reference(torch.from_numpy(tokens).long(), output_hidden_states=True).hidden_states
    ours = model.hidden_states(jnp.asarray(tokens))
    assert len(ours) == len(theirs) == SMALL.num_hidden_layers + 1
    for i, (mine, theirs_i) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(mine, theirs_i.detach(), f"hidden state {i}")


def test_weights_are_read_with_and_without_prefix_and_position_ids():
    _, shapes = weights.abstract(CLIPText, SMALL)
    params = weights.init(CLIPText, SMALL, jax.random.key(0))
    bare = weights.to_diffusers(params)
    prefixed = weights.to_diffusers(params, prefix="text_model.")
    prefixed["text_model.embeddings.position_ids"] = np.arange(20)[None]
    for tensors in (bare, prefixed):
        again = weights.from_diffusers(tensors, shapes)
        assert again.keys() == params.keys()
        for path, value in params.items():
            np.testing.assert_array_equal(again[path], value)


@pytest.mark.parametrize(
    "data, count", [(SD1, 123_060_480), (SD2, 340_387_840), (BIGG, 694_659_840)]
)
def test_full_size_has_the_parameters_of_transformers(data, count):
    config, ignored = CLIPTextConfig.from_json(data)
    _, shapes = weights.abstract(CLIPText, config)
    assert sum(int(np.prod(p.shape)) for p in shapes.values()) == count
    assert ("projection_dim" in ignored) == (data is not BIGG) and "dropout" in ignored
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        cls = getattr(transformers, config.architecture)
        reference = cls(transformers.CLIPTextConfig(**config.to_json()))
    assert sum(p.numel() for p in reference.parameters()) == count


def test_defaults_are_those_of_sd1():
    assert CLIPTextConfig.from_json(SD1)[0] == CLIPTextConfig()


def test_presets_are_the_published_configs():
    assert CLIPTextConfig.from_json(SD2)[0] == sd.CLIP_H
    assert CLIPTextConfig.from_json(BIGG)[0] == sdxl.CLIP_BIGG
    assert CLIPTextConfig.from_json(sdxl.CLIP_BIGG.to_json())[0] == sdxl.CLIP_BIGG


def test_fields_left_out_are_transformers_defaults():
    transformers = pytest.importorskip("transformers")
    config, _ = CLIPTextConfig.from_json({"architectures": ["CLIPTextModelWithProjection"]})
    reference = transformers.CLIPTextConfig()
    for name, value in vars(config).items():
        assert getattr(reference, name) == value, name
    assert CLIPTextConfig.from_json({})[0].projection_dim is None


def test_config_written_by_transformers_is_read_and_goes_there_and_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    reference = transformers.CLIPTextConfig(hidden_act="gelu", num_hidden_layers=4)
    reference.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    config, _ = CLIPTextConfig.from_json(data)
    assert config.hidden_act == "gelu" and config.num_hidden_layers == 4
    assert CLIPTextConfig.from_json(config.to_json())[0] == config


def test_unsupported_fields_are_all_named():
    data = SD1 | {"hidden_act": "relu6", "frobnicate": 3, "model_type": "clip"}
    with pytest.raises(ConfigError) as caught:
        CLIPTextConfig.from_json(data, where="text_encoder/config.json")
    message = str(caught.value)
    assert "text_encoder/config.json" in message
    assert "frobnicate = 3" in message and "model_type = 'clip'" in message
    with pytest.raises(ConfigError, match="relu6.*quick_gelu or gelu"):
        CLIPTextConfig.from_json(SD1 | {"hidden_act": "relu6"})
    with pytest.raises(ConfigError, match="CLIPForImageClassification"):
        CLIPTextConfig.from_json(SD1 | {"architectures": ["CLIPForImageClassification"]})


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_attention_heads", 5),
        ("num_hidden_layers", 0),
        ("attention_dropout", 1.0),
        ("projection_dim", 0),
    ],
)
def test_impossible_values_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value}"):
        CLIPTextConfig(**{field: value})


def test_later_tokens_do_not_change_earlier_states():
    params = weights.init(CLIPText, SMALL, jax.random.key(0))
    model = weights.merge(weights.abstract(CLIPText, SMALL)[0], params)
    tokens = tokens_for(SMALL)
    other = tokens.copy()
    other[:, 9:] = 5
    a, b = model(jnp.asarray(tokens)), model(jnp.asarray(other))
    np.testing.assert_array_equal(a[:, :9], b[:, :9])
    assert np.abs(a[:, 9:] - b[:, 9:]).max() > 1e-3


def test_captions_longer_than_the_positions_are_refused():
    model = CLIPText(SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\(1, 21\).*max_position_embeddings = 20"):
        model(jnp.zeros((1, 21), jnp.int32))


@pytest.mark.parametrize("remat", ["block", "full", "dots_saveable"])
def test_rematerialisation_changes_no_gradient(remat):
    params = weights.init(CLIPText, SMALL, jax.random.key(0))
    # Embeddings as small as those of CLIP's checkpoints.
    params = {p: v * 0.04 if "embedding" in p else v for p, v in params.items()}
    tokens = jnp.asarray(tokens_for(SMALL))

    def gradients(remat):
        graphdef, _ = weights.abstract(CLIPText, SMALL, remat=remat)

        def loss(params):  # not a function of the norm, which the final LayerNorm holds constant
            out = weights.merge(graphdef, params)(tokens)
            return jnp.vdot(out, jax.random.normal(jax.random.key(1), out.shape))

        return jax.jit(jax.grad(loss))(params)

    plain = gradients("none")
    largest = max(np.abs(gradient).max() for gradient in plain.values())
    for path, gradient in gradients(remat).items():
        # Gradients of the keys' biases are zero, up to the rounding of what cancels.
        bound = 1e-5 * np.abs(plain[path]).max() + 1e-8 * largest
        np.testing.assert_allclose(gradient, plain[path], rtol=0, atol=bound)


def test_dropout_differs_by_key_and_layer_and_averages_out():
    config = CLIPTextConfig(**{**vars(SMALL), "attention_dropout": 0.3})
    params = weights.init(CLIPText, config, jax.random.key(0))
    model = weights.merge(weights.abstract(CLIPText, config)[0], params)
    tokens = jnp.asarray(tokens_for(config))
    plain = model(tokens)
    a, b = (model(tokens, key=jax.random.key(i)) for i in (0, 1))
    assert np.abs(a - plain).max() > 1e-2 and np.abs(a - b).max() > 1e-2
    np.testing.assert_array_equal(a, model(tokens, key=jax.random.key(0)))

    layer = model.encoder.layers[0].self_attn
    x = jax.random.normal(jax.random.key(2), (2, 9, config.hidden_size))
    drawn = jax.vmap(lambda key: layer(x, key))(jax.random.split(jax.random.key(3), 4000))
    np.testing.assert_allclose(drawn.mean(0), layer(x), atol=0.05)


def test_bfloat16_stays_close_to_float32():
    params = weights.init(CLIPText, SMALL, jax.random.key(0))
    tokens = jnp.asarray(tokens_for(SMALL))
    exact, rough = (
        weights.merge(weights.abstract(CLIPText, SMALL, dtype=dtype)[0], params)(tokens)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rough.dtype == jnp.float32
    assert float(jnp.sqrt(jnp.mean((rough - exact) ** 2))) < 0.02


def test_layers_start_with_the_deviations_of_openai_clip_and_embeddings_with_larger_ones():
    params = weights.init(CLIPText, CASES["openclip_h_like"], jax.random.key(0))
    width, layers = 64, 5
    expected = {
        "embeddings.token_embedding.embedding": 0.5,
        "embeddings.position_embedding.embedding": 0.25,
        "encoder.layers.2.self_attn.q_proj.kernel": width**-0.5,
        "encoder.layers.2.self_attn.out_proj.kernel": (width * 2 * layers) ** -0.5,
        "encoder.layers.2.mlp.fc1.kernel": (2 * width) ** -0.5,
        "encoder.layers.2.mlp.fc2.kernel": (width * 2 * layers) ** -0.5,
    }
    for path, std in expected.items():
        assert abs(float(params[path].std()) / std - 1) < 0.06, path
    a, b = (params[f"encoder.layers.{i}.self_attn.q_proj.kernel"] for i in (0, 1))
    assert np.abs(a - b).max() > 0.1, "layers must not share their draw"


def test_the_state_of_a_word_tells_it_from_another_before_training():
    params = weights.init(CLIPText, SMALL, jax.random.key(0))
    graph, _ = weights.abstract(CLIPText, SMALL)
    captions = np.array([[0, 5, 6, 7, 8, 2], [0, 9, 6, 7, 8, 2]])  # another second word
    states = np.asarray(weights.merge(graph, params)(captions))
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    assert unit[0, 1] @ unit[1, 1] < 0.6  # a mean of 0.43 over seeds; with CLIP's own 0.02, 0.68
