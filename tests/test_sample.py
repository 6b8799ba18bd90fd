"""The verb that draws: the torch pipeline's pictures, settings in files, errors with remedies."""

import numpy as np
import pytest
from PIL import Image

from sdjax import sample
from sdjax.data.config import DataConfig
from sdjax.data.sources import open_source
from tests.odd_names import ODD

PROMPTS = ["a red circle", "a green star and a small red circle"]


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose name is taken for no pattern, URL or word of a shell."""
    (tmp_path / ODD).mkdir()
    return tmp_path / ODD


def draw(folder, output, *options):
    return sample.main([f"--model={folder}", f"--output={output}", *options])


def picture(path):
    return np.asarray(Image.open(path), np.float32) / 255


def test_the_same_pictures_as_the_torch_pipeline(torch_pipeline, pipeline_folder, tmp_path):
    import torch

    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "latents.npy", latents)  # torch's layout
    np.save(tmp_path / "last.npy", latents.transpose(0, 2, 3, 1))
    want = torch_pipeline(
        PROMPTS,
        negative_prompt=["a blue square"] * 2,
        height=16,
        width=16,
        num_inference_steps=5,
        guidance_scale=4.0,
        latents=torch.from_numpy(latents),
        output_type="np",
    ).images
    options = ["--prompts", *PROMPTS, "--negative_prompt=a blue square", "--steps=5",
               "--guidance=4", "--height=16", "--width=16"]  # fmt: skip
    assert draw(pipeline_folder, tmp_path, f"--latents={tmp_path / 'latents.npy'}", *options) == 0
    for i in range(2):
        ours = picture(tmp_path / f"{i:05d}.png")
        assert np.abs(ours - want[i]).max() < 0.01
    # Channels last, and one at a time: the same pictures.
    other = tmp_path / "other"
    option = f"--latents={tmp_path / 'last.npy'}"
    assert draw(pipeline_folder, other, option, "--batch_size=1", *options) == 0
    for i in range(2):
        a, b = picture(tmp_path / f"{i:05d}.png"), picture(other / f"{i:05d}.png")
        assert np.abs(a - b).max() <= 1.001 / 255


def test_sdxl_is_told_of_sizes_as_the_torch_pipeline_is(torch_xl_pipeline, xl_folder, tmp_path):
    import torch

    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "latents.npy", latents)
    want = torch_xl_pipeline(
        PROMPTS,
        negative_prompt=["a blue square"] * 2,
        height=16,
        width=16,
        original_size=(40, 30),
        crops_coords_top_left=(3, 5),
        num_inference_steps=4,
        guidance_scale=4.0,
        latents=torch.from_numpy(latents),
        output_type="np",
    ).images
    options = ["--prompts", *PROMPTS, "--negative_prompt=a blue square", "--steps=4",
               "--guidance=4", "--height=16", "--width=16", "--original_size", "40", "30",
               "--crop", "3", "5", f"--latents={tmp_path / 'latents.npy'}"]  # fmt: skip
    assert draw(xl_folder, tmp_path, *options) == 0
    for i in range(2):
        assert np.abs(picture(tmp_path / f"{i:05d}.png") - want[i]).max() < 0.01
    text = Image.open(tmp_path / "00000.png").text
    assert text["original_size"] == "[40, 30]" and text["crop"] == "[3, 5]"


def test_settings_are_in_the_file_and_prompts_may_come_from_one(pipeline_folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  a blue square, 猫  \n", encoding="utf-8")
    options = [f"--prompts_file={file}", "--steps=2", "--seed=7", "--sampler=dpmpp_2m", "--karras"]
    assert draw(pipeline_folder, tmp_path / "a", *options) == 0
    text = Image.open(tmp_path / "a" / "00001.png").text
    assert text["prompt"] == "a blue square, 猫" and text["seed"] == "7"
    assert text["sampler.name"] == "dpmpp_2m" and text["sampler.karras"] == "True"
    assert Image.open(tmp_path / "a" / "grid.png").width > 128
    assert draw(pipeline_folder, tmp_path / "b", *options) == 0
    for name in ("00000.png", "00001.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["no prompts"]),
        (["--prompts_file=/nowhere/x"], ["/nowhere/x"]),
        (["--prompts=a", "--height=17"], ["height is 17", "multiple of 2"]),
        (["--prompts=a", "--latents=/nowhere.npy"], ["/nowhere.npy"]),
        (["--prompts=a", "--sampler=flow_euler"], ["flow_euler", "scaled_linear"]),
        (["--prompts=a", "--steps=0"], ["steps is 0"]),
        (["--prompts=a", "--batch_size=0"], ["--batch_size=0; expected 1 or more"]),
        (["--prompts=a", "--width=-8"], ["--width=-8; expected 1 or more"]),
        (["--prompts=a", "--crop", "1", "2"], ["--crop", "SDXL"]),
    ],
)
def test_wrong_options_are_explained(pipeline_folder, tmp_path, capsys, options, words):
    assert draw(pipeline_folder, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_a_count_repeats_the_prompts_and_makes_a_dataset(pipeline_folder, tmp_path):
    """Pictures of a class by the untrained model, for prior preservation."""
    out = tmp_path / "class"
    options = [f"--model={pipeline_folder}", f"--output={out}", "--steps=1", "--count=3"]
    assert sample.main([*options, "--prompts=a red circle", "--prompts=a star"]) == 0
    data = DataConfig(
        name="image_text_folder", path=str(out), data_dir=str(tmp_path / "tfds"), min_side=8
    )
    found = [text for split in ("train", "test") for text in open_source(data, split).texts()]
    assert sorted(found) == ["a red circle", "a red circle", "a star"]  # without grid.png
    assert sample.main([*options[:-1], "--count=0", "--prompts=a star"]) == 2


def test_latents_of_another_shape_are_refused(pipeline_folder, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 8, 8), np.float32))
    option = f"--latents={tmp_path / 'x.npy'}"
    assert draw(pipeline_folder, tmp_path / "out", option, "--prompts=a") == 2
    assert "[3, 4, 8, 8]" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert draw(tmp_path, tmp_path / "out", "--prompts=a") == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_long_prompt_is_cut_and_told(pipeline_folder, tmp_path, capsys):
    assert draw(pipeline_folder, tmp_path, "--prompts", "a red circle " * 30, "--steps=1") == 0
    assert "1 of the prompts are longer than 14 tokens and were cut" in capsys.readouterr().err


def test_the_sampler_names_are_those_of_the_library():
    from sdjax.diffusion.samplers import SAMPLERS
    from sdjax.sampling.options import SAMPLER_NAMES

    assert SAMPLER_NAMES == SAMPLERS


def test_options_that_several_verbs_have_are_the_same_ones():
    from sdjax import convert, evaluate

    def options(parser, purpose):
        return {
            action.option_strings[0]: (
                type(action), action.type, action.nargs, action.choices, action.metavar,
                action.default, (action.help or "").replace(purpose, "OWN"),
            )
            for action in parser._actions
        }  # fmt: skip

    ours = options(sample.parser(), "the model's own by default")
    theirs = options(evaluate.parser(), "the run's, or the model's, own by default")
    shared = ours.keys() & theirs.keys() - {"-h", "--model", "--output"}
    assert len(shared) >= 24, sorted(shared)
    for name in shared:
        assert ours[name] == theirs[name], name
    lora = options(sample.parser(), "for --model")["--lora"]
    assert options(convert.parser(), "that is merged into what is written")["--lora"] == lora
