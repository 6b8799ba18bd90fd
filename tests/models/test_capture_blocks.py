"""What is captured within stacked blocks, against hooks on diffusers' SD3 and FLUX.1."""

import dataclasses

import jax
import numpy as np
import pytest

from sdjax.models import capture, weights
from sdjax.models.flux.config import FluxConfig
from sdjax.models.flux.network import Flux
from sdjax.models.mmdit.network import MMDiT, MMDiTConfig
from tests.models.test_flux import inputs as flux_inputs
from tests.models.test_flux import run_diffusers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD3 = MMDiTConfig(
    sample_size=16, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8,
    num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32,
    pooled_projection_dim=20, pos_embed_max_size=12, dual_attention_layers=(0, 1),
    qk_norm="rms_norm",
)  # fmt: skip
FLUX = FluxConfig(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
    axes_dims_rope=(4, 6, 6),
)  # fmt: skip
BLOCKS = {"JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"}


@dataclasses.dataclass
class Case:
    network: type
    config: object
    model: object
    inputs: tuple
    run: object  # of the torch model


def sd3(reference):
    model = reference.randomised(diffusers.SD3Transformer2DModel.from_config(SD3.to_json()))
    xt, t = reference.normal(1, 2, 8, 20, 4), np.array([95.3, 12.5], np.float32)
    context = {"context": reference.normal(2, 2, 5, 24), "pooled": reference.normal(3, 2, 20)}

    def run():
        model(
            hidden_states=reference.to_torch(xt), timestep=torch.from_numpy(t),
            encoder_hidden_states=reference.to_torch(context["context"]),
            pooled_projections=reference.to_torch(context["pooled"]),
        )  # fmt: skip

    return Case(MMDiT, SD3, model, (xt, t, context), run)


def flux(reference):
    model = reference.randomised(diffusers.FluxTransformer2DModel.from_config(FLUX.to_json()))
    arrays = flux_inputs(reference, FLUX, (4, 6))
    return Case(Flux, FLUX, model, arrays, lambda: run_diffusers(diffusers, model, *arrays))


@pytest.fixture(scope="module", params=[sd3, flux])
def case(request, reference):
    return request.param(reference)


@pytest.fixture(scope="module")
def bound(case, reference):
    """(graph, parameters) of the case's network."""
    graph, shapes = weights.abstract(case.network, case.config)
    return graph, weights.from_diffusers(reference.tensors(case.model), shapes)


@pytest.fixture(scope="module")
def measured(case):
    """{module: its largest logit, or its largest output} of the torch network."""
    found, running = {}, []

    def attends(query, key, value, *args, **kw):  # [B, heads, L, D]
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        found[running[-1]] = logits.max().item()
        return original(query, key, value, *args, **kw)

    def before(name):
        return lambda module, args: running.append(name)

    def after(name):
        def hook(module, args, out):
            outputs = [out] if torch.is_tensor(out) else [x for x in out if x is not None]
            found[name] = max(x.abs().max().item() for x in outputs)

        return hook

    handles = []
    for name, module in case.model.named_modules():
        if name.endswith((".attn", ".attn2")):
            handles.append(module.register_forward_pre_hook(before(name)))
        elif type(module).__name__ in BLOCKS:
            handles.append(module.register_forward_hook(after(name)))
    original = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attends)
        case.run()
    for handle in handles:
        handle.remove()
    return found


def test_maxima_of_each_block_are_those_of_hooks(case, bound, measured):
    graph, params = bound
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda *args: capture.maxima(graph, *args))(params, *case.inputs)
    assert found.keys() == measured.keys()
    last = {MMDiT: "transformer_blocks.3", Flux: "single_transformer_blocks.2"}[case.network]
    assert {"transformer_blocks.1.attn", last, f"{last}.attn"} <= found.keys()
    for path, ours in found.items():
        assert ours.shape == () and ours.dtype == np.float32
        assert float(ours) == pytest.approx(measured[path], rel=2e-5), path


def test_probabilities_of_one_block_alone(case, bound):
    graph, params = bound

    def run(params):
        network = weights.merge(graph, params)
        with capture.capturing(
            network, probabilities=lambda path: path.endswith(".1.attn")
        ) as found:
            network(*case.inputs)
        return found.take()

    shapes = {path: x.shape for path, x in jax.eval_shape(run, params).items()}
    single = {"single_transformer_blocks.1.attn"} if case.network is Flux else set()
    assert shapes.keys() == {"transformer_blocks.1.attn", *single}
    tokens = {"MMDiT": 4 * 10 + 5, "Flux": 2 * 3 + 5}[case.network.__name__]
    assert {shape[2:] for shape in shapes.values()} == {(tokens, tokens)}


def test_the_program_is_the_same_without_capturing(case, bound):
    graph, params = bound

    def run(params):
        return weights.merge(graph, params)(*case.inputs)

    before = str(jax.make_jaxpr(run)(params))
    with capture.capturing(weights.merge(graph, params), maxima=True) as found:  # another network
        inside = str(jax.make_jaxpr(run)(params))
    assert inside == before and not found.take()


def test_blocks_in_a_branch_show_nothing(bound, case):
    if case.network is not MMDiT:
        return
    graph, params = bound

    def run(params):
        network = weights.merge(graph, params)
        with capture.capturing(network, maxima=True) as found:
            network(*case.inputs, skip_layers=(2,))
        return found.take()

    shown = jax.eval_shape(run, params)
    assert "transformer_blocks.0" in shown and "transformer_blocks.2" not in shown
