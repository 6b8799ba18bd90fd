"""The T5 encoder against `transformers.T5EncoderModel` with random weights."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import weights
from sdjax.models.config import ConfigError
from sdjax.models.stacked_paths import shapes_apart
from sdjax.models.t5 import T5Config, T5Encoder, relative_buckets
from tests.models.flops import flops
from tests.models.waves import filled, summary

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = T5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=3)
CASES = {
    "v1_1": (SMALL, "none"),
    "v1_1_remat": (SMALL, "block"),
    "v1_0": (dataclasses.replace(SMALL, feed_forward_proj="relu", d_kv=5), "none"),
    "one_block": (
        dataclasses.replace(
            SMALL, num_layers=1, relative_attention_num_buckets=8,
            relative_attention_max_distance=20, layer_norm_epsilon=1e-3,
        ),
        "full",
    ),
}  # fmt: skip
ALIAS = "encoder.embed_tokens.weight"  # the same tensor as shared.weight
# text_encoder_3/config.json of SD3 on the hub.
XXL = {
    "_name_or_path": "google/t5-v1_1-xxl", "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64, "d_model": 4096,
    "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1,
    "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0,
    "is_encoder_decoder": True, "is_gated_act": True, "layer_norm_epsilon": 1e-06,
    "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24,
    "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.41.0", "use_cache": True, "vocab_size": 32128,
}  # fmt: skip


def torch_model(config, reference):
    model = transformers.T5EncoderModel(transformers.T5Config(**config.to_json()))
    return reference.randomised(model)


def loaded(model, config, reference, **kw):
    """(graph, parameters) with the weights of a torch model."""
    graph, shapes = weights.abstract(T5Encoder, config, **kw)
    tensors = reference.tensors(model)
    tensors.pop(ALIAS)
    return graph, weights.from_diffusers(tensors, shapes)


@pytest.mark.parametrize("name,masked", [*((name, False) for name in CASES), ("v1_1", True)])
def test_output_and_every_gradient_match_transformers(name, masked, reference):
    config, remat = CASES[name]
    model = torch_model(config, reference)
    graph, params = loaded(model, config, reference, remat=remat)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 37))
    mask = np.ones_like(tokens)
    mask[1, 11:] = 0
    cotangent = reference.normal(2, 2, 37, config.d_model)

    theirs = model(
        torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask) if masked else None
    ).last_hidden_state
    (theirs * torch.from_numpy(cotangent).double()).sum().backward()

    @reference.jit
    def run(params):
        def loss(params):
            own = jnp.asarray(mask) if masked else None
            hidden = weights.merge(graph, params)(jnp.asarray(tokens), mask=own)
            return jnp.sum(hidden * cotangent), hidden

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, ours), slopes = run(params)
    assert ours.dtype == jnp.float32
    assert reference.error(ours, theirs.detach()) < 2e-5
    ours = weights.to_diffusers(slopes)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys() - {ALIAS}
    for name, slope in ours.items():
        assert reference.error(slope, theirs[name]) < 2e-5, name


@pytest.mark.parametrize("buckets,distance", [(32, 128), (32, 100), (8, 20), (64, 512), (10, 7)])
def test_buckets_are_those_of_transformers_for_every_distance(buckets, distance):
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    for length in (1, 2, 77, 1500):
        ours = relative_buckets(length, buckets, distance)
        at = torch.arange(length)
        wanted = bucket(at[None, :] - at[:, None], True, buckets, distance)
        np.testing.assert_array_equal(ours, wanted.numpy())


def test_buckets_have_the_recorded_values():
    table = relative_buckets(1201, 32, 128)[600]
    wanted = {
        -200: 15, -100: 15, -64: 14, -32: 12, -16: 10, -15: 9, -8: 8, -7: 7, -1: 1, 0: 0, 1: 17,
        7: 23, 8: 24, 12: 25, 16: 26, 23: 27, 32: 28, 46: 29, 64: 30, 91: 31, 600: 31,
    }  # fmt: skip
    assert {d: int(table[600 + d]) for d in wanted} == wanted
    sums = {length: int(relative_buckets(length, 32, 128).sum()) for length in (77, 256, 512)}
    assert sums == {77: 103_774, 256: 1_361_610, 512: 5_721_546}


def test_a_network_of_known_weights_gives_the_recorded_states():
    config = T5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3)
    graph, shapes = weights.abstract(T5Encoder, config)
    tensors = filled(shapes)
    assert sum(array.size for array in tensors.values()) == 12_120
    network = weights.merge(graph, weights.from_diffusers(tensors, shapes))
    i = np.arange(40)
    tokens = np.stack([(7 * i + 3) % 64, np.where(i < 12, (5 * i + 1) % 64, 0)])
    states = network(tokens)
    wanted = [-327.456085, 1934.535194, -0.898779, -0.578889, 0.350125, -1.448547]
    np.testing.assert_allclose(summary(states), wanted, rtol=2e-6, atol=2e-6)
    masked = network(tokens, mask=np.stack([np.ones(40), i < 12]))
    assert abs(masked - states)[1, 0].max() == pytest.approx(0.360, abs=1e-3)


def test_xxl_has_the_names_shapes_and_counts_of_transformers():
    config, _ = T5Config.from_json(XXL)
    assert config == T5Config()
    _, shapes = weights.abstract(T5Encoder, config)
    apart = shapes_apart(shapes)
    assert len(apart) == 219
    assert sum(shape.size for shape in apart.values()) == 4_762_310_656
    with torch.device("meta"):
        model = transformers.T5EncoderModel(transformers.T5Config(**config.to_json()))
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len(state) == 220 and ALIAS in state
    del state[ALIAS]
    ours = {
        weights.weight_name(path): tuple(reversed(shape.shape)) if path.endswith("kernel")
        else tuple(shape.shape)
        for path, shape in apart.items()
    }  # fmt: skip
    assert ours == state


@pytest.mark.parametrize("length,tflop", [(77, 0.715), (256, 2.397), (512, 4.845)])
def test_flops_of_xxl_are_those_of_the_reference(length, tflop):
    graph, shapes = weights.abstract(T5Encoder, T5Config(), dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    program = jax.make_jaxpr(lambda params, t: weights.merge(graph, params)(t))(shapes, tokens)
    assert round(flops(program.jaxpr) / 1e12, 3) == tflop


def test_bfloat16_is_closer_to_exact_than_transformers_in_bfloat16(reference):
    """Both round inputs and outputs of products; here the residual stream stays in float32."""
    model = torch_model(SMALL, reference)
    graph, params = loaded(model, SMALL, reference, dtype=jnp.bfloat16)
    tokens = np.arange(2 * 37).reshape(2, 37) % 64
    exact = model(torch.from_numpy(tokens)).last_hidden_state.detach().numpy()
    theirs = model.bfloat16()(torch.from_numpy(tokens)).last_hidden_state.detach().float().numpy()
    ours = reference.jit(weights.merge(graph, params))(jnp.asarray(tokens))
    assert ours.dtype == jnp.float32
    error, bound = (np.sqrt(np.mean((x - exact) ** 2)) for x in (ours, theirs))
    assert 2**-12 < error < bound < 0.1


def test_float16_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="dtype = float16: T5's .* 65,504.*bfloat16 or float32"):
        weights.abstract(T5Encoder, SMALL, dtype=jnp.float16)


def test_new_parameters_have_the_spread_of_transformers():
    config = T5Config(vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=8)
    params = weights.to_diffusers(weights.init(T5Encoder, config, jax.random.key(0)))
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**config.to_json()))
    for name, value in model.state_dict().items():
        if name != ALIAS and value.ndim == 2:
            # The deviation of a sample of n numbers is off by (2 n)^-1/2 of itself: four of those.
            error = 4 * (2 / value.numel()) ** 0.5
            assert params[name].std() == pytest.approx(value.std().item(), rel=error), name


def test_config_of_the_hub_is_read_and_written():
    config, ignored = T5Config.from_json(XXL)
    assert {"tie_word_embeddings", "dropout_rate", "num_decoder_layers"} <= set(ignored)
    assert T5Config.from_json(config.to_json())[0] == config
    assert config.architecture == "T5EncoderModel"
    read = transformers.T5Config(**config.to_json())
    assert (read.dense_act_fn, read.is_gated_act) == ("gelu_new", True)
    # What an absent field means is transformers' default.
    small, _ = T5Config.from_json({})
    for field in dataclasses.fields(T5Config):
        assert getattr(small, field.name) == getattr(transformers.T5Config(), field.name)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"feed_forward_proj": "gated-silu", "dense_act_fn": "silu"}, "dense_act_fn = 'silu'"),
        ({"feed_forward_proj": "gelu"}, "is_gated_act = True .supported: False"),
        ({"model_type": "umt5"}, "model_type = 'umt5' .supported: 't5'"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"num_layers": 0}, "num_layers = 0: expected 1 to 256"),
        ({"relative_attention_num_buckets": 31}, "31: expected an even number"),
        ({"relative_attention_max_distance": 8}, "max_distance = 8: expected more than a quarter"),
        ({"surprise": 1}, "surprise = 1 .unknown field"),
        ({"d_model": "4096"}, "d_model = '4096' .expected int"),
    ],
)
def test_configs_that_cannot_be_honoured_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        T5Config.from_json({**XXL, **change})


def test_blocks_of_one_kind_are_traced_once():
    graph, shapes = weights.abstract(T5Encoder, T5Config())
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    program = jax.make_jaxpr(lambda params, t: weights.merge(graph, params)(t))(shapes, tokens)
    lengths = [e.params["length"] for e in program.jaxpr.eqns if e.primitive.name == "scan"]
    assert lengths == [1, 23]
    assert list(itertools.islice(shapes, 1)) and any("block.0-0.layer.0" in p for p in shapes)
