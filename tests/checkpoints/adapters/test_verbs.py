"""Adapters by the command line: convert, sample and evaluate."""

import numpy as np
import pytest
from PIL import Image

from sdjax import convert, sample
from sdjax.checkpoints.adapters import parse_lora, with_loras
from sdjax.checkpoints.reading import read_any
from sdjax.errors import UserError
from sdjax.families.flux import FLUX
from sdjax.formats.adapters.layers import delta
from sdjax.formats.adapters.merging import merged
from sdjax.formats.adapters.reading import read_adapter
from sdjax.formats.adapters.writing import write_diffusers_adapter, write_kohya_adapter
from sdjax.models.weights import read_header
from tests.checkpoints.adapters import samples
from tests.checkpoints.adapters.test_files import TINY_FLUX, TINY_SD3
from tests.checkpoints.adapters.test_merging import with_params
from tests.odd_names import ODD


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose name is taken for no pattern, URL or word of a shell."""
    (tmp_path / ODD).mkdir()
    return tmp_path / ODD


@pytest.fixture(scope="module")
def model(pipeline_folder):
    return read_any(pipeline_folder)


@pytest.fixture
def lora(model, tmp_path):
    """A LoRA of every module of the tiny pipeline, in kohya's file."""
    file = tmp_path / "style.safetensors"
    metadata = {"ss_output_name": "style", "modelspec.author": "me"}
    write_kohya_adapter(file, model, samples.lora_adapter(model, ranks=(4,)), metadata)
    return file


def run(*options):
    return convert.main([str(option) for option in options])


def assert_same_changes(found, wanted, atol=1e-6):
    assert found.keys() == wanted.keys()
    for path, layer in wanted.items():
        np.testing.assert_allclose(delta(found[path]), delta(layer), atol=atol)


def test_a_file_of_one_layout_becomes_the_other(pipeline_folder, model, lora, tmp_path, capsys):
    base = f"--base={pipeline_folder}"
    folder, back = tmp_path / "diffusers", tmp_path / "back.safetensors"
    assert run(f"--input={lora}", f"--output={folder}", "--format=diffusers", base) == 0
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    assert run(f"--input={folder}", f"--output={back}", "--format=kohya", base) == 0
    out = capsys.readouterr().out
    assert f"wrote {back}, float32" in out and "read an adapter of" in out
    assert_same_changes(read_adapter(back, model), read_adapter(lora, model))


def test_metadata_of_a_kohya_file_stays(pipeline_folder, lora, tmp_path):
    new = tmp_path / "new.safetensors"
    options = ("--format=kohya", "--dtype=float16", "--lora_rank=2", f"--base={pipeline_folder}")
    assert run(f"--input={lora}", f"--output={new}", *options) == 0
    said = read_header(new)[1]
    assert (said["ss_output_name"], said["modelspec.author"]) == ("style", "me")
    assert said["ss_network_dim"] == "2"


def test_ranks_follow_from_singular_values(pipeline_folder, model, lora, tmp_path, capsys):
    new, folder = tmp_path / "new.safetensors", tmp_path / "new"
    options = ("--lora_dynamic=sv_fro:0.8", "--lora_rank=3", f"--base={pipeline_folder}")
    assert run(f"--input={lora}", f"--output={new}", *options, "--format=kohya") == 0
    assert run(f"--input={lora}", f"--output={folder}", *options, "--format=diffusers") == 0
    text = capsys.readouterr().out
    assert "ranks 1 to 3, " in text and "of the changes' squared norm is kept" in text
    found = read_adapter(new, model)
    assert {layer.rank for layer in found.values()} == {1, 2, 3}
    assert_same_changes(read_adapter(folder, model), found)


def test_the_release_is_found_by_names_and_shapes(tmp_path, capsys):
    from sdjax.families.registry import FAMILIES, model_of

    large = model_of(FAMILIES["sdxl"].presets["base"])
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    adapter = {path: samples.lora(np.random.default_rng(0), (640, 2048), 2)}
    write_kohya_adapter(tmp_path / "a.safetensors", large, adapter)
    options = (f"--input={tmp_path / 'a.safetensors'}", f"--output={tmp_path / 'out'}")
    assert run(*options, "--format=diffusers") == 0
    assert "1 modules of SDXL" in capsys.readouterr().out
    (key, *_) = read_header(tmp_path / "out" / "pytorch_lora_weights.safetensors")[0]
    assert key.startswith(path)


def test_adapters_are_merged_into_a_model(pipeline_folder, model, lora, tmp_path, capsys):
    second = tmp_path / "second"
    write_diffusers_adapter(second, model, samples.lora_adapter(model, seed=5))
    merged_folder = tmp_path / "merged"
    options = (f"--input={pipeline_folder}", f"--output={merged_folder}", "--to=diffusers")
    assert run(*options, f"--lora={lora}:0.5", f"--lora={second}") == 0
    assert f"merged the adapter {lora}:0.5" in capsys.readouterr().out
    adapters = [(read_adapter(lora, model), 0.5), (read_adapter(second, model), 1.0)]
    found, expected = read_any(merged_folder), merged(model, adapters)
    for path, value in expected.params.items():
        np.testing.assert_array_equal(found.params[path], value)


