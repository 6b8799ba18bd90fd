"""The wrong prediction type of loaded weights: seen before the first step, and corrected."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints.assemble import assemble
from sdjax.checkpoints.reading import read_any
from sdjax.config import resolve
from sdjax.config_model import method_of_run
from sdjax.convert import convert
from sdjax.diffusion.losses import example_keys
from sdjax.diffusion.schedules import make_schedule, schedule_at
from sdjax.formats.diffusers_folder import read_diffusers
from sdjax.formats.single_file import Hints
from sdjax.formats.single_file_writer import write_single_file
from sdjax.methods.denoise import LatentDiffusion
from sdjax.models import weights
from sdjax.models.config import ConfigError
from sdjax.train import loop, prediction_check
from tests.train.test_loop import rows

# Two steps: optimisations take longer than they save.
FAST = ("xla_backend_optimization_level=0",)


def train(config, workdir, **changes):
    config.update_from_flattened_dict(changes)
    return loop.run(resolve(config), str(workdir))


@pytest.fixture
def config(tiny_config, pipeline_folder):
    """Two steps from a folder of SD1's kind, of 16 px."""
    c = tiny_config
    c.update(init_from=str(pipeline_folder), vae_from="")
    c.train.update(steps=2, log_every=1, checkpoint_every=2, sample_every=0)
    c.sample.count = 1
    c.sample.sampler.steps = 2
    c.train.xla_options = FAST
    return c


# ---- the errors of both ----


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_network_that_is_right_for_one_type_has_no_error_for_it(kind, config, monkeypatch):
    """An oracle in the network's place: it knows x0, and with it eps and v at every xt."""
    assembled = assemble(resolve(config))
    full = dataclasses.replace(resolve(config), model=assembled.config.model)
    method = method_of_run(full, assembled.tokenizers)
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 4)), jnp.float32)
    schedule = make_schedule(full.schedule)

    def oracle(xt, t, context, key=None):
        alpha, sigma = (s.reshape(-1, 1, 1, 1) for s in schedule_at(schedule, t))
        eps = (xt - alpha * x0) / sigma
        return eps if kind == "epsilon" else alpha * eps - sigma * x0

    monkeypatch.setattr(LatentDiffusion, "denoiser", lambda self, *args: oracle)
    monkeypatch.setattr(LatentDiffusion, "latents", lambda self, *args: x0)
    monkeypatch.setattr(LatentDiffusion, "context", lambda self, *args, **kw: None)
    keys = example_keys(jax.random.key(0), jnp.arange(2))
    errors = method.predictions({}, {}, keys, method.timesteps(4))
    assert errors.keys() == {"epsilon", "v_prediction"}
    other = "epsilon" if kind == "v_prediction" else "v_prediction"
    assert errors[kind] < 1e-5 and errors[other] > 0.5
    found = {name: float(value) for name, value in errors.items()}
    assert prediction_check.warning(kind, found) == ""
    line = prediction_check.warning(other, found)
    assert f"{found[other]:.4f}" in line and f"config.init_prediction_type={kind!r}" in line


def test_equal_errors_and_nan_are_no_reason_to_warn():
    assert prediction_check.warning("epsilon", {"epsilon": 1.0, "v_prediction": 0.6}) == ""
    nan = float("nan")
    assert prediction_check.warning("epsilon", {"epsilon": nan, "v_prediction": nan}) == ""
    assert "0.4000" in prediction_check.warning("epsilon", {"epsilon": 1.0, "v_prediction": 0.4})


@pytest.mark.slow
def test_the_check_changes_no_number_and_is_off_from_nothing(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prediction_check, "warning", lambda kind, errors: f"checked {kind}")
    assert train(config, tmp_path / "checked") == loop.DONE
    assert capsys.readouterr().out.count("checked epsilon") == 1
    monkeypatch.setattr(prediction_check, "warn", lambda *args: None)
    assert train(config, tmp_path / "plain") == loop.DONE
    for ours, theirs in zip(
        rows(tmp_path / "checked").values(), rows(tmp_path / "plain").values(), strict=True
    ):
        assert ours["train/loss"] == theirs["train/loss"]


