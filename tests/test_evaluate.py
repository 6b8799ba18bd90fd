"""The verb that evaluates: its files, going on after a stop, and what it says of wrong options."""

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from sdjax import convert, evaluate, sample
from sdjax.evaluation.robustness import PERTURBATIONS
from sdjax.sampling import drawing
from tests.odd_names import ODD

OPTIONS = ("--num_samples=12", "--per_prompt=2", "--batch_size=5", "--features=pixels")


@pytest.fixture(scope="module")
def run(pipeline_folder, shapes_dir, tmp_path_factory):
    """A workdir of the tests' tiny pipeline, with a config that says what it was trained on."""
    from sdjax.checkpoints.reading import read_any
    from sdjax.checkpoints.workdir import save_workdir

    folder = tmp_path_factory.mktemp("evaluated") / ODD
    save_workdir(folder, read_any(pipeline_folder))
    config = json.loads((folder / "config.json").read_text())
    config["data"].update(
        data_dir=str(shapes_dir), resolution=16, batch_size=8, shapes_train=40, shapes_test=8,
        threads=1,
    )  # fmt: skip
    config["validation"].update(examples=8)
    config["sample"].update(guidance=3.0)
    config["sample"]["sampler"].update(name="euler_ancestral", steps=2, set_alpha_to_one=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def verb(folder, output, *options):
    return evaluate.main([f"--model={folder}", f"--output={output}", "--dataset=own", *options])


def metrics(output):
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """An evaluation with everything that takes no weights."""
    output = tmp_path_factory.mktemp("whole") / ODD
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert verb(run, output, *OPTIONS) == 0
    (output / "shown.txt").write_text(shown.getvalue())
    return output


def test_what_it_writes(run, whole):
    found = metrics(whole)
    assert found["model"] == str(run) and found["step"] == 0 and found["weights"] == "ema"
    assert found["dataset"] == "captioned_shapes" and found["split"] == "test"
    assert found["num_samples"] == 12 and found["seed"] == 0
    assert found["sampler"]["name"] == "euler_ancestral" and found["sampler"]["guidance"] == 3.0
    names = {"precision", "recall", "density", "coverage", "diversity", "memorised"}
    assert names | {"fidelity_colour", "fidelity_relation", "validation_loss"} <= set(
        found["metrics"]
    )
    for one in found["metrics"].values():
        assert one["low"] <= one["value"] <= one["high"]
    curve = found["curves"]["validation_loss"]
    assert len(curve["x"]) == len(curve["y"]) == len(curve["low"]) == 8
    assert np.mean(curve["y"]) == pytest.approx(found["metrics"]["validation_loss"]["value"])
    assert any("fid, kid" in line and "--inception" in line for line in found["warnings"])
    for name in ("grid.png", "nearest.png", "metrics.png", "validation_loss.png"):
        assert min(Image.open(whole / name).size) > 100
    pictures = sorted(file.name for file in (whole / "images").glob("*.png"))
    assert pictures == [f"{i:06d}.png" for i in range(12)]
    rows = [json.loads(line) for line in (whole / "images" / "metadata.jsonl").open()]
    assert rows[0]["text"] == rows[1]["text"] != rows[2]["text"]


def test_example_losses_are_written_when_they_are_asked_for(run, whole, tmp_path):
    assert "example_loss" not in metrics(whole)["metrics"]
    assert verb(run, tmp_path, "--metrics=example_loss,validation_loss", "--resamples=20") == 0
    found = metrics(tmp_path)["metrics"]
    rows = [json.loads(line) for line in (tmp_path / "example_loss.jsonl").open()]
    assert len(rows) == found["example_loss"]["count"] == 8  # all of the split
    assert found["example_loss"]["value"] == found["validation_loss"]["value"]  # the same examples
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True) and abs(sum(scores)) < 1e-9
    assert all(np.mean([*row["loss_at"].values()]) == pytest.approx(row["loss"]) for row in rows)
    page = (tmp_path / "example_loss.html").read_text()
    assert rows[0]["caption"] in page and page.count("<img ") == 12 and "<script" not in page


