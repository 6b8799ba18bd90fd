"""The method `adapters`: which layers, which scales, how many parameters, what moves."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints.reading import read_any
from sdjax.config import default, resolve
from sdjax.config_model import blank_method
from sdjax.errors import UserError
from sdjax.families.bind import bind
from sdjax.families.flux_names import flux_place
from sdjax.families.registry import FAMILIES, model_of
from sdjax.formats.adapters.merging import merged
from sdjax.formats.adapters.reading import read_adapter
from sdjax.methods.adapter_files import adapter_of, export
from sdjax.methods.adapter_rules import AdaptersConfig, changes
from sdjax.methods.adapters import folded
from sdjax.models.adapters.factors import KINDS
from sdjax.models.adapters.networks import MARK
from sdjax.optim.optimizers import OptimConfig, make_optimizer
from sdjax.parallel.mesh import MeshConfig, make_mesh
from sdjax.train.program import build, split_trainable


def factors(family, preset, config):
    """{path: shape} of the factors of a release, without an array."""
    model = model_of(FAMILIES[family].presets[preset])
    model = dataclasses.replace(model, changes=changes(config, model.family))
    denoiser = (model.family.denoiser,) if config.targets else ()
    names = (*denoiser, *(model.text_encoders if config.text_targets else ()))
    return {path: v for path, v in bind(model, names).abstract.items() if MARK in path}


def modules(found):
    return {path.split(MARK)[0] for path in found}


@pytest.mark.parametrize(
    "family, preset, targets, count, parameters",
    [
        ("sd", "base", "attention", 128, 3_188_736),
        ("sd", "base", "transformer", 192, 6_782_976),
        ("sd", "base", "linear", 184, 6_823_936),
        ("sd", "base", "all", 282, 16_931_456),
        ("sd", "sd2", "attention", 128, 3_319_808),
        ("sd", "sd2", "all", 282, 17_062_528),
        ("sdxl", "base", "attention", 560, 23_224_320),
        ("sdxl", "base", "all", 794, 49_412_736),
    ],
)
def test_parameters_of_rank_16_are_those_of_the_releases(
    family, preset, targets, count, parameters
):
    found = factors(family, preset, AdaptersConfig(targets=(targets,)))
    assert len(modules(found)) == count
    assert sum(v.size for v in found.values()) == parameters


@pytest.mark.parametrize(
    "family, preset, name, targets, count, parameters",
    [
        ("sd", "base", "text_encoder", "transformer", 72, 2_654_208),
        ("sd", "base", "text_encoder", "attention", 48, 1_179_648),
        ("sd", "sd2", "text_encoder", "transformer", 138, 6_782_976),
        ("sd", "sd2", "text_encoder", "attention", 92, 3_014_656),
        ("sdxl", "base", "text_encoder_2", "transformer", 192, 11_796_480),
        ("sdxl", "base", "text_encoder_2", "attention", 128, 5_242_880),
    ],
)
def test_parameters_of_text_encoders(family, preset, name, targets, count, parameters):
    found = factors(family, preset, AdaptersConfig(targets=(), text_targets=(targets,)))
    own = {path: v for path, v in found.items() if path.startswith(f"{name}.")}
    assert len(modules(own)) == count
    assert sum(v.size for v in own.values()) == parameters


@pytest.mark.parametrize(
    "kind, extra, parameters",
    [
        ("dora", {"targets": ("attention",)}, 3_188_736 + 99_840),
        ("lokr", {"targets": ("transformer",), "factor": 4, "full_matrix": True}, 16_689_152),
        ("lokr", {"targets": ("transformer",), "factor": 16, "full_matrix": True}, 1_092_032),
        ("lokr", {"targets": ("transformer",), "full_matrix": True}, 386_176),
        ("loha", {"targets": ("attention",), "rank": 8}, 3_188_736),
    ],
)
def test_parameters_of_other_kinds(kind, extra, parameters):
    found = factors("sd", "base", AdaptersConfig(kind=kind, **extra))
    assert sum(v.size for v in found.values()) == parameters


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_of_stacked_blocks_have_adapters(family):
    found = factors(family, "base", AdaptersConfig())
    assert any("add_q_proj" in path for path in found)
    assert any(v.ndim == 3 for v in found.values())
    assert not any(path.startswith(("vae", "text_encoder")) for path in found)


@pytest.mark.parametrize(
    "changed, scale",
    [
        ({}, 1.0),
        ({"rank": 128, "alpha": 1.0}, 0.0078125),
        ({"rank": 16, "alpha": 16.0, "rank_stabilized": True}, 4.0),
        ({"rank": 8, "alpha": 0.0}, 1.0),
    ],
)
def test_scale_is_alpha_by_the_rank(changed, scale, tiny_config):
    model = model_of(resolve(tiny_config).model)
    config = AdaptersConfig(**changed)
    model = dataclasses.replace(model, changes=changes(config, model.family))
    adapter = adapter_of(model, zeros(bind(model).abstract))
    layers = list(adapter.values())
    assert layers and {layer.scale for layer in layers} == {scale}
    if config.rank_stabilized:  # what a reader divides by the rank
        assert {layer.alpha for layer in layers} == {64.0}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_tuckers_form_merge_to_the_kernels_of_the_run(kind, tiny_model, tmp_path):
    plain = read_any(tiny_model)
    config = AdaptersConfig(kind=kind, targets=("conv1", "attn1"), rank=2, factor=1, tucker=True)
    model = dataclasses.replace(plain, changes=changes(config, plain.family))
    rng = np.random.default_rng(0)
    drawn = {
        path: rng.normal(size=v.shape, scale=0.3).astype(np.float32)
        for path, v in bind(model).abstract.items()
        if MARK in path
    }
    assert any(f"{MARK}C" in path for path in drawn)
    kernels = folded(dataclasses.replace(model, params={**plain.params, **drawn}))
    written = export(model, drawn, tmp_path)
    assert ("diffusers" in written, "no Tucker's" in written.get("note", "")) == (False, True)
    read = merged(plain, [(read_adapter(written["kohya"], plain), 1.0)])
    for path, value in kernels.params.items():
        np.testing.assert_allclose(read.params[path], value, atol=2e-6, err_msg=path)


def test_tuckers_form_without_a_convolution_is_an_error(tiny_config):
    tiny_config.method = {"name": "adapters", "tucker": True}
    with pytest.raises(UserError, match="method.tucker is True, and no layer of method.targets"):
        blank_method(resolve(tiny_config))


def zeros(abstract):
    """Arrays of no size in memory."""
    return {p: np.broadcast_to(np.float32(0), v.shape) for p, v in abstract.items() if MARK in p}


def test_ranks_and_alphas_by_pattern():
    config = AdaptersConfig(
        ranks=((r"mid_block", 0), (r"attn1\.to_q$", 4)), alphas=((r"attn1", 2.0),)
    )
    found = factors("sd", "base", config)
    assert not any("mid_block" in path for path in found)
    for path, value in found.items():
        if path.endswith(".A"):
            assert value.shape[-1] == (4 if "attn1.to_q" in path else 16)


SD, SDXL = 25, 23  # numbers of kohya's lists


@pytest.mark.parametrize(
    "family, count, blocks",
    [
        (
            "sd",
            SD,
            {0: "conv_in", 1: "down_blocks.0.attentions.0", 3: "down_blocks.0.downsamplers.0",
             8: "down_blocks.2.resnets.1", 12: "mid_block.resnets.1", 15: "up_blocks.0.upsamplers",
             16: "up_blocks.1.attentions.0", 24: "up_blocks.3.attentions.2"},
        ),
        (
            "sdxl",
            SDXL,
            {0: "add_embedding.linear_1", 1: "conv_in", 4: "down_blocks.0.downsamplers.0",
             5: "down_blocks.1.attentions.0", 10: "mid_block.resnets.0", 11: "mid_block.attentions",
             12: "mid_block.resnets.1", 15: "up_blocks.0.upsamplers", 21: "up_blocks.2.resnets.2",
             22: "conv_out"},
        ),
    ],
)  # fmt: skip
def test_ranks_by_block_are_in_the_order_of_kohya(family, count, blocks):
    ranks = tuple(range(1, count + 1))
    config = AdaptersConfig(targets=("all",), text_targets=("k_proj",), block_ranks=ranks)
    found = factors(family, "base", config)
    assert {v.shape[-1] for p, v in found.items() if p.startswith("text") and p[-1] == "A"} == {16}
    for number, block in blocks.items():
        own = [v for p, v in found.items() if p.startswith(f"unet.{block}") and p[-1] == "A"]
        assert own and {v.shape[-1] for v in own} == {number + 1}, block


def test_numbers_of_blocks_are_kohyas_own_rule():
    """`get_block_index` of sd-scripts' networks/lora.py, written out."""
    kinds = "resnets|upsamplers|downsamplers|attentions"
    pattern = re.compile(rf"(up|down)_blocks\.(\d+)\.({kinds})\.(\d+)")
    lists = FAMILIES["sd"].adapters.blocks(FAMILIES["sd"].presets["base"].unet)
    order = [block for (block, *_) in lists.ranks]
    for path in modules(factors("sd", "base", AdaptersConfig(targets=("all",)))):
        if found := pattern.search(path):
            side, level, kind, number = found.groups()
            index = 3 * int(level) + (2 if kind.endswith("samplers") else int(number))
            index += 1 if side == "down" else 13
        elif "mid_block." in path:
            index = 12
        else:
            continue
        block = lists.of(path.removeprefix("unet."))
        assert index == (12 if block[0] == "M" else order.index(block)), path