def test_the_difference_of_two_models_becomes_a_lora(
    pipeline_folder, model, lora, tmp_path, capsys
):
    tuned, out = tmp_path / "tuned", tmp_path / "lora.safetensors"
    assert run(f"--input={pipeline_folder}", f"--output={tuned}", "--to=diffusers",
               f"--lora={lora}") == 0  # fmt: skip
    options = (f"--input={tuned}", f"--base={pipeline_folder}", f"--output={out}")
    assert run(*options, "--extract_lora=4") == 0
    text = capsys.readouterr().out
    assert "unet: rank 4 keeps 100.00% of the change" in text
    assert_same_changes(read_adapter(out, model), read_adapter(lora, model), atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--lora_rank=4"], "--lora_rank is for --format"),
        (["--lora_dynamic=sv_fro:0.9"], "--lora_dynamic is for --format"),
        (["--format=kohya", "--lora_dynamic=sv_fro"], "expected sv_fro:SHARE or sv_cumulative"),
        (["--format=kohya", "--lora_dynamic=sv_ratio:1"], "or sv_ratio:NUMBER with a number above"),
        (["--format=kohya", "--lora_dynamic=svd:1"], "--lora_dynamic=svd:1: expected sv_fro"),
        (["--base=X"], "--base is for --format or --extract_lora"),
        (["--extract_lora=4"], "give --base"),
        (["--extract_lora=0", "--base=X"], "expected 1 or more"),
        (["--format=kohya", "--average_weights", "1"], "--average_weights=[1.0] does not go with"),
        (["--format=kohya", "--lora=x"], "--lora=['x'] does not go with an adapter"),
        (["--format=kohya", "--output=there"], "expected a name that ends in .safetensors"),
        (["--format=diffusers"], "is there already"),
        (["--lora=nothing.safetensors", "--output=new"], "expected a .safetensors file"),
        (["--format=kohya", "--output=new.safetensors"], "give --base=MODEL"),
    ],
)
def test_wrong_options_are_explained(
    options, words, pipeline_folder, lora, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_diffusers_adapter(tmp_path / "old", read_any(pipeline_folder),
                            read_adapter(lora, read_any(pipeline_folder)))  # fmt: skip
    source = pipeline_folder if any("lora=" in option for option in options) else lora
    assert run(f"--input={source}", "--output=old", *options) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, option, weight",
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors", "a.safetensors:0.8", 0.8),
        ("a.safetensors", "a.safetensors:-1", -1.0),
        ("a:2", "a:2", 1.0),
        ("a:2", "a:2:0.5", 0.5),
    ],
)
def test_an_option_is_a_path_and_a_weight(name, option, weight, tmp_path):
    (tmp_path / name).mkdir()
    assert parse_lora(f"{tmp_path}/{option}") == (tmp_path / name, weight, ())
    own = parse_lora(f"{tmp_path}/{option}:lbw=1,0.5,-2")
    assert own == (tmp_path / name, weight, (1.0, 0.5, -2.0))


def test_weights_of_blocks_are_those_of_a_merge_by_hand(model, lora):
    """The tiny UNet has the blocks IN00-03, M00 and OUT00-03; IN01, M00, OUT02-03 attend."""
    adapter = read_adapter(lora, model)
    short = [0.5, 2, 0, 3, -1]  # BASE IN01 M00 OUT02-03
    weights = {
        "text_encoder.": 0.5,
        "unet.down_blocks.0.resnets": 2,
        "unet.down_blocks.0.attentions": 2,
        "unet.up_blocks.1.resnets.0": 3,
        "unet.up_blocks.1.attentions.0": 3,
        "unet.up_blocks.1.resnets.1": -1,
        "unet.up_blocks.1.attentions.1": -1,
        "unet.conv_out": 1,
        "unet.time_embedding": 1,
    }
    numbers = ",".join(map(str, short))
    found = with_loras(model, [f"{lora}:2:lbw={numbers}"])
    by_hand = [
        ({p: own for p, own in adapter.items() if p.startswith(start)}, 2.0 * weight)
        for start, weight in weights.items()
    ]
    expected = merged(model, by_hand)
    for path, value in expected.params.items():
        np.testing.assert_array_equal(found.params[path], value, err_msg=path)
    assert np.any(found.params["unet.conv_out.kernel"] != model.params["unet.conv_out.kernel"])
    whole = with_loras(model, [f"{lora}:lbw={','.join(['0.5'] + ['1'] * 9)}"])
    only = merged(model, [(adapter, lambda path: 1.0 if path.startswith("unet") else 0.5)])
    for path, value in only.params.items():
        np.testing.assert_array_equal(whole.params[path], value, err_msg=path)


