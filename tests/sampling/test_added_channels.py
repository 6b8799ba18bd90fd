"""Which channels besides the noisy latents drawing knows: a fact of each family."""

import dataclasses

import numpy as np
import pytest

from sdjax.errors import UserError
from sdjax.families import flux, sd, sd3, sdxl
from sdjax.families.family import EDITS, FILLS, FOLLOWS
from sdjax.families.registry import FAMILIES, model_of
from sdjax.sampling.start import reading_of, reads_picture


def of(family, preset="base", **fields):
    """A model of a family whose denoiser has other channels."""
    config = FAMILIES[family].presets[preset]
    name = FAMILIES[family].denoiser
    denoiser = dataclasses.replace(getattr(config, name), **fields)
    return model_of(dataclasses.replace(config, **{name: denoiser}))


@pytest.mark.parametrize(
    "model, task",
    [
        (of("sd"), ""),
        (of("sd", in_channels=9), FILLS),  # runwayml/stable-diffusion-inpainting
        (of("sd", in_channels=8), EDITS),  # timbrooks/instruct-pix2pix
        (of("sdxl", in_channels=9), FILLS),
        (of("sd3"), ""),
        (of("flux"), ""),
        (of("flux", "fill"), FILLS),
        (of("flux", "control"), FOLLOWS),
        (of("flux", "kontext"), EDITS),
    ],
)
def test_channels_say_what_a_denoiser_does_with_a_picture(model, task):
    assert reads_picture(model) == task


@pytest.mark.parametrize(
    "model, message",
    [
        (of("sd", in_channels=7), "unet reads 3 channels .*drawing knows .*5 to inpaint"),
        (of("sd3", in_channels=33), "transformer reads 17 channels .*drawing knows none"),
        (
            of("flux", in_channels=96, out_channels=64),
            "transformer reads 8 channels .*drawing knows 80 to inpaint or 16 to condition",
        ),
    ],
)
def test_other_channels_are_refused_with_those_that_are_known(model, message):
    with pytest.raises(UserError, match=message):
        reads_picture(model)


def test_channels_lie_in_the_order_of_the_pipelines():
    mask = np.zeros((1, 16, 8, 1), np.float32)
    mask[0, 9, 3] = 1.0  # of the second latent, row 1 and column 3 of its pixels
    hidden = np.full((1, 2, 1, 4), 7.0, np.float32)
    made = np.asarray(sd.READINGS[FILLS].make(mask, hidden))
    assert made.shape == (1, 2, 1, 5) and made[0, 0, 0].tolist() == [0.0, 7.0, 7.0, 7.0, 7.0]
    assert sdxl.SDXL.readings is sd.READINGS and not sd3.SD3.readings
    made = np.asarray(flux.READINGS[FILLS].make(mask, hidden))
    assert made.shape == (1, 2, 1, 4 + 64) and (made[..., :4] == 7.0).all()
    assert made[0, 1, 0, 4:].nonzero()[0].tolist() == [1 * 8 + 3] and not made[0, 0, 0, 4:].any()


def test_a_reference_is_read_where_the_model_is_kontext():
    assert reading_of(of("flux")) is None
    reading = reading_of(of("flux", "kontext"))
    assert reading is not None and (reading.field, reading.scaled) == ("reference", True)
    assert not reading.guided and reading_of(of("sd", in_channels=8)).guided