def test_patterns_are_the_ranks_of_kohyas_flux_trainer():
    """networks/lora_flux.py, `type_dims` and `in_dims`; docs/finetuning.md has the patterns."""
    page = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text()
    listed = page.split("c.method.ranks = (\n")[1].split("\n    )\n")[0]
    pairs = re.findall(r'\(r"(.*?)", (\d)\)', listed)
    ranks = tuple((pattern, int(rank)) for pattern, rank in pairs)
    found = factors("flux", "dev", AdaptersConfig(targets=("linear",), ranks=ranks))
    theirs = {
        "txt_attn": 4, "img_attn": 4, "img_mlp": 8, "txt_mlp": 2, "img_mod": 2, "txt_mod": 2,
        "linear1": 4, "linear2": 4, "modulation": 2, "img_in": 4, "time_in": 2, "vector_in": 2,
        "guidance_in": 2, "txt_in": 4,
    }  # fmt: skip
    seen = {}
    for path, value in found.items():
        if path.endswith(".adapter.A"):
            own = path.removeprefix("transformer.").removesuffix(".adapter.A")
            name = flux_place(f"{re.sub('-[0-9]+', '', own)}.weight").name
            parts = [part for part in name.split(".") if not part.isdigit()]
            part = parts[1] if parts[0].endswith("_blocks") else parts[0]
            seen.setdefault(part, set()).add(value.shape[-1])
    assert seen == {part: {rank} for part, rank in theirs.items()}


