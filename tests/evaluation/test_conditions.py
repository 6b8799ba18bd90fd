"""Models that read pictures are evaluated with those of the split, as `sample` draws them."""

import json

import diffusers
import numpy as np
import pytest
from PIL import Image

from sdjax import evaluate, sample
from sdjax.data.config import DataConfig
from sdjax.data.named_images import NamedImage
from sdjax.data.pictures import open_split
from sdjax.errors import UserError
from sdjax.evaluation.conditions import Needs, open_conditions, parse, with_images
from sdjax.evaluation.loading import load
from sdjax.formats.ip_adapter import FILE
from sdjax.methods.inpaint import InpaintConfig
from tests.conftest import randomise
from tests.families import torch_transformers
from tests.sampling.test_control import control_of
from tests.sampling.test_ip_adapter import DIM, adapter_for
from tests.sampling.test_pictures import remade

# One of four rows always becomes the split "test".
WORDS = ["a red circle", "a blue square", "a green star", "a black cross"]
SIZE = (16, 16)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four soft pictures with captions; beside each a condition, the one before it, and a mask."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = []
    for i, text in enumerate(WORDS):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        picture = small.resize((16, 16), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i}.png")
        picture.point(lambda v: 255 * (v > 127)).save(folder / f"{i}.edge.png")
        picture.transpose(Image.Transpose.ROTATE_90).save(folder / f"{i}.before.png")
        mask = np.zeros((16, 16), np.uint8)
        mask[:, : 3 * (i + 1)] = 255
        Image.fromarray(mask).save(folder / f"{i}.matte.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(torch_pipeline, pipeline_folder, tmp_path_factory):
    """Folders of models that read pictures, and of networks that steer one that does not."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    kinds = {"inpaint": (9, "StableDiffusionInpaintPipeline"),
             "edit": (8, "StableDiffusionInstructPix2PixPipeline")}  # fmt: skip
    for name, (channels, kind) in kinds.items():
        config = {**torch_pipeline.unet.config, "in_channels": channels}
        unet = diffusers.UNet2DConditionModel(**config)
        randomise(unet, channels)
        remade(torch_pipeline, kind, unet=unet.eval()).save_pretrained(folder / name)
    flux = torch_transformers.flux(torch_pipeline.tokenizer, folder / "words")
    remade(flux, "FluxKontextPipeline").save_pretrained(folder / "kontext")
    widths = {**flux.transformer.config, "in_channels": 32, "out_channels": 16}
    wide = diffusers.FluxTransformer2DModel(**widths)
    randomise(wide.eval(), 61)
    made = remade(flux, "FluxControlPipeline", transformer=wide)
    made.save_pretrained(folder / "follow")
    control_of(torch_pipeline.unet, 30).save_pretrained(folder / "control")
    adapter_for(torch_pipeline.unet, folder / "ip", 40)
    tower = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            image_size=12, patch_size=4, hidden_act="gelu", projection_dim=DIM,
        )
    )  # fmt: skip
    randomise(tower, 9)
    tower.save_pretrained(folder / "tower")
    (folder / "steered").symlink_to(pipeline_folder)
    return folder


def options_of(case, models):
    """The options of `evaluate` about what a model reads."""
    return {
        "inpaint": [],
        "inpaint, own masks": ["--named_image=mask=matte:mask"],
        "edit": [],
        "kontext": [],
        "follow": ["--named_image=control=edge:condition"],
        "steered": [
            f"--controlnet={models / 'control'}:0.7", "--named_image=control=edge:condition",
            f"--ip_adapter={models / 'ip' / FILE}", f"--image_encoder={models / 'tower'}",
        ],
    }[case]  # fmt: skip


def data_of(pictures, folder, *images):
    return DataConfig(
        name="image_text_folder", path=str(pictures), data_dir=str(folder), resolution=16,
        images=images,
    )  # fmt: skip


def given_to_sample(case, models, pictures, folder, numbers):
    """The same pictures as options of `sample`; masks that are drawn are written first."""
    each = lambda option, ending: [  # noqa: E731
        f"--{option}={pictures / f'{i}{ending}.png'}" for i in numbers
    ]
    if case in ("edit", "kontext"):
        return each("init_image", ".before")
    if case == "follow":
        return each("control_image", ".edge")
    if case == "steered":
        networks = [o for o in options_of(case, models) if not o.startswith("--named_image")]
        return [*networks, *each("control_image", ".edge"), *each("ip_image", "")]
    if case == "inpaint, own masks":
        return [*each("init_image", ""), *each("mask_image", ".matte")]
    own = open_conditions(
        load(models / case).found, data_of(pictures, folder / "data"), "train", size=SIZE,
        per_prompt=2, controls=(), sights={}, method=None, dtype="float32",
    )  # fmt: skip
    rows = own.rows(np.arange(6))
    assert rows.tolist() == [0, 0, 1, 1, 2, 2]
    masks = own.masked(rows, own.batch(rows))
    np.testing.assert_array_equal(masks[::2], masks[1::2])  # of the example, not of the picture
    assert 0 < masks.mean() < 1 and np.any(masks[0] != masks[2])
    for i, mask in enumerate(masks):
        Image.fromarray((mask[..., 0] * 255).astype(np.uint8)).save(folder / f"mask{i}.png")
    drawn = [f"--mask_image={folder / f'mask{i}.png'}" for i in range(6)]
    return [*each("init_image", ""), *drawn]


COMMON = ["--steps=2", "--guidance=3", "--height=16", "--width=16", "--seed=4"]
CASES = ["inpaint", "inpaint, own masks", "edit", "steered", "kontext", "follow"]


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_that_sample_draws_of_the_same_conditions(
    case, models, pictures, tmp_path, capsys
):
    model = models / case.split(",")[0]
    common = [*COMMON, f"--sampler={'flow_euler' if case in ('kontext', 'follow') else 'ddim'}"]
    metrics = "inside_error,outside_error" if "inpaint" in case else "diversity"
    assert 0 == evaluate.main([
        f"--model={model}", f"--dataset={pictures}", "--split=train", "--per_prompt=2",
        f"--data_dir={tmp_path / 'data'}", f"--output={tmp_path / 'out'}", "--batch_size=6",
        f"--metrics={metrics}", "--features=pixels", "--resamples=20", *common,
        *options_of(case, models),
    ]), capsys.readouterr().err  # fmt: skip
    noted = (tmp_path / "out" / "images" / "metadata.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["text"] for line in noted]
    numbers = [WORDS.index(prompt) for prompt in prompts]
    assert len(set(numbers)) == 3 and numbers[::2] == numbers[1::2]
    assert 0 == sample.main([
        f"--model={model}", f"--output={tmp_path / 'drawn'}", "--prompts", *prompts, *common,
        "--batch_size=6", *given_to_sample(case, models, pictures, tmp_path, numbers),
    ]), capsys.readouterr().err  # fmt: skip
    ours = read(tmp_path / "out" / "images", 6)
    theirs = read(tmp_path / "drawn", 5)
    assert ours.std() > 10 and np.any(ours[0] != ours[1])
    assert np.abs(ours - theirs).max() <= 1
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(found["metrics"]) == set(metrics.split(","))
    if case == "inpaint, own masks":
        real = read(pictures, 1)[numbers]
        inside = read(pictures, 1, ".matte")[numbers][..., :1] > 127
        apart = np.abs(ours - real) / 255
        for name, mask in (("inside_error", inside), ("outside_error", ~inside)):
            per_picture = [a[m[..., 0]].mean() for a, m in zip(apart, mask, strict=True)]
            value = found["metrics"][name]["value"]
            assert value == pytest.approx(np.mean(per_picture), rel=1e-4)
            assert found["metrics"][name]["higher_is_better"] is False
    if case == "steered":
        assert found["controlnet"] == [f"{models / 'control'}:0.7"]
        noted = json.loads((tmp_path / "out" / "images" / "settings.json").read_text())
        assert noted["conditions"]["images"][0]["key"] == "edge"
        assert noted["conditions"]["controls"][0] == ["controlnet0", 0.7, 0.0, 1.0, False]


def read(folder, digits, ending=""):
    files = sorted(folder.glob(f"{'[0-9]' * digits}{ending}.png"))
    return np.stack([np.asarray(Image.open(file).convert("RGB"), int) for file in files])


@pytest.mark.parametrize(
    ("case", "options", "words"),
    [
        ("edit", ["--named_image=mask=matte:mask"], "mask (mask) is not read here; the model takes "
         "before (picture)"),
        ("edit", ["--named_image=before=edge:condition"], "before (condition) is not read here"),
        ("edit", ["--named_image=before=nothing"], "the picture 'before', of the key 'nothing'"),
        ("edit", ["--audit={0}/audit.yaml"], "draws prompts alone, and the model reads pictures"),
        ("steered", ["--controlnet={0}/control"], "the picture 'control', of the key 'control'"),
        ("steered", ["--image_encoder={0}/tower"], "--image_encoder is for --ip_adapter=FILE"),
        ("steered", ["--ip_adapter={0}/ip/" + FILE], "give --image_encoder=DIR"),
        ("steered", ["--guess_mode"], "--guess_mode is for ControlNets, and there is none"),
        ("steered", ["--image_guidance=2"], "--image_guidance is for models that edit a picture"),
        ("steered", ["--controlnet={0}/control:1:0.1:0.2", "--steps=2", "--metrics=diversity",
         "--named_image=control=edge:condition", "--features=pixels", "--per_prompt=2"],
         "in which no whole step lies"),
        ("steered", ["--metrics=outside_error"], "takes a model for inpainting"),
        ("steered", ["--named_image=control=x:made"], "made is 'x'"),
    ],
)  # fmt: skip
def test_what_does_not_suit_is_refused(case, options, words, models, pictures, tmp_path, capsys):
    audit = "prompts: [a]\npictures_per_prompt: 2\nattributes: {hair: {a: [a], b: [b]}}\n"
    (models / "audit.yaml").write_text(audit)
    assert 2 == evaluate.main([
        f"--model={models / case}", f"--dataset={pictures}", "--split=train",
        f"--data_dir={tmp_path / 'data'}", f"--output={tmp_path / 'out'}",
        *(option.format(models) for option in options),
    ])  # fmt: skip
    assert words in capsys.readouterr().err


def test_pictures_that_were_encoded_ahead_are_no_conditions(pictures, tmp_path):
    data = DataConfig(name="encoded", path="x")
    with pytest.raises(UserError, match="encoded ahead have no pixels; give --dataset=PATH"):
        open_conditions(
            None, data, "train", size=SIZE, per_prompt=1, controls=(), sights={},
            method=InpaintConfig(), dtype="float32",
        )  # fmt: skip


def test_other_data_have_the_pictures_that_the_model_cannot_do_without():
    wanted = Needs({"control": "condition"}, {"reference": "condition"})
    made = NamedImage("control", kind="condition", made="canny")
    own = DataConfig(images=(made, NamedImage("mask", kind="mask")))
    assert with_images(DataConfig(), own, wanted, ()).images == (made,)
    plain = NamedImage("control", kind="condition")
    assert with_images(DataConfig(), None, wanted, ()).images == (plain,)
    given = with_images(own, own, wanted, ["control=edge:condition", "reference=face:condition"])
    assert [image.key for image in given.images] == ["edge", "", "face"]
    assert parse("control=grey:made") == NamedImage("control", kind="condition", made="grey")


def test_pictures_of_a_split_are_cropped_together(pictures, tmp_path):
    data = data_of(pictures, tmp_path, NamedImage("before"), NamedImage("m", "matte", "mask"))
    split = open_split(data, "train", size=(8, 16))
    found = split.named([2, 0])
    assert {name: v.shape for name, v in found.items()} == {
        "image": (2, 8, 16, 3), "before": (2, 8, 16, 3), "m": (2, 8, 16, 1),
    }  # fmt: skip
    np.testing.assert_array_equal(found["image"][0], split.read(2, 3)[0])
    i = WORDS.index(split.captions[2])
    np.testing.assert_array_equal(found["m"][0, 0, :, 0] > 0, np.arange(16) < 3 * (i + 1))
