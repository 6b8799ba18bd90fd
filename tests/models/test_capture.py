"""What is captured inside the UNet, against hooks and processors on diffusers' own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import capture, weights
from sdjax.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=24,
    attention_head_dim=4,
    transformer_layers_per_block=(2, 1),
)
BLOCKS = {"ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "Downsample2D",
          "Upsample2D"}  # fmt: skip


def cross(path):
    return path.endswith("attn2")


@pytest.fixture(scope="module")
def torch_unet(reference):
    import diffusers

    options = {k: v for k, v in CONFIG.to_json().items() if not k.startswith("_")}
    return reference.randomised(diffusers.UNet2DConditionModel(**options))


@pytest.fixture(scope="module")
def params(torch_unet, reference):
    return weights.from_diffusers(reference.tensors(torch_unet), weights.abstract(UNet, CONFIG)[1])


@pytest.fixture(scope="module")
def inputs(reference):
    return reference.normal(1, 2, 7, 6, 4), np.array([3.0, 977.0]), reference.normal(2, 2, 5, 24)


@pytest.fixture(scope="module")
def measured(torch_unet, inputs, reference):
    """(probabilities, largest logits, largest outputs) of the torch network, by module name."""
    import torch

    probabilities, logits, outputs = {}, {}, {}

    class Storing:
        """diffusers' AttnProcessor, for this network's attention layers, with a memory."""

        def __init__(self, name):
            self.name = name

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query, key, value = (
                attn.head_to_batch_dim(layer(x))
                for layer, x in (
                    (attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context),
                )
            )  # fmt: skip
            logits[self.name] = (query @ key.transpose(1, 2) * attn.scale).max().item()
            scores = attn.get_attention_scores(query, key)  # [B heads, L, M]
            by_head = scores.reshape(len(hidden_states), attn.heads, *scores.shape[1:])
            probabilities[self.name] = by_head.numpy()
            return attn.to_out[0](attn.batch_to_head_dim(scores @ value))

    def keep(name):
        def hook(module, args, out):
            out = out if torch.is_tensor(out) else out[0]
            outputs[name] = out.abs().max().item()

        return hook

    names = torch_unet.attn_processors
    torch_unet.set_attn_processor({n: Storing(n.removesuffix(".processor")) for n in names})
    handles = [
        module.register_forward_hook(keep(name))
        for name, module in torch_unet.named_modules()
        if type(module).__name__ in BLOCKS
    ]
    xt, t, context = (reference.to_torch(x) for x in inputs)
    with torch.no_grad():
        torch_unet(xt, t, context)
    for handle in handles:
        handle.remove()
    return probabilities, logits, outputs


@pytest.fixture(scope="module")
def graph():
    return weights.abstract(UNet, CONFIG)[0]


@pytest.fixture(scope="module")
def captured(graph, params, inputs, reference):
    """(output, what was captured) with the probabilities of cross-attention."""

    def run(params, *inputs):
        network = weights.merge(graph, params)
        with capture.capturing(network, probabilities=cross) as found:
            out = network(*inputs)
        return out, found.take()

    with jax.default_matmul_precision("highest"):
        return jax.jit(run)(params, *inputs)


def test_probabilities_are_those_of_a_storing_processor(captured, measured, reference):
    found, want = captured[1], {name: p for name, p in measured[0].items() if cross(name)}
    assert found.keys() == want.keys() and len(found) == 2 + 1 + 2 * 2
    for path, ours in found.items():
        assert ours.dtype == jnp.float32
        # Float32 against float64: a few rounding steps of the logits.
        assert reference.error(ours, want[path]) < 2e-5
        assert np.allclose(ours.sum(-1), 1.0, atol=1e-6)


def test_maxima_are_those_of_hooks(graph, params, inputs, measured):
    found = jax.jit(lambda *args: capture.maxima(graph, *args))(params, *inputs)
    want = measured[1] | measured[2]
    assert found.keys() == want.keys()
    assert {"mid_block.attentions.0", "up_blocks.0.upsamplers.0", "down_blocks.0.downsamplers.0",
            "down_blocks.0.attentions.0.transformer_blocks.1.attn1"} <= found.keys()  # fmt: skip
    for path, ours in found.items():
        assert ours.shape == () and ours.dtype == jnp.float32
        assert float(ours) == pytest.approx(want[path], rel=2e-5), path


def test_the_output_is_the_same_to_the_bit_and_so_is_the_program(
    graph, params, inputs, captured, reference
):
    def run(params, *inputs):
        return weights.merge(graph, params)(*inputs)

    before = jax.make_jaxpr(run)(params, *inputs)
    with jax.default_matmul_precision("highest"):
        assert np.array_equal(jax.jit(run)(params, *inputs), captured[0])

    def other(params, *inputs):  # captures of another network
        network, outside = weights.merge(graph, params), weights.merge(graph, params)
        with capture.capturing(network, probabilities=cross, maxima=True) as found:
            out = outside(*inputs)
        assert not found.take()
        outside(*inputs)
        assert not found.take()
        return out

    jaxpr = jax.make_jaxpr(other)(params, *inputs)
    assert len(jaxpr.eqns) == 2 * len(before.eqns)
    assert str(jax.make_jaxpr(run)(params, *inputs)) == str(before)


def test_only_what_is_wanted_is_captured_and_once(graph, params, inputs):
    def run(params, *inputs):
        network = weights.merge(graph, params)
        with capture.capturing(network, probabilities=lambda p: cross(p) and "mid" in p) as found:
            network(*inputs)
        first = found.take()
        network(*inputs)  # outside
        assert not found.take()
        return first

    shapes = jax.eval_shape(run, params, *inputs)
    assert {p: s.shape for p, s in shapes.items()} == {
        "mid_block.attentions.0.transformer_blocks.0.attn2": (2, 4, 4 * 3, 5)
    }


def test_an_error_leaves_nothing_behind(graph, params, inputs):
    with pytest.raises(RuntimeError), capture.capturing(weights.merge(graph, params), maxima=True):
        raise RuntimeError
    jax.eval_shape(lambda p: weights.merge(graph, p)(*inputs), params)
    assert capture._capture.get() is None


@pytest.mark.parametrize("remat", ["block", "full", "dots_saveable"])
def test_a_rematerialised_network_is_refused(remat, params, inputs):
    graph = weights.abstract(UNet, CONFIG, remat=remat)[0]
    with pytest.raises(ValueError, match=f"remat = '{remat}'.*'none'"):
        jax.eval_shape(lambda p: capture.maxima(graph, p, *inputs), params)


def test_largest_logits_of_upcast_attention_are_of_float32(params, inputs):
    config = dataclasses.replace(CONFIG, upcast_attention=True)
    narrow = [weights.abstract(UNet, c, dtype=jnp.bfloat16)[0] for c in (CONFIG, config)]
    plain, upcast = (
        jax.make_jaxpr(lambda p, g=g: capture.maxima(g, p, *inputs))(params) for g in narrow
    )
    assert str(plain) != str(upcast)
    assert all(v.aval.dtype == jnp.float32 for v in upcast.jaxpr.outvars)
