"""What the network takes a picture for, step by step, against the scheduler's own estimates."""

import types

import numpy as np
import pytest
from PIL import Image, ImageSequence

from sdjax import sample
from sdjax.errors import UserError
from sdjax.sampling.animation import animated, save_animation
from sdjax.sampling.trajectory import choose_frames

PROMPTS = ["a red circle", "a green star"]
STEPS, FRAMES = 6, 4
FACTOR = 256 // 16  # of animations, whose frames are enlarged to 256 pixels


@pytest.fixture(scope="module")
def torch_estimates(torch_pipeline):
    """(latents [2, 4, 8, 8] to start from, x0 in [0, 1] [STEPS, 2, 16, 16, 3])."""
    import torch

    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    estimates, scheduler = [], torch_pipeline.scheduler
    step = scheduler.step

    def noted(*args, **kwargs):
        kwargs["return_dict"] = True
        out = step(*args, **kwargs)
        estimates.append(out.pred_original_sample)
        return (out.prev_sample,)

    scheduler.step = noted
    try:
        torch_pipeline(
            PROMPTS, height=16, width=16, num_inference_steps=STEPS, guidance_scale=4.0,
            latents=torch.from_numpy(latents), output_type="latent",
        )  # fmt: skip
    finally:
        del scheduler.step
    vae = torch_pipeline.vae
    with torch.no_grad():
        images = [vae.decode(x / vae.config.scaling_factor).sample for x in estimates]
    found = torch.stack(images).permute(0, 1, 3, 4, 2).numpy() / 2 + 0.5
    return latents, found.clip(0, 1)


@pytest.fixture(scope="module")
def drawn(torch_estimates, pipeline_folder, tmp_path_factory):
    """The folder and the animations' frames [2, FRAMES, 16, 16, 3]."""
    folder = tmp_path_factory.mktemp("steps")
    np.save(folder / "latents.npy", torch_estimates[0])
    arguments = ["--prompts", *PROMPTS, "--guidance=4", f"--model={pipeline_folder}",
                 f"--output={folder}", f"--steps={STEPS}", f"--latents={folder / 'latents.npy'}",
                 "--height=16", "--width=16", f"--trajectory={FRAMES}"]  # fmt: skip
    assert sample.main(arguments) == 0
    return types.SimpleNamespace(
        folder=folder, frames=[read(folder / f"{i:05d}-steps.webp") for i in range(2)]
    )


def read(file):
    """Frames at their own size."""
    with Image.open(file) as image:
        frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)]
    assert all(np.array_equal(f, np.repeat(np.repeat(f[::FACTOR, ::FACTOR], FACTOR, 0), FACTOR, 1))
               for f in frames)  # fmt: skip
    return [f[::FACTOR, ::FACTOR] for f in frames]


def test_frames_are_what_the_scheduler_estimates(drawn, torch_estimates):
    for i, frames in enumerate(drawn.frames):
        assert len(frames) == FRAMES
        for frame, step in zip(frames[:-1], (0, 2, 3), strict=True):  # of 0 to 5
            # Half a level of rounding to 8 bits, and float32 over the steps.
            assert np.abs(frame / 255 - torch_estimates[1][step, i]).max() < 0.6 / 255


def test_the_last_frame_is_the_picture_to_the_bit(drawn):
    for i, frames in enumerate(drawn.frames):
        picture = np.asarray(Image.open(drawn.folder / f"{i:05d}.png"))
        assert np.array_equal(frames[-1], picture)
        assert not np.array_equal(frames[-2], picture)
        strip = np.asarray(Image.open(drawn.folder / f"{i:05d}-steps.png"))
        gap, side = 6, 128
        assert strip.shape[1] == gap + FRAMES * (side + gap)
        tile = strip[gap : gap + side : 8, gap + 3 * (side + gap) :: 8][:, :16]
        assert np.array_equal(tile, picture)


@pytest.mark.parametrize("format", ["webp", "png"])
def test_animations_are_lossless_and_rest_on_the_last_frame(tmp_path, format):
    frames = list(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8))
    file = tmp_path / animated("x", format)
    save_animation(file, frames, milliseconds=100, rest=900)
    assert all(np.array_equal(a, b) for a, b in zip(read(file), frames, strict=True))
    with Image.open(file) as image:
        assert image.format == format.upper() and image.info["loop"] == 0
        image.seek(2)
        image.load()
        assert image.info["duration"] == 900
    assert file.name == {"webp": "x.webp", "png": "x-animated.png"}[format]


def test_frames_are_spread_evenly_over_the_steps():
    assert choose_frames(None, 50).kept == (0, 7, 14, 21, 28, 35, 42)
    assert choose_frames(2, 50).kept == (0,)
    assert choose_frames(None, 3).kept == (0, 1)
    for count, evaluations in ((1, 50), (51, 50), (-1, 50), (None, 1)):
        with pytest.raises(UserError, match="--trajectory.*expected 2"):
            choose_frames(count, evaluations)
