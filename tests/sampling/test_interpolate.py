"""Between pictures: great circles as scipy draws them, ends to the bit, middles as torch's."""

import dataclasses
import types

import numpy as np
import pytest
from PIL import Image, ImageSequence

from sdjax import sample
from sdjax.diffusion.samplers import SamplerConfig
from sdjax.diffusion.schedules import ScheduleConfig
from sdjax.errors import UserError
from sdjax.families.family import Model
from sdjax.families.sd import SD
from sdjax.sampling.generate import Drawing, initial_latents
from sdjax.sampling.interpolate import Between, plan_ways, slerp
from sdjax.sampling.request import SamplingRequest

PROMPTS = ["a red circle", "a green star and a small red circle"]
SETTINGS = ["--prompts", *PROMPTS, "--negative_prompt=a blue square", "--guidance=4", "--steps=3",
            "--height=16", "--width=16"]  # fmt: skip


def draw(folder, output, *options):
    return sample.main([f"--model={folder}", f"--output={output}", *SETTINGS, *options])


def picture(path):
    return np.asarray(Image.open(path), np.float32) / 255


@pytest.fixture(scope="module")
def plain(pipeline_folder, tmp_path_factory):
    """Folders of plain pictures with seed 0 and with seed 5."""
    folders = [tmp_path_factory.mktemp(f"seed{seed}") for seed in (0, 5)]
    assert draw(pipeline_folder, folders[0]) == 0
    assert draw(pipeline_folder, folders[1], "--seed=5") == 0
    return types.SimpleNamespace(zero=folders[0], five=folders[1])


def test_slerp_is_scipys():
    from scipy.spatial import geometric_slerp

    rng = np.random.default_rng(0)
    a, b = (x / np.linalg.norm(x) for x in rng.normal(size=(2, 60)))
    for weight in (0.0, 0.2, 0.5, 0.9, 1.0):
        want = geometric_slerp(a, b, weight)
        ours = slerp(a.reshape(3, 4, 5), b.reshape(3, 4, 5), weight)
        assert ours.dtype == np.float32 and np.abs(ours.ravel() - want).max() < 1e-7


def test_slerp_meets_its_ends_and_keeps_the_length_of_noise():
    a, b = np.random.default_rng(0).normal(size=(2, 64, 64, 4)).astype(np.float32)
    assert np.array_equal(slerp(a, b, 0.0), a) and np.array_equal(slerp(a, b, 1.0), b)
    assert slerp(a, b, 0.5).std() == pytest.approx(1.0, abs=0.02)
    assert (a + b).std() / 2 < 0.75  # a straight line's
    # Parallel: no angle to divide by.
    assert np.allclose(slerp(a, a, 0.3), a, atol=1e-7)
    assert np.allclose(slerp(a, -a, 0.25), 0.5 * a, atol=1e-6)


def test_from_prompt_to_prompt(torch_pipeline, pipeline_folder, plain, tmp_path):
    import torch

    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "latents.npy", noise)
    options = ["--interpolate=3", f"--latents={tmp_path / 'latents.npy'}"]
    assert draw(pipeline_folder, tmp_path, *options) == 0
    embeds, negative = torch_pipeline.encode_prompt(
        PROMPTS, "cpu", 1, True, negative_prompt=["a blue square"] * 2
    )
    for k, weight in enumerate((0.25, 0.5, 0.75), 1):
        want = torch_pipeline(
            prompt_embeds=torch.lerp(embeds[:1], embeds[1:], weight),
            negative_prompt_embeds=negative[:1],
            height=16,
            width=16,
            num_inference_steps=3,
            guidance_scale=4.0,
            latents=torch.from_numpy(slerp(noise[:1], noise[1:], weight)),
            output_type="np",
        ).images[0]
        file = tmp_path / f"00000-between-{k:02d}.png"
        assert np.abs(picture(file) - want).max() < 0.01
        assert Image.open(file).text["weight"] == f"{weight:g}"
    assert not (tmp_path / "00001-way.png").exists()
    with Image.open(tmp_path / "00000-way.webp") as animation:
        frames = [np.asarray(f.convert("RGB"))[::16, ::16]
                  for f in ImageSequence.Iterator(animation)]  # fmt: skip
    ends = [np.asarray(Image.open(tmp_path / f"{i:05d}.png")) for i in range(2)]
    assert len(frames) == 5
    assert np.array_equal(frames[0], ends[0]) and np.array_equal(frames[-1], ends[1])