def test_robustness_draws_again_and_compares(run, tmp_path):
    options = ("--metrics=robustness", "--num_samples=5", "--batch_size=5", "--resamples=20")
    assert verb(run, tmp_path, *options) == 0
    found = metrics(tmp_path)
    changes = found["robustness"]["changes"]
    assert changes.keys() == PERTURBATIONS.keys()
    assert found["robustness"]["features"] == "pixels-16x16"
    first = [np.asarray(Image.open(tmp_path / "images" / f"{i:06d}.png"), float) for i in range(5)]
    for name, measures in changes.items():
        assert found["metrics"][f"robustness_{name}"]["value"] == measures["features"]["value"]
        again = tmp_path / "robustness" / name
        second = [np.asarray(Image.open(again / f"{i:06d}.png"), float) for i in range(5)]
        want = np.mean([np.mean((a - b) ** 2) for a, b in zip(first, second, strict=True)]) / 255**2
        assert measures["mse"]["value"] == pytest.approx(want)
        assert (want > 0) == (name != "upper_case")  # CLIP's tokenizer reads small letters
        assert measures["mse"]["low"] <= want <= measures["mse"]["high"]
        assert -1 <= measures["fidelity"]["value"] <= 1
        (row, *_) = map(json.loads, (again / "metadata.jsonl").open())
        text = json.loads((tmp_path / "images" / "metadata.jsonl").open().readline())["text"]
        assert row["text"] == PERTURBATIONS[name].words(text)
    near, far = (changes[f"noise_{turn}"]["mse"]["value"] for turn in ("0.1", "0.3"))
    assert near < far
    kept = (tmp_path / "metrics.json").read_bytes()
    (tmp_path / "robustness" / "empty" / "000002.png").unlink()
    assert verb(run, tmp_path, *options) == 0  # goes on, to the same
    assert (tmp_path / "metrics.json").read_bytes() == kept


def test_the_table_is_for_people(whole):
    shown = (whole / "shown.txt").read_text()
    assert "memorised" in shown and "95 % interval" in shown and str(whole) in shown
    assert "left out, cmmd, clip_score: takes a CLIP" in shown


def test_pictures_are_those_that_sample_draws(run, whole, tmp_path):
    """The same numbers, seed and settings; the noise of an ancestral sampler too."""
    rows = [json.loads(line) for line in (whole / "images" / "metadata.jsonl").open()]
    prompts = [row["text"] for row in rows]
    options = ["--prompts", *prompts, "--guidance=3", "--height=16", "--width=16", "--batch_size=5"]
    assert sample.main([f"--model={run}", f"--output={tmp_path}", *options]) == 0
    for i in range(12):
        ours, theirs = (
            np.asarray(Image.open(file), int)
            for file in (whole / "images" / f"{i:06d}.png", tmp_path / f"{i:05d}.png")
        )
        assert np.abs(ours - theirs).max() <= 1