def test_weights_of_flux_blocks_are_in_the_orders_of_the_extensions(tmp_path):
    """`BLOCKIDFLUX`: CLIP, T5, IN, 19 double ones, 38 single ones, OUT; here 2 and 3."""
    lists = FLUX.adapters.blocks(FLUX.presets["dev"].transformer)
    shorter, longer = ([names[0] for names in order] for order in lists.weights)
    doubles, singles = [f"D{i:02}" for i in range(19)], [f"S{i:02}" for i in range(38)]
    assert longer == ["CLIP", "T5", "IN", *doubles, *singles, "OUT"] and len(longer) == 61
    assert shorter == ["BASE", *doubles, *singles]
    model = with_params(TINY_FLUX)
    file = tmp_path / "a.safetensors"
    write_kohya_adapter(file, model, samples.lora_adapter(model, ranks=(2,)))
    adapter = read_adapter(file, model)
    weights = {
        "text_encoder.": 2, "transformer.x_embedder": 4, "transformer.time_text_embed": 4,
        "transformer.context_embedder": 4, "transformer.transformer_blocks.0": 5,
        "transformer.transformer_blocks.1": 6, "transformer.single_transformer_blocks.0": 7,
        "transformer.single_transformer_blocks.1": 8, "transformer.single_transformer_blocks.2": 0,
        "transformer.norm_out": 9, "transformer.proj_out": 9,
    }  # fmt: skip
    for base, numbers in (("", "2,3,4,5,6,7,8,0,9"), ("base", "2,5,6,7,8,0")):
        found = with_loras(model, [f"{file}:0.5:lbw={numbers}"])

        def weight(path, base=base):
            own = next(w for start, w in weights.items() if path.startswith(start))
            return 0.5 * (2 if base and own in (4, 9) else own)

        expected = merged(model, [(adapter, weight)])
        for path, value in expected.params.items():
            np.testing.assert_array_equal(found.params[path], value, err_msg=path)
    with pytest.raises(UserError, match=r"expected 6 \(BASE D00-D01 S00-S02\) or 9 \(CLIP T5 IN"):
        with_loras(model, [f"{file}:lbw=1,2"])


def test_sd3_has_no_weights_of_blocks(tmp_path):
    model = with_params(TINY_SD3)
    file = tmp_path / "a.safetensors"
    write_kohya_adapter(file, model, samples.lora_adapter(model, ranks=(2,)))
    with pytest.raises(UserError, match="they are of SD1, SD2, SDXL and FLUX.1: give one weight"):
        with_loras(model, [f"{file}:lbw=1,2"])


@pytest.mark.parametrize(
    "option, words",
    [
        (":lbw=1,2,3", r"lbw has 3 numbers; expected 5 \(BASE IN01 M00 OUT02-OUT03\) or 10"),
        (":0.5:lbw=1,x", "the weight is x; expected a finite number"),
    ],
)
def test_wrong_weights_of_blocks_are_explained(option, words, model, lora):
    with pytest.raises(UserError, match=words):
        with_loras(model, [f"{lora}{option}"])


@pytest.mark.parametrize("weight", ["nan", "inf", "1e999"])
def test_a_weight_that_is_no_number_is_refused(weight, tmp_path):
    with pytest.raises(UserError, match="expected a finite number"):
        parse_lora(f"{tmp_path}/a.safetensors:{weight}")


def test_pictures_are_those_of_the_merged_model(pipeline_folder, model, lora, tmp_path):
    options = ["--prompts=a red circle", "--steps=2", "--height=16", "--width=16"]
    plain = [f"--model={pipeline_folder}", f"--output={tmp_path / 'a'}"]
    assert sample.main([*options, *plain]) == 0
    assert sample.main([*options, *plain[:1], f"--output={tmp_path / 'b'}",
                        f"--lora={lora}:0.5"]) == 0  # fmt: skip
    folder = tmp_path / "merged"
    assert run(f"--input={pipeline_folder}", f"--output={folder}", f"--lora={lora}:0.5",
               "--to=diffusers") == 0  # fmt: skip
    assert sample.main([*options, f"--model={folder}", f"--output={tmp_path / 'c'}"]) == 0
    pictures = [Image.open(tmp_path / name / "00000.png") for name in "abc"]
    first, second, third = (np.asarray(picture) for picture in pictures)
    assert np.any(first != second)
    np.testing.assert_array_equal(second, third)
    assert pictures[1].text["lora"] == str([f"{lora}:0.5"])
    assert "lora" not in pictures[0].text


def test_no_adapter_leaves_a_model_as_it_is(model):
    assert with_loras(model, []) is model


def test_an_evaluation_takes_adapters_and_says_so(pipeline_folder, model, lora):
    from sdjax.evaluation.loading import load
    from sdjax.evaluation.request import Request

    found = load(str(pipeline_folder), loras=[f"{lora}:0.5"]).found
    expected = merged(model, [(read_adapter(lora, model), 0.5)])
    for path, value in expected.params.items():
        np.testing.assert_array_equal(found.params[path], value)
    with pytest.raises(UserError, match="--lora=x is for a model"):
        Request(images="pictures", lora=("x",))
