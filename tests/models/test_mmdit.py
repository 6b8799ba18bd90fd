"""The denoiser of SD3 against diffusers' `SD3Transformer2DModel` with random weights."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.methods.method import Method, Phase
from sdjax.models import weights
from sdjax.models.config import ConfigError
from sdjax.models.dit_layers import WAVES
from sdjax.models.layers import timestep_embedding
from sdjax.models.mmdit.network import MMDiT, MMDiTConfig, PatchEmbed, position_codes
from sdjax.models.params import is_buffer
from sdjax.models.stacked_paths import shapes_apart
from tests.models.flops import flops
from tests.models.waves import filled, summary, wave

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SMALL = MMDiTConfig(
    sample_size=16, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
    num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32,
    pooled_projection_dim=20, pos_embed_max_size=12,
)  # fmt: skip
CASES = {
    "sd3_medium": SMALL,
    "sd35_medium": dataclasses.replace(
        SMALL, num_layers=5, qk_norm="rms_norm", dual_attention_layers=(0, 1)
    ),
    "sd35_large": dataclasses.replace(
        SMALL, qk_norm="rms_norm", attention_head_dim=4, num_attention_heads=6,
        caption_projection_dim=24, out_channels=3,
    ),
    "odd": dataclasses.replace(
        SMALL, patch_size=3, sample_size=17, pos_embed_max_size=7, num_layers=2,
        dual_attention_layers=(1,), qk_norm="rms_norm",
    ),
}  # fmt: skip
SHAPES = {"odd": (21, 9, 7)}  # of latents and text; else:
SHAPE = (8, 20, 5)
MEDIUM = MMDiTConfig()
MEDIUM_35 = dataclasses.replace(
    MEDIUM, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
)
LARGE_35 = dataclasses.replace(
    MEDIUM, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
)
# Parameters and tensors of files, which have the position table besides.
REAL = {
    "sd3_medium": (MEDIUM, 2_028_328_000, 683),
    "sd35_medium": (MEDIUM_35, 2_243_171_520, 909),
    "sd35_large": (LARGE_35, 8_056_627_520, 1227),
}
TABLE = "pos_embed.pos_embed"


def torch_model(config, reference):
    """Every parameter random, and the position table other than a new one."""
    model = diffusers.SD3Transformer2DModel.from_config(config.to_json())
    model = reference.randomised(model)
    model.pos_embed.pos_embed += 0.1 * torch.sin(torch.arange(config.width))
    return model


def loaded(model, config, reference, **kw):
    """(graph, parameters) with the weights of a torch model."""
    graph, shapes = weights.abstract(MMDiT, config, **kw)
    return graph, weights.from_diffusers(reference.tensors(model), shapes)


def inputs(config, name, reference):
    height, width, length = SHAPES.get(name, SHAPE)
    return (
        reference.normal(1, 2, height, width, config.in_channels),
        # Float32 phases of t = 750 would be off by 750 * 2^-24 = 4e-5, in the reference too.
        np.array([95.3, 12.5], np.float32),
        {
            "context": reference.normal(2, 2, length, config.joint_attention_dim),
            "pooled": reference.normal(3, 2, config.pooled_projection_dim),
        },
    )


def by_torch(model, reference, xt, timesteps, context, **kw):
    out = model(
        hidden_states=reference.to_torch(xt),
        timestep=torch.from_numpy(timesteps),
        encoder_hidden_states=reference.to_torch(context["context"]),
        pooled_projections=reference.to_torch(context["pooled"]),
        **kw,
    ).sample
    return out


@pytest.mark.parametrize(
    "name,remat",
    [
        ("sd3_medium", "none"),
        ("sd35_medium", "block"),
        ("sd35_large", "none"),
        ("odd", "full"),
    ],
)
def test_output_and_every_gradient_match_diffusers(name, remat, reference):
    config = CASES[name]
    model = torch_model(config, reference)
    graph, params = loaded(model, config, reference, remat=remat)
    arrays = inputs(config, name, reference)
    theirs = by_torch(model, reference, *arrays)
    cotangent = reference.normal(4, *reference.from_torch(theirs).shape)
    (theirs * reference.to_torch(cotangent)).sum().backward()

    @reference.jit
    def run(params):
        def loss(params):
            out = weights.merge(graph, params)(*arrays)
            return jnp.sum(out * cotangent), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, ours), slopes = run(params)
    assert ours.dtype == jnp.float32
    assert reference.error(ours, reference.from_torch(theirs)) < 2e-5
    ours = weights.to_diffusers(slopes)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys() | {TABLE}
    # Text only gives keys and values to the last block, which has a projection of queries.
    last = f"transformer_blocks.{config.num_layers - 1}.attn."
    unused = {TABLE, f"{last}add_q_proj.weight", f"{last}add_q_proj.bias"}
    unused |= {f"{last}norm_added_q.weight"} if config.qk_norm else set()
    assert {name for name, slope in ours.items() if not np.any(slope)} == unused
    assert all(not theirs[name].any() for name in unused - {TABLE})
    for name in ours.keys() - unused:
        assert reference.error(ours[name], theirs[name]) < 2e-5, name


def test_skipped_layers_are_those_of_diffusers_and_get_no_gradient(reference):
    """A whole run, and one block of a run."""
    config = CASES["sd35_medium"]
    model = torch_model(config, reference)
    graph, params = loaded(model, config, reference)
    arrays = inputs(config, "sd35_medium", reference)

    def run(params, skipped):
        return weights.merge(graph, params)(*arrays, skip_layers=skipped)

    theirs = by_torch(model, reference, *arrays, skip_layers=(0, 1))
    ours = reference.jit(functools.partial(run, skipped=(0, 1)))(params)
    assert reference.error(ours, reference.from_torch(theirs)) < 2e-5
    theirs = by_torch(model, reference, *arrays, skip_layers=(3,))
    loss = lambda params: (jnp.sum(jnp.square(out := run(params, (3,)))), out)  # noqa: E731
    slopes, ours = reference.jit(jax.grad(loss, has_aux=True))(params)
    assert reference.error(ours, reference.from_torch(theirs)) < 2e-5
    slopes = weights.to_diffusers(slopes)
    blocks = {
        int(name.split(".")[1])
        for name, slope in slopes.items()
        if name.startswith("transformer_blocks") and np.any(slope)
    }
    assert blocks == {0, 1, 2, 4}


RECORDED = {
    "plain": ({}, (), 114_832,
              [-0.651137, 12.733265, 0.068847, 0.089010, 0.068719, 0.101191]),
    "rms_norm": ({"qk_norm": "rms_norm"}, (), 114_928,
                 [-0.707957, 13.368556, 0.070323, 0.091041, 0.070674, 0.103935]),
    "dual": ({"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, (), 129_744,
             [-0.725229, 13.471239, 0.070787, 0.092123, 0.070747, 0.104293]),
    "skip": ({"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, (1,), 129_744,
             [-0.691268, 13.374739, 0.071089]),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_a_network_of_known_weights_gives_the_recorded_velocity(name):
    changes, skipped, count, wanted = RECORDED[name]
    config = dataclasses.replace(SMALL, **changes)
    graph, shapes = weights.abstract(MMDiT, config)
    tensors = filled(shapes, leave=(TABLE,))
    assert sum(array.size for array in tensors.values()) == count
    # The position table that a new network has.
    kw = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    rngs = weights.Keys(jax.random.key(0))
    tensors[TABLE] = np.asarray(PatchEmbed(config, rngs=rngs, **kw).pos_embed[...])
    network = weights.merge(graph, weights.from_diffusers(tensors, shapes))
    context = {"context": wave(1, 2, 5, 24), "pooled": wave(2, 2, 20)}
    xt = wave(0, 2, 4, 8, 12).transpose(0, 2, 3, 1)
    out = network(xt, jnp.array([750, 12.5]), context, skip_layers=skipped)
    found = summary(np.asarray(out).transpose(0, 3, 1, 2))[: len(wanted)]
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", REAL)
def test_real_networks_have_the_names_shapes_and_counts_of_diffusers(name):
    config, count, tensors = REAL[name]
    _, shapes = weights.abstract(MMDiT, config)
    apart = shapes_apart(shapes)
    assert len(apart) == tensors
    assert sum(shape.size for path, shape in apart.items() if not is_buffer(path)) == count
    assert apart[TABLE].size == config.pos_embed_max_size**2 * config.width
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel.from_config(config.to_json())
    order = {2: (1, 0), 4: (3, 2, 0, 1)}
    ours = {
        weights.weight_name(path): tuple(shape.shape[i] for i in order[len(shape.shape)])
        if path.endswith("kernel") else tuple(shape.shape)
        for path, shape in apart.items()
    }  # fmt: skip
    assert ours == {name: tuple(value.shape) for name, value in model.state_dict().items()}


# Of one image, by pixels and rows of text, in TFLOP; and some to the unit.
FLOPS = {
    "sd3_medium": [(512, 154, 1.803), (512, 333, 2.107), (512, 589, 2.560), (1024, 154, 8.437),
                   (1024, 333, 8_904_337_539_072), (1024, 589, 9.589)],
    "sd35_medium": [(512, 333, 2.443), (1024, 333, 11_249_573_707_776), (1024, 589, 11.934)],
    "sd35_large": [(512, 333, 7.978), (1024, 333, 31_121_114_907_648), (1024, 589, 33.342)],
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_flops_are_those_of_the_reference_and_equal_blocks_are_traced_once(name):
    config = REAL[name][0]
    graph, params = weights.abstract(MMDiT, config, dtype=jnp.bfloat16)
    for pixels, length, wanted in FLOPS[name]:
        side = pixels // 8
        arrays = (
            jax.ShapeDtypeStruct((1, side, side, 16), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.float32),
            {
                "context": jax.ShapeDtypeStruct((1, length, 4096), jnp.float32),
                "pooled": jax.ShapeDtypeStruct((1, 2048), jnp.float32),
            },
        )
        run = lambda params, *args: weights.merge(graph, params)(*args)  # noqa: E731
        program = jax.make_jaxpr(run)(params, *arrays).jaxpr
        scans = [e.params["length"] for e in program.eqns if e.primitive.name == "scan"]
        assert scans == [count for *_, count in config.runs()]
        # The reference also computes the text's queries of the last block, and their output.
        tokens = side * side // 4 + length
        unused = 2 * length * config.width**2 + 4 * length * tokens * config.width
        found = flops(program) + unused
        if isinstance(wanted, int):
            assert found == wanted
        else:
            assert round(found / 1e12, 3) == wanted


# Sum, sum of squares, first values of the last row; values at row 5, column 7, every C / 4.
TABLES = {
    "sd3_medium": (21_585_757.454, 28_311_552.003, [0.741172, -0.624178, -0.838422, 0.429410],
                   [0.723086, -0.690758, 0.995408, -0.095724]),
    "sd35_medium": (86_293_769.125, 113_246_208.006, None,
                    [0.919445, 0.393219, 0.740177, 0.672412]),
    "sd35_large": (34_198_328.242, 44_826_624.007, [0.741172, -0.122072, -0.874875, -0.911858],
                   None),
}  # fmt: skip
# By latent sizes: sum, first two values.
CROPS = {
    "sd3_medium": {(128, 128): (2_304_576.070, [0.611389, 0.918160]),
                   (64, 64): (574_993.888, [0.999320, 0.784524]),
                   (104, 152): (2_223_855.458, [0.465127, 0.025577])},
    "sd35_medium": {(64, 64): (574_290.688, None)},
    "sd35_large": {(128, 128): (3_651_618.185, [0.611389, 0.829688]),
                   (104, 152): (3_523_271.075, None)},
}  # fmt: skip


def new_positions(config, h, w):
    """The positions of h x w patches of a new network, fused so that no whole table is made."""
    kw = {"dtype": jnp.float32, "param_dtype": jnp.float32}

    @jax.jit
    def middle():
        return PatchEmbed(config, rngs=weights.Keys(jax.random.key(0)), **kw).positions(h, w)

    return np.asarray(middle(), np.float64)


@pytest.mark.parametrize("name", REAL)
def test_new_position_tables_have_the_recorded_values(name):
    config = REAL[name][0]
    total, squares, last, row_5_column_7 = TABLES[name]
    size, half, quarter = config.pos_embed_max_size, config.width // 2, config.width // 4
    codes = position_codes(size, half, 64).astype(np.float32).astype(np.float64)
    # Each code stands in a row of the table for every column, and the other way round.
    assert 2 * size * codes.sum() == pytest.approx(total, rel=1e-9)
    assert 2 * size * np.square(codes).sum() == pytest.approx(squares, rel=1e-9)
    if last:
        np.testing.assert_allclose(codes[-1, :4], last, atol=1e-6)
    if row_5_column_7:
        found = [codes[7, 0], codes[7, quarter], codes[5, 0], codes[5, quarter]]
        np.testing.assert_allclose(found, row_5_column_7, atol=1e-6)
    for (height, width), (total, first) in CROPS[name].items():
        middle = new_positions(config, height // 2, width // 2)
        assert middle.sum() == pytest.approx(total, rel=1e-6)
        if first:
            np.testing.assert_allclose(middle[0, :2], first, atol=2e-6)


# At t: the sum, and the first values of the cosines and of the sines.
SINUSOIDS = {
    500.0: (57.54698, [-0.883849, 0.945946, 0.848507], [-0.467772, 0.324325, -0.529184]),
    1000.0: (50.96479, None, None),
    2.994012: (131.16983, None, None),
    3500.0: (29.72850, [0.964887, -0.675330, -0.723518], None),
    30000.0: (-5.47517, None, None),
}


@pytest.mark.parametrize("t", SINUSOIDS)
def test_sinusoids_have_the_recorded_values(t):
    total, cosines, sines = SINUSOIDS[t]
    found = np.asarray(timestep_embedding(jnp.array([t]), WAVES)[0], np.float64)
    step = t * 2**-23  # of float32 phases, each of 256 rounded once or twice
    assert found.sum() == pytest.approx(total, abs=1e-5 + 4 * step)
    for wanted, at in ((cosines, 0), (sines, WAVES // 2)):
        if wanted:
            np.testing.assert_allclose(found[at : at + 3], wanted, atol=1e-6 + step)


@pytest.mark.parametrize("size,patch,most", [(16, 2, 12), (17, 3, 7)])
def test_new_tables_and_their_crops_are_those_of_diffusers(size, patch, most):
    config = dataclasses.replace(SMALL, sample_size=size, patch_size=patch, pos_embed_max_size=most)
    model = diffusers.SD3Transformer2DModel.from_config(config.to_json()).pos_embed
    for h, w in ((most, most), (1, 2), (4, most - 1), (3, 5)):
        theirs = model.cropped_pos_embed(h * patch, w * patch)[0]
        np.testing.assert_allclose(
            new_positions(config, h, w), theirs, atol=2e-8
        )  # half a step of float32


def test_the_stored_table_is_used_kept_to_the_bit_and_not_trained(reference):
    config = SMALL
    model = torch_model(config, reference)
    _, params = loaded(model, config, reference)
    tensors = reference.tensors(model)
    written = weights.to_diffusers(params)
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    abstract = {f"transformer.{path}": value for path, value in params.items()}
    phase = Phase("main", lambda *_: None, lambda path: path.startswith("transformer."))
    method = Method(abstract, None, (phase,), {}, None, None, None, None)
    left = [path for path in abstract if not method.trainable(path)]
    assert left == ["transformer.pos_embed.pos_embed"]


def test_timesteps_are_float32_and_bfloat16_is_as_close_as_diffusers_in_bfloat16(reference):
    config = CASES["sd35_medium"]
    model = torch_model(config, reference)
    graph, params = loaded(model, config, reference, dtype=jnp.bfloat16)
    xt, _, context = inputs(config, "sd35_medium", reference)
    timesteps = np.array([513.0, 513.5], np.float32)  # both 512 in bfloat16
    exact = reference.from_torch(by_torch(model, reference, xt, timesteps, context))
    run = reference.jit(weights.merge(graph, params))
    ours = run(xt, timesteps, context)
    assert ours.dtype == jnp.float32
    narrow = model.bfloat16()
    theirs = narrow(
        hidden_states=reference.to_torch(xt).bfloat16(),
        timestep=torch.from_numpy(timesteps),
        encoder_hidden_states=reference.to_torch(context["context"]).bfloat16(),
        pooled_projections=reference.to_torch(context["pooled"]).bfloat16(),
    ).sample
    theirs = reference.from_torch(theirs.float())
    error, bound = (np.sqrt(np.mean((x - exact) ** 2)) for x in (ours, theirs))
    # Both round the inputs and outputs of products, in other places.
    assert 2**-12 < error / np.sqrt(np.mean(exact**2)) and error < 1.3 * bound
    same = {name: np.repeat(array[:1], 2, 0) for name, array in context.items()}
    apart = run(np.repeat(xt[:1], 2, 0), timesteps, same)
    assert np.any(apart[0] != apart[1])


def test_a_new_network_predicts_zero_and_its_blocks_change_nothing(reference):
    config = CASES["sd35_medium"]
    graph, _ = weights.abstract(MMDiT, config)
    params = weights.init(MMDiT, config, jax.random.key(0))
    arrays = inputs(config, "sd35_medium", reference)

    @reference.jit
    def run(params):
        network = weights.merge(graph, params)
        return network(*arrays), network(*arrays, skip_layers=range(5))

    assert not np.any(run(params)[0])
    params["proj_out.kernel"] = params["proj_out.kernel"] + reference.normal(0, 32, 16)
    whole, skipped = run(params)
    assert np.any(whole)
    np.testing.assert_array_equal(whole, skipped)


@pytest.mark.parametrize(
    "size,skipped,message",
    [
        ((26, 8), (), r"26 x 8: .*multiples of patch_size = 2, up to 24 .pos_embed_max_size = 12"),
        ((8, 7), (), "8 x 7: expected sides that are multiples"),
        ((8, 8), (3, 7), r"skip_layers has \[3, 7\]: expected blocks 0 to 2"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(size, skipped, message):
    graph, params = weights.abstract(MMDiT, SMALL)

    def run(params):
        xt = jnp.zeros((1, *size, 4))
        context = {"context": jnp.zeros((1, 3, 24)), "pooled": jnp.zeros((1, 20))}
        return weights.merge(graph, params)(xt, jnp.zeros(1), context, skip_layers=skipped)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, params)


def test_config_is_read_and_written_as_by_diffusers():
    signature = inspect.signature(diffusers.SD3Transformer2DModel.__init__)
    absent, _ = MMDiTConfig.from_json({"_class_name": "SD3Transformer2DModel"})
    for field in dataclasses.fields(MMDiTConfig):
        assert getattr(absent, field.name) == signature.parameters[field.name].default
    for config in (MEDIUM, MEDIUM_35, LARGE_35, *CASES.values()):
        assert MMDiTConfig.from_json(config.to_json())[0] == config
    null = {**SMALL.to_json(), "out_channels": None, "dual_attention_layers": []}
    assert MMDiTConfig.from_json(null)[0] == SMALL
    assert MEDIUM_35.runs() == [(True, False, 13), (False, False, 10), (False, True, 1)]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"caption_projection_dim": 30}, "caption_projection_dim = 30: .*attention_head_dim = 32"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size = None .expected int"),
        ({"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm': expected 'rms_norm' or null"),
        ({"dual_attention_layers": [1, 3]}, r"\(1, 3\): expected different numbers below num_l"),
        ({"dual_attention_layers": [1, 1]}, "dual_attention_layers = .*different numbers"),
        ({"patch_size": 17}, "sample_size = 16: expected patch_size = 17 or more"),
        ({"num_layers": 0}, "num_layers = 0: expected 1 to 256"),
        ({"surprise": 1}, "surprise = 1 .unknown field"),
        ({"attention_head_dim": 5, "num_attention_heads": 5, "caption_projection_dim": 25},
         "attention_head_dim = 5: expected 4 to divide"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_honoured_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        MMDiTConfig.from_json({**SMALL.to_json(), **change})