def test_both_ends_are_the_plain_pictures_to_the_bit(pipeline_folder, plain, tmp_path):
    assert draw(pipeline_folder, tmp_path, "--interpolate=1", "--interpolate_seeds=5") == 0
    for i in range(2):
        for ours, theirs in ((f"{i:05d}.png", plain.zero), (f"{i:05d}-seed-5.png", plain.five)):
            want = Image.open(theirs / f"{i:05d}.png")
            assert np.array_equal(Image.open(tmp_path / ours), want)
        strip = np.asarray(Image.open(tmp_path / f"{i:05d}-way.png"))
        tiles = [strip[6 : 6 + 128 : 8, x : x + 128 : 8] for x in (6, 6 + 134, 6 + 2 * 134)]
        names = (f"{i:05d}.png", f"{i:05d}-between-01.png", f"{i:05d}-seed-5.png")
        for tile, name in zip(tiles, names, strict=True):
            assert np.array_equal(tile, Image.open(tmp_path / name))
    noise = [initial_latents(seed, np.arange(2), (8, 8, 4)) for seed in (0, 5)]
    middle = [slerp(np.asarray(a), np.asarray(b), 0.5) for a, b in zip(*noise, strict=True)]
    np.save(tmp_path / "latents.npy", np.stack(middle))
    assert draw(pipeline_folder, tmp_path / "x", f"--latents={tmp_path / 'latents.npy'}") == 0
    for i in range(2):
        ours = picture(tmp_path / f"{i:05d}-between-01.png")
        assert np.abs(ours - picture(tmp_path / "x" / f"{i:05d}.png")).max() <= 1.001 / 255
    text = Image.open(tmp_path / "00001-seed-5.png").text
    assert text["seed"] == "5" and text["prompt"] == PROMPTS[1]


def test_a_way_between_equal_prompts_with_the_same_noise_goes_nowhere(pipeline_folder, tmp_path):
    options = ["--interpolate=3", "--same_noise", "--animation=png"]
    twice = ["--prompts", "a red circle", "a red circle", *SETTINGS[3:], *options]
    assert sample.main([f"--model={pipeline_folder}", f"--output={tmp_path}", *twice]) == 0
    pictures = [picture(file) for file in sorted(tmp_path.glob("0000?*.png"))
                if "way" not in file.name]  # fmt: skip
    assert len(pictures) == 5
    assert max(np.abs(p - pictures[0]).max() for p in pictures) <= 1.001 / 255
    assert (tmp_path / "00000-way-animated.png").exists()


def test_noise_of_every_step_tears_a_way_unless_it_is_the_same(tiny_request):
    for prompts_differ_alone, seed in ((True, None), (False, None), (True, 3)):
        request = tiny_request("ddpm", np.zeros(2) if prompts_differ_alone else np.arange(2))
        if prompts_differ_alone and seed is None:
            assert [len(way) for way in plan_ways(request, 4, seed)] == [4]
        else:
            with pytest.raises(UserError, match="ddpm.*adds noise"):
                plan_ways(request, 4, seed)
    ways = plan_ways(tiny_request("ddim", np.arange(2)), 1, 3)
    assert ways == [[Between(0, 0, 0.5)], [Between(1, 1, 0.5)]]


@pytest.fixture
def tiny_request():
    """Makes a request for two pictures with nothing in it that draws."""
    blank = {f.name: None for f in dataclasses.fields(SamplingRequest)}

    def make(sampler, positions):
        drawing = Drawing(SamplerConfig(sampler, steps=3))
        model = Model(SD, {}, schedule=ScheduleConfig())
        given = dict(texts=PROMPTS, drawing=drawing, positions=positions, seed=0, model=model,
                     shape=(8, 8, 4))  # fmt: skip
        return SamplingRequest(**{**blank, **given})

    return make


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompts=a", "--interpolate=3"], ["one alone", "--interpolate_seeds"]),
        (["--prompts=a", "--interpolate=0", "--interpolate_seeds=1"], ["--interpolate=0"]),
        (["--prompts=a", "--interpolate_seeds=1"], ["--interpolate_seeds", "give that too"]),
        (["--prompts=a", "--interpolate=1", "--interpolate_seeds=-1"], ["=-1", "0 or more"]),
        (["--prompts", "a", "b", "--interpolate=1", "--sampler=ddpm"], ["ddpm", "--same_noise"]),
        (["--prompts=a", "--interpolate=1", "--interpolate_seeds=1", "--sampler=ddpm"],
         ["ddpm", "adds noise"]),
        (["--prompts=a", "--explain_steps=0:1"], ["--explain_steps", "give that too"]),
        (["--prompts=a", "--explain", "--explain_steps=1:0"], ["1:0", "FIRST < LAST"]),
        (["--prompts", "a", "!?", "--explain"], ["prompt 1", "no words"]),
        (["--prompts=a", "--trajectory=9", "--steps=3"], ["--trajectory=9", "2 to 3"]),
        (["--prompts=a", "--same_noise", "--latents=x.npy"], ["--same_noise", "--latents"]),
    ],
)  # fmt: skip
def test_wrong_options_are_explained(pipeline_folder, tmp_path, capsys, options, words):
    assert sample.main([f"--model={pipeline_folder}", f"--output={tmp_path}", *options]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())