def test_stopped_and_gone_on_it_gives_the_same_to_the_bit(run, whole, tmp_path, monkeypatch):
    written = []

    def dies(path, *rest):
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(path)
        save(path, *rest)

    save = drawing.save_png
    monkeypatch.setattr(drawing, "save_png", dies)
    with pytest.raises(KeyboardInterrupt):
        verb(run, tmp_path, *OPTIONS)
    assert not (tmp_path / "metrics.json").exists()
    monkeypatch.setattr(drawing, "save_png", save)
    kept = (tmp_path / "images" / "000000.png").stat().st_mtime_ns
    assert verb(run, tmp_path, *OPTIONS) == 0
    assert (tmp_path / "images" / "000000.png").stat().st_mtime_ns == kept
    assert (tmp_path / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    for file in (whole / "images").iterdir():
        assert (tmp_path / "images" / file.name).read_bytes() == file.read_bytes()


def test_more_pictures_keep_those_that_are_there(run, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "more")
    assert verb(run, tmp_path / "more", *OPTIONS[1:], "--num_samples=14", "--metrics=fidelity") == 0
    names = sorted(file.name for file in (whole / "images").glob("*.png"))
    for name in names:
        same = (tmp_path / "more" / "images" / name, whole / "images" / name)
        assert same[0].read_bytes() == same[1].read_bytes()
    assert metrics(tmp_path / "more")["num_samples"] == 14
    # And fewer take the first of them.
    assert verb(run, tmp_path / "more", *OPTIONS[1:], "--num_samples=4", "--metrics=fidelity") == 0
    assert metrics(tmp_path / "more")["metrics"]["fidelity_colour"]["count"] == 4


def test_other_settings_than_the_folder_was_begun_with_are_named(run, whole, capsys):
    assert verb(run, whole, *OPTIONS, "--seed=1", "--guidance=5") == 2
    error = capsys.readouterr().err
    assert "seed: 0 there, 1 here" in error and "guidance: 3.0 there, 5.0 here" in error
    assert "steps" not in error


def test_pictures_of_a_folder_are_judged_alike(run, whole, tmp_path):
    """With captions from its metadata, and a dataset named by the model's run."""
    options = (f"--images={whole / 'images'}", "--metrics=fidelity,memorised,diversity")
    assert verb(run, tmp_path, *options, "--features=pixels") == 0
    found, want = metrics(tmp_path)["metrics"], metrics(whole)["metrics"]
    assert found == {name: want[name] for name in found} and len(found) > 6
    assert not (tmp_path / "images").exists()


def test_pictures_alone_take_a_dataset_by_its_folder(whole, tmp_path):
    """No model: held-out pictures against themselves are all precise, and all covered."""
    data = tmp_path / "data"
    for split in ("train", "test"):
        shutil.copytree(whole / "images", data / split)
        (data / split / "settings.json").unlink()
    options = [f"--images={data / 'test'}", f"--dataset={data}", f"--output={tmp_path / 'out'}",
               f"--data_dir={tmp_path / 'tfds'}", "--metrics=precision,coverage"]  # fmt: skip
    assert evaluate.main([*options, "--features=pixels"]) == 0
    found = metrics(tmp_path / "out")
    assert found["metrics"]["precision"]["value"] == found["metrics"]["coverage"]["value"] == 1
    assert found["num_samples"] == 12 and found["weights"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metrics=fid"], ["--metrics=fid", "--inception=FILE", "https://", "--download"]),
        (["--metrics=fid", "--inception=/nowhere.pth"], ["/nowhere.pth", "pytorch-fid"]),
        (["--metrics=clip_score"], ["--clip=DIR", "huggingface.co/openai"]),
        (["--metrics=cmmd", "--clip=/nowhere"], ["/nowhere", "--clip"]),
        (["--metrics=precision"], ["--features=pixels"]),
        (["--metrics=precision", "--features=pixels"], ["at least 4", "--num_samples"]),
        (["--metrics=fit"], ["--metrics has fit", "fid, kid"]),
        (["--metrics=diversity", "--features=pixels"], ["--per_prompt=4"]),
        (["--metrics=kid", "--reference=/nowhere.npz"], ["/nowhere.npz"]),
        (
            ["--metrics=coverage", "--features=pixels", "--reference_samples=4"],
            ["at least 6", "there are 4"],
        ),
        (["--num_samples=-1"], ["--num_samples=-1"]),
        (["--batch_size=0"], ["--batch_size=0"]),
        (["--step=7"], ["7"]),
        (["--weights=0.5"], ["0.5", "ema, raw"]),
        (["--dataset=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--split=nope"], ["nope"]),
        (["--height=16"], ["--height and --width"]),
        (["--sampler=flow_euler"], ["flow_euler"]),
    ],
)
def test_wrong_options_are_explained(run, tmp_path, capsys, options, words):
    own = [] if any(o.startswith("--num") for o in options) else ["--num_samples=2"]
    assert verb(run, tmp_path / "out", *own, *options) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_neither_a_model_nor_pictures(tmp_path, capsys):
    assert evaluate.main([f"--output={tmp_path}"]) == 2
    assert "--model=DIR" in capsys.readouterr().err


