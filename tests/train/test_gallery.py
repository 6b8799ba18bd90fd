"""Grids while training: which weights, guided or not, and the strips over the steps."""

import numpy as np
import pytest
from PIL import Image

from sdjax.config import resolve
from sdjax.train import loop


def picture(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def drawing(tiny_config):
    tiny_config.train.update(steps=4, sample_every=2, checkpoint_every=4)
    return tiny_config


def test_raw_and_averaged_guided_and_not(drawing, tmp_path):
    drawing.sample.compare = True
    assert loop.run(resolve(drawing), str(tmp_path)) == loop.DONE
    variants = ("", "-raw-guided", "-raw-unguided", "-warmup-0.9-unguided")
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {f"{head}{v}.png" for head in ("00000002", "00000004", "strip")
                     for v in variants}  # fmt: skip
    drawn = [picture(tmp_path / "samples" / f"00000004{v}.png") for v in variants]
    for i, one in enumerate(drawn):
        assert all(not np.array_equal(one, other) for other in drawn[i + 1 :])
    for variant in variants:
        assert Image.open(tmp_path / "samples" / f"strip{variant}.png").text["steps"] == "2,4"


@pytest.mark.slow
def test_a_model_without_captions_is_drawn_without(drawing, tmp_path):
    drawing.objective.caption_dropout = 1.0
    drawing.sample.update(compare=True, count=3)
    assert loop.run(resolve(drawing), str(tmp_path)) == loop.DONE
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {f"{head}{v}.png" for head in ("00000002", "00000004", "strip")
                     for v in ("", "-raw")}  # fmt: skip
    sheet = Image.open(tmp_path / "samples" / "00000004.png")
    assert sheet.text["prompts"] == "\n\n"  # three times none
    strip = picture(tmp_path / "samples" / "strip.png")
    first, second = strip[16:112, 100:196], strip[116:212, 100:196]
    assert not np.array_equal(first, second)  # each has noise of its own