def test_a_zero_leaves_a_block_out_and_a_pattern_wins():
    ranks = [4] * SD
    ranks[12] = 0
    rates = [1.0] * SD
    rates[24] = 0
    config = AdaptersConfig(
        block_ranks=tuple(ranks), block_rates=tuple(rates), ranks=((r"attn1\.to_q$", 9),)
    )
    found = factors("sd", "base", config)
    assert not any("mid_block" in p and "attn2" in p for p in found)
    assert not any("up_blocks.3.attentions.2" in path for path in found)
    assert {v.shape[-1] for p, v in found.items() if p[-1] == "A" and "to_q" not in p} == {4}
    assert {v.shape[-1] for p, v in found.items() if p.endswith("attn1.to_q.adapter.A")} == {9}


def test_alphas_by_block_make_the_scales(pipeline_folder):
    """Its UNet has the blocks IN00-03, M00 and OUT00-03."""
    plain = read_any(pipeline_folder)
    alphas = tuple(float(i) for i in range(1, 10))
    config = AdaptersConfig(targets=("attn1",), rank=2, block_alphas=alphas)
    model = dataclasses.replace(plain, changes=changes(config, plain.family))
    adapter = adapter_of(model, zeros(bind(model).abstract))
    scales = {path.split(".transformer")[0]: layer.scale for path, layer in adapter.items()}
    assert scales == {
        "unet.down_blocks.0.attentions.0": 2 / 2,  # IN01
        "unet.mid_block.attentions.0": 5 / 2,
        "unet.up_blocks.1.attentions.0": 8 / 2,  # OUT02
        "unet.up_blocks.1.attentions.1": 9 / 2,
    }


def test_rates_by_block_multiply_those_of_groups(tiny_config):
    """Its UNet has the blocks IN00-01, M00 and OUT00-01."""
    tiny_config.method = {"name": "adapters", "targets": ("all",), "text_targets": ("k_proj",)}
    tiny_config.method["block_rates"] = (0.5, 1.0, 0.0, 1.0, 1.0)
    tiny_config.optim.update(name="sgd", momentum=0.0, groups=((r"adapter\.B$", 16.0),))
    config = resolve(tiny_config)
    program = build(config, blank_method(config), make_mesh(MeshConfig(), jax.devices()[:1]))
    (one,) = program.optimizations
    params = {path: np.ones(v.shape, np.float32) for path, v in program.split.trained.items()}
    updates, _ = one.optimizer.update(params, one.optimizer.init(params), params)
    moved = {path: float(np.ravel(v)[0]) for path, v in updates.items()}
    usual = moved["text_encoder.encoder.layers.0.self_attn.k_proj.adapter.A"]
    assert not any("mid_block" in path for path in moved)
    paths = [
        f"unet.{layer}.adapter.{f}"
        for layer in ("conv_in", "down_blocks.0.resnets.0.conv1", "conv_out")
        for f in "AB"
    ]
    assert [moved[path] / usual for path in paths] == pytest.approx([0.5, 8, 1, 16, 1, 16])