def test_the_loss_alone_draws_nothing_and_goes_beside_the_run(run):
    assert evaluate.main([f"--model={run}", "--metrics=validation_loss", "--dataset=own"]) == 0
    folder = run / "evaluations" / "00000000-ema-captioned_shapes"
    assert set(metrics(folder)["metrics"]) == {"validation_loss"}
    assert not (folder / "images").exists() and not (folder / "grid.png").exists()


def test_a_diffusers_folder_takes_a_dataset(pipeline_folder, tmp_path, capsys):
    assert verb(pipeline_folder, tmp_path, "--metrics=fidelity") == 2
    assert "--dataset=NAME" in capsys.readouterr().err


def test_a_sampler_that_is_not_there_is_an_error_where_pictures_are_drawn(
    pipeline_folder, tmp_path, capsys
):
    folder = shutil.copytree(pipeline_folder, tmp_path / "folder")
    for file, field, value in (
        ("model_index.json", "scheduler", ["diffusers", "LMSDiscreteScheduler"]),
        ("scheduler/scheduler_config.json", "_class_name", "LMSDiscreteScheduler"),
    ):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, field: value}))
    options = ["--dataset=captioned_shapes", "--metrics=fidelity", "--num_samples=2"]
    assert verb(folder, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert "LMSDiscreteScheduler" in error and "--sampler=euler" in error


@pytest.fixture
def snapshots(run, tmp_path):
    """The run with snapshots of two widths: the first is its own weights, the second is noisy."""
    from sdjax.checkpoints.reading import read_any
    from sdjax.optim import ema

    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("evaluations"))
    own = read_any(run).params  # all are trained as far as this workdir says
    rng = np.random.default_rng(0)
    noise = {p: np.float32(rng.standard_normal(v.shape)) for p, v in own.items() if p[0] == "u"}
    noisy = {p: v + noise.get(p, 0) for p, v in own.items()}
    for step in (2, 4):
        ema.save_snapshots(folder, step, {"power-0.05": own, "power-0.1": noisy})
    return folder


def test_the_best_length_of_average_is_found(run, snapshots, whole, capsys):
    from sdjax.checkpoints.reading import read_any

    options = [f"--model={snapshots}", "--ema_lengths=0.05:0.1:3", "--dataset=own"]
    assert evaluate.main(options) == 0
    shown = capsys.readouterr().out
    folder = snapshots / "evaluations" / "00000000-ema-captioned_shapes-ema_lengths"
    found = metrics(folder)
    curve = found["curves"]["ema_length"]
    assert curve["x"] == [0.05, 0.07071, 0.1] and curve["y"][0] < curve["y"][1] < curve["y"][2]
    # A width that was kept is what was kept.
    own = metrics(whole)["metrics"]["validation_loss"]["value"]
    assert curve["y"][0] == pytest.approx(own, rel=1e-4)
    best = found["best_ema_length"]
    assert best["length"] == 0.05 and best["command"] in shown and "best: 0.05" in shown
    assert found["weights"] == "power-0.05" and found["step"] == 4
    assert Image.open(folder / "ema_length.png").width > 100
    command = shlex.split(best["command"])
    assert command[:3] == ["python", "-m", "sdjax.convert"] and convert.main(command[3:]) == 0
    params = read_any(folder / "diffusers").params
    for path, value in read_any(run).params.items():  # the snapshot's, and what was not trained
        np.testing.assert_allclose(params[path], value, rtol=1e-4, atol=1e-5)


def test_lengths_of_pictures_go_on_too(snapshots, tmp_path):
    options = ("--ema_lengths=0.05:0.06:2", "--metrics=fidelity", "--num_samples=2")
    assert verb(snapshots, tmp_path / "out", *options) == 0
    first = (tmp_path / "out" / "metrics.json").read_bytes()
    image = tmp_path / "out" / "lengths" / "0.05" / "images" / "000000.png"
    kept = image.stat().st_mtime_ns
    assert verb(snapshots, tmp_path / "out", *options) == 0
    assert image.stat().st_mtime_ns == kept
    assert (tmp_path / "out" / "metrics.json").read_bytes() == first