def test_nothing_is_compared_where_the_denoiser_is_new(tiny_config, monkeypatch):
    assembled = assemble(resolve(tiny_config))
    assert "vae" in assembled.sources
    method = method_of_run(assembled.config, assembled.tokenizers)
    monkeypatch.setattr(prediction_check, "_errors", lambda *args: pytest.fail("compared"))
    prediction_check.warn(assembled.config, assembled, method, {}, {}, None)


# ---- what init_from says wrong ----


def test_a_recipe_corrects_what_a_folder_says(config):
    assert assemble(resolve(config)).config.objective.prediction_type == "epsilon"
    config.update(init_prediction_type="v_prediction", init_zero_terminal_snr=True)
    found = assemble(resolve(config))
    assert found.config.objective.prediction_type == "v_prediction"
    assert found.config.schedule.zero_terminal_snr
    assert any("objective.prediction_type = 'v_prediction'" in note for note in found.notes)
    config.init_from = ""
    with pytest.raises(ConfigError, match="correct what init_from says, which is empty"):
        assemble(resolve(config))
    config.init_prediction_type = "flow"
    with pytest.raises(ValueError, match="init_prediction_type is 'flow'; expected 'epsilon'"):
        resolve(config)


# ---- one file in, one file out ----


def xl_recipe(shapes_dir):
    path = Path(__file__).parents[2] / "configs" / "sdxl_tiny.py"
    spec = importlib.util.spec_from_file_location("sdxl_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config()
    c.vae_from = ""
    c.data.update(
        data_dir=str(shapes_dir), resolution=16, batch_size=4, shapes_train=40, shapes_test=8,
        shapes_pairs=0.35, crop="random", threads=1,
    )  # fmt: skip
    c.train.update(steps=2, log_every=1, checkpoint_every=2, sample_every=0)
    c.sample.update(count=1)
    c.sample.sampler.steps = 2
    c.train.xla_options = FAST
    return c


def marked_file(xl_folder, file, marks):
    """Write the folder as a file of another program's, with these marks."""
    write_single_file(file, read_diffusers(xl_folder))
    tensors = weights.load_file(file)
    weights.save_file({**tensors, **{name: np.zeros(0, np.float32) for name in marks}}, file)


@pytest.mark.parametrize("marks", [("v_pred", "ztsnr"), ("v_pred",), ()])
def test_marks_and_options_win_over_the_folder_of_the_shapes(marks, xl_folder, tmp_path):
    """The folder, of the same small shape, says epsilon."""
    file = tmp_path / "in.safetensors"
    marked_file(xl_folder, file, marks)
    like = read_diffusers(xl_folder)
    read = read_any(file, hints=Hints(like=like))
    assert read.prediction_type == ("v_prediction" if "v_pred" in marks else "epsilon")
    assert read.schedule.zero_terminal_snr == ("ztsnr" in marks)
    convert(
        file, tmp_path / "out.safetensors", config_from=str(xl_folder),
        prediction_type="v_prediction", zero_terminal_snr=True,
    )  # fmt: skip
    assert {"v_pred", "ztsnr"} <= set(weights.read_header(tmp_path / "out.safetensors")[0])


@pytest.mark.slow
def test_a_v_prediction_file_is_trained_and_written_with_its_marks(xl_folder, shapes_dir, tmp_path):
    file = tmp_path / "in.safetensors"
    marked_file(xl_folder, file, ("v_pred", "ztsnr"))
    convert(file, tmp_path / "start", config_from=str(xl_folder))
    config = xl_recipe(shapes_dir)
    config.init_from = str(tmp_path / "start")
    assert train(config, tmp_path / "run") == loop.DONE
    convert(tmp_path / "run", tmp_path / "out.safetensors")
    ours, theirs = (weights.read_header(tmp_path / f"{n}.safetensors")[0] for n in ("out", "in"))
    assert ours.keys() == theirs.keys() and {"v_pred", "ztsnr"} <= ours.keys()
    trained = read_any(tmp_path / "run")
    assert trained.prediction_type == "v_prediction" and trained.schedule.zero_terminal_snr