@pytest.mark.parametrize("field", ["block_ranks", "block_alphas", "block_rates"])
@pytest.mark.parametrize(
    "family, expected",
    [
        ("sd", r"has 3 numbers; expected 25 \(IN00-IN11 M00 OUT00-OUT11\)"),
        ("sdxl", r"has 3 numbers; expected 23 \(EMB IN00-IN08 M00-M02 OUT00-OUT08 END\)"),
        ("flux", r"with FLUX.1; such lists are of the UNets"),
    ],
)
def test_a_list_of_another_length_says_how_many_there_are(field, family, expected):
    config = AdaptersConfig(**{field: (1, 1, 1)})
    with pytest.raises(UserError, match=f"method.{field} .*{expected}"):
        factors(family, "base", config)


def test_zeros_everywhere_are_refused(tiny_config):
    tiny_config.method = {"name": "adapters", "block_ranks": (0,) * 5}
    with pytest.raises(UserError, match="have a 0 for every layer"):
        blank_method(resolve(tiny_config))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"targets": ("attn3",)}, r"method.targets: 'attn3' takes no layer; expected one of atten"),
        ({"text_targets": ("mlp.fc3",)}, "method.text_targets: 'mlp.fc3' takes no layer"),
        ({"ranks": (("nowhere", 3),)}, "method.ranks: 'nowhere' is found in no path"),
    ],
)
def test_a_pattern_that_takes_nothing_is_an_error(tiny_config, changed, message):
    tiny_config.method = {"name": "adapters", **changed}
    with pytest.raises(UserError, match=message):
        blank_method(resolve(tiny_config))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"kind": "ia3"}, "method.kind is 'ia3'; expected one of lora, dora, loha, lokr"),
        ({"rank": 0}, "method.rank is 0; expected 1 or more"),
        ({"dropout": 1.0}, r"method.dropout is 1.0; expected in \[0, 1\)"),
        ({"kind": "lokr", "rank_dropout": 0.1}, "method.rank_dropout is 0.1; expected 0 with"),
        (
            {"tucker": True, "max_norm": 1.0},
            "method.max_norm is 1.0; expected 0 with method.tucker",
        ),
        ({"targets": ()}, r"method.targets is \(\); expected at least one"),
        ({"targets": ("(",)}, "method.targets: '\\(' is no regular expression"),
    ],
)
def test_values_out_of_range_name_their_field(changed, message):
    config = default(method="adapters")
    config.method.update(changed)
    with pytest.raises(UserError, match=message):
        resolve(config)


def test_a_frozen_group_is_refused():
    config = default(method="adapters")
    config.method.text_targets = ("attention",)
    config.optim.groups = ((r"^text_encoder", 0.0),)
    with pytest.raises(UserError, match=r"optim.groups freezes \['\^text_encoder'\] with method"):
        resolve(config)


def test_a_pattern_for_some_of_the_stacked_blocks_is_an_error():
    config = AdaptersConfig(targets=(r"transformer_blocks\.3\.attn\.to_q",))
    with pytest.raises(UserError, match="takes 1 of the 13 blocks"):
        factors("sd3", "base", config)


def test_stored_features_have_no_text_encoder_to_train(tiny_config):
    tiny_config.method = {"name": "adapters", "text_targets": ("attention",)}
    tiny_config.data.update(name="encoded", path="nowhere", text_embeddings=True)
    with pytest.raises(UserError, match="method.text_targets is .* with data.text_embeddings"):
        blank_method(resolve(tiny_config))


def test_the_method_trains_factors_alone(tiny_config):
    tiny_config.method = {"name": "adapters", "text_targets": ("attention",)}
    config = resolve(tiny_config)
    split = split_trainable(config, blank_method(config))
    assert all(MARK in path for path in split.trained)
    assert not any(MARK in path for path in split.frozen)
    assert {path.split(".")[0] for path in split.trained} == {"unet", "text_encoder"}


def test_a_group_gives_the_second_factor_a_rate_of_its_own():
    """LoRA+ (arXiv:2402.12354): 16 times the rate for B."""
    params = {"unet.a.adapter.A": jnp.ones((4, 2)), "unet.a.adapter.B": jnp.ones((2, 4))}
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    updates = []
    for groups in ((), ((r"adapter\.B$", 16.0),)):
        config = OptimConfig(name="adamw", learning_rate=1e-3, groups=groups)
        optimizer = make_optimizer(config, 10, params)
        updates.append(optimizer.update(grads, optimizer.init(params), params)[0])
    plain, plus = updates
    np.testing.assert_array_equal(plain["unet.a.adapter.A"], plus["unet.a.adapter.A"])
    np.testing.assert_array_equal(16 * plain["unet.a.adapter.B"], plus["unet.a.adapter.B"])