def test_lengths_take_snapshots(run, tmp_path, capsys):
    assert verb(run, tmp_path, "--ema_lengths=0.05:0.1:3") == 2
    assert "ema.snapshot_every" in capsys.readouterr().err
    assert verb(run, tmp_path, "--ema_lengths=0.05:0.5:3") == 2
    assert "LOW:HIGH:COUNT" in capsys.readouterr().err


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIPModel of transformers: (folder, model)."""
    pytest.importorskip("torch")
    from tests.evaluation.test_clip_tower import CASES, make_folder

    return make_folder(tmp_path_factory.mktemp("clip"), **CASES["gelu"])


def test_clip_score_is_that_of_transformers(run, whole, clip, tmp_path):
    import torch

    from sdjax.data.text.tokenizer import Tokenizer
    from tests.evaluation.test_clip_tower import pillow_pixels

    folder, model = clip
    options = (f"--images={whole / 'images'}", f"--clip={folder}", "--metrics=kid")
    assert verb(run, tmp_path, *options) == 2  # kid takes Inception
    options = (*options[:2], "--metrics=clip_score,cmmd,recall")
    assert verb(run, tmp_path, *options) == 0
    rows = [json.loads(line) for line in (whole / "images" / "metadata.jsonl").open()]
    images = np.stack([Image.open(whole / "images" / row["file_name"]) for row in rows])
    tokens = Tokenizer.load(folder, context_length=12).encode([row["text"] for row in rows])
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(tokens).long(), pixel_values=pillow_pixels(folder, images)
        )
    cosines = (out.image_embeds * out.text_embeds).sum(1).clamp(min=0)
    found = metrics(tmp_path)
    assert found["metrics"]["clip_score"]["value"] == pytest.approx(
        100 * float(cosines.mean()), rel=1e-3
    )
    assert found["metrics"]["cmmd"]["value"] > 0
    assert found["metrics"]["recall"]["features"] == found["settings"]["towers"]["clip"]["name"] + (
        " images"
    )
    assert list((run / "evaluations" / "references").glob("clip*.npz"))


def test_an_audit_draws_prompts_of_its_own(run, clip, tmp_path, capsys):
    file = tmp_path / "audit.yaml"
    file.write_text(
        "prompts: [a red circle, a blue square]\n"
        "pictures_per_prompt: 3\n"
        "attributes: {colour: {red: [a red circle], blue: [a blue square]}}\n"
    )
    assert verb(run, tmp_path / "out", f"--audit={file}") == 2
    assert "--clip" in capsys.readouterr().err
    assert verb(run, tmp_path / "out", f"--audit={file}", f"--clip={clip[0]}") == 0
    assert "all prompts" in capsys.readouterr().out
    found = metrics(tmp_path / "out")
    names = ("difference", "ratio", "distance")
    assert set(found["metrics"]) == {f"audit/colour/{name}" for name in names}
    assert sum(found["audit"]["attributes"]["colour"]["all"]["counts"]) == 6
    assert len(list((tmp_path / "out" / "audit").glob("*.png"))) == 6
    assert not (tmp_path / "out" / "images").exists()


@pytest.mark.slow
def test_fid_is_that_of_pytorch_fid_on_the_same_folders(run, whole, inception, tmp_path):
    """The whole way: weights, resize, network, moments, distance. Random weights."""
    network, file = inception
    from pytorch_fid.fid_score import calculate_activation_statistics

    from tests.evaluation.pytorch_fid_distance import calculate_frechet_distance

    data = tmp_path / "data"
    for split in ("train", "test"):
        data.joinpath(split).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(8):
        coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC)
        for split in ("train", "test"):
            image.save(data / split / f"{i}.png")
            data.joinpath(split, f"{i}.txt").write_text(f"picture {i}")
    options = [f"--images={whole / 'images'}", f"--output={tmp_path / 'out'}", f"--dataset={data}",
               f"--data_dir={tmp_path / 'tfds'}", f"--inception={file}"]  # fmt: skip
    assert evaluate.main([*options, "--metrics=fid", "--batch_size=4"]) == 0
    moments = []
    for folder in (whole / "images", data / "test"):
        files = sorted(folder.glob("*.png"))
        moments += calculate_activation_statistics(files, network, batch_size=4)
    want = calculate_frechet_distance(*moments)
    assert metrics(tmp_path / "out")["metrics"]["fid"]["value"] == pytest.approx(want, rel=1e-3)


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """pytorch-fid's network with random weights: (network, file)."""
    import torch

    from tests.evaluation.test_inception import state_dict

    weights = state_dict.__wrapped__() if hasattr(state_dict, "__wrapped__") else None
    module = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **kw: weights)
    torch.save(weights, tmp_path / "inception.pth", _use_new_zipfile_serialization=False)
    return module.InceptionV3([3]).eval(), tmp_path / "inception.pth"


