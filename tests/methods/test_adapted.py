"""Adapters by the losses of inpaint and edit: on networks that read more than latents."""

import numpy as np
import pytest

from sdjax.checkpoints.adapters import with_loras
from sdjax.checkpoints.reading import read_any
from sdjax.checkpoints.widening import widened
from sdjax.config import resolve
from sdjax.config_model import blank_method
from sdjax.errors import UserError
from sdjax.formats.adapters.layers import delta
from sdjax.formats.adapters.reading import read_adapter
from sdjax.formats.diffusers_folder import write_diffusers
from sdjax.models.adapters.networks import MARK
from sdjax.train import loop
from tests.methods.runs import begun_from, broken_off
from tests.train.test_loop import assert_same_run


@pytest.fixture(scope="module")
def wide(tiny_model, tmp_path_factory):
    """A folder of a model of inpainting, with random weights."""
    model, _ = widened(read_any(tiny_model), "inpaint", name="x")
    kernel = model.params["unet.conv_in.kernel"]
    drawn = np.random.default_rng(0).normal(size=kernel.shape, scale=0.1).astype(np.float32)
    model.params["unet.conv_in.kernel"] = drawn
    folder = tmp_path_factory.mktemp("wide") / "model"
    write_diffusers(folder, model)
    return folder


def recipe(config, folder, method="inpaint_adapters", **fields):
    c = begun_from(config, folder, method)
    c.optim.groups = ()
    c.optim.learning_rate = 1e-2
    c.train.export = True
    c.method.update(rank=2, targets=("conv_in", "attn1"), **fields)
    return c


def test_a_lora_of_an_inpainting_model_trains_and_resumes_to_the_bit(tiny_config, wide, tmp_path):
    """FT-57: conv_in's factor reads nine channels."""
    c = recipe(tiny_config, wide)
    whole = tmp_path / "whole"
    assert loop.run(resolve(c), str(whole)) == loop.DONE
    broken = broken_off(whole, tmp_path / "broken", 1)
    assert loop.run(resolve(c), str(broken)) == loop.DONE
    assert_same_run(whole, broken)
    base, read = read_any(wide), read_any(whole)
    adapter = read_adapter(whole / "adapter" / "whole.safetensors", base)
    down = adapter["unet.conv_in"].factors["lora_down"]
    assert down.shape == (2, 9, 3, 3) and np.any(delta(adapter["unet.conv_in"])[:, 4:])
    for place in (whole, whole / "adapter"):
        merged = with_loras(base, [str(place)])
        for path, value in read.params.items():
            np.testing.assert_allclose(merged.params[path], value, atol=1e-6, err_msg=path)
    changed = {p for p, v in read.params.items() if np.any(v != base.params[p])}
    assert changed == {f"{path}.kernel" for path in adapter}


@pytest.mark.parametrize("method, channels", [("inpaint_adapters", 9), ("edit_adapters", 8)])
def test_the_denoiser_reads_what_the_loss_shows_it(tiny_config, method, channels):
    c = tiny_config
    c.method = {"name": method, "targets": ("conv_in",)}
    c.model.unet.in_channels = channels
    if method == "edit_adapters":
        c.data.images = ({"name": "before", "key": "copy"},)
    made = blank_method(resolve(c))
    trained = {path: v.shape for path, v in made.abstract.items() if made.trainable(path)}
    assert trained == {
        f"unet.conv_in{MARK}A": (3, 3, channels, 16), f"unet.conv_in{MARK}B": (16, 16),
    }  # fmt: skip
    c.model.unet.in_channels = 4
    with pytest.raises(UserError, match=f"method {method!r} takes 4 . {channels - 4}"):
        blank_method(resolve(c))


def test_fields_of_both_methods_are_checked(tiny_config):
    for field, value in (("kind", "ia3"), ("whole", 2.0)):
        tiny_config.method = {"name": "inpaint_adapters", field: value}
        with pytest.raises(UserError, match=f"method.{field} is {value!r}"):
            resolve(tiny_config)