@pytest.mark.slow
def test_killed_on_four_devices_it_goes_on(run, whole, tmp_path):
    """SIGKILL after some pictures; and four devices draw what one does."""
    options = [a for a in OPTIONS if "batch" not in a] + ["--batch_size=4", "--metrics=fidelity"]
    env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
                        "--xla_force_host_platform_device_count=4"}  # fmt: skip

    def start(output):
        command = [sys.executable, "-m", "sdjax.evaluate", f"--model={run}", f"--output={output}"]
        return subprocess.Popen([*command, *options], env=env)

    assert start(tmp_path / "a").wait(300) == 0
    process = start(tmp_path / "b")
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "b").glob("images/*.png"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = len(list((tmp_path / "b").glob("images/*.png")))
    assert 3 <= before < 12 or not (tmp_path / "b" / "metrics.json").exists()
    assert start(tmp_path / "b").wait(300) == 0
    same = (tmp_path / "a" / "metrics.json", tmp_path / "b" / "metrics.json")
    assert same[0].read_bytes() == same[1].read_bytes()
    for i in range(12):
        name = f"images/{i:06d}.png"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        ours, alone = (np.asarray(Image.open(p / name), int) for p in (tmp_path / "a", whole))
        assert np.abs(ours - alone).max() <= 1


def test_a_model_is_compared_with_others_on_the_same_pictures(run, pipeline_folder, tmp_path):
    """Against itself nothing wins and nothing moves; experts equal to it are it."""
    few = ("--num_samples=5", "--batch_size=5", "--features=pixels", "--resamples=20")
    few += ("--metrics=fidelity,memorised",)
    experts = (f"--expert={run}:0:0.5", f"--expert={run}:0.5:1")
    first, second = tmp_path / "first", tmp_path / "second"
    assert verb(run, first, *few, f"--model={run}") == 0  # the mean of a model and itself
    assert metrics(first)["averaged_with"] == [str(run)]
    assert verb(run, second, *few, *experts, f"--against={run}", f"--against={first}") == 0
    assert metrics(second)["experts"] == [f"{run}:0:0.5", f"{run}:0.5:1"]
    found = json.loads((second / "comparison.json").read_text())
    assert found.keys() == {str(run), str(first)}
    alone = found[str(run)]
    assert {"fidelity_exact", "object_width", "contrast"} & alone["win_rate"].keys()
    for rate in alone["win_rate"].values():
        assert rate["value"] == 0.5 and rate["wins"] == rate["losses"] == 0
    assert {drift["difference"]["value"] for drift in alone["drift"].values()} == {0.0}
    assert alone["notes"] == []
    assert "memorised" in alone["drift"]
    files = sorted((second / "images").glob("*.png"))
    (other,) = (second / "against").iterdir()
    for file in files:
        same = other / "images" / file.name
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(same)))


@pytest.mark.parametrize("options, words", [
    (["--expert=RUN:0:0.5"], "no expert is for the noise levels 0.5 to 1"),
    (["--expert=RUN:0:1", "--model=RUN"], "--expert does not go with a second --model"),
    (["--expert=RUN:0:1", "--metrics=validation_loss"], "alone, for its objective"),
    (["--against=RUN", "--metrics=validation_loss"], "compares pictures, and none are drawn"),
])  # fmt: skip
def test_members_that_do_not_go_together_are_refused(run, tmp_path, capsys, options, words):
    given = [option.replace("RUN", str(run)) for option in options]
    assert verb(run, tmp_path / "out", *given, "--num_samples=4") == 2
    assert words in capsys.readouterr().err
