"""Validation: fixed examples, noise and timesteps; the best checkpoint; early stopping."""

import json

import jax
import numpy as np
import pytest

from sdjax import main
from sdjax.checkpoints import checkpoint
from sdjax.checkpoints.assemble import assemble
from sdjax.config import resolve
from sdjax.config_model import method_of_run
from sdjax.data.fixed import FixedExamples
from sdjax.families.registry import model_of
from sdjax.models.config import ConfigError
from sdjax.parallel.mesh import make_mesh
from sdjax.train import loop
from sdjax.train.selection import Selection
from sdjax.train.validation import Validator, summary
from sdjax.validation_config import ValidationConfig
from tests.conftest import make_tiny_config, small_autoencoder


@pytest.fixture
def validating(tiny_config):
    tiny_config.validation.update(every=2, examples=6, train_examples=4, rows=4, strata=2)
    return tiny_config


def lines(workdir, prefix):
    """{step: what starts so} of metrics.jsonl."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        chosen = {k: v for k, v in row.items() if k.startswith(prefix)}
        if chosen:
            found[row["step"]] = chosen
    return found


@pytest.fixture(scope="module")
def assembled(tiny_vae, shapes_dir):
    config = make_tiny_config(tiny_vae, shapes_dir)
    config.validation.rows = 4
    return assemble(resolve(config))


@pytest.fixture(scope="module")
def validator(assembled):
    config = assembled.config
    method = method_of_run(config, assembled.tokenizers)
    mesh = make_mesh(config.mesh)
    params = {**jax.jit(method.init)(jax.random.key(3)), **assembled.params}
    made = Validator(config, method, assembled.tokenizers, mesh, split="test", count=6)
    return made, method, params, assembled


def test_losses_are_those_of_the_training_objective(validator):
    """The same numbers from `denoising_loss`'s parts, one example and timestep at a time."""
    from sdjax.data import transforms
    from sdjax.diffusion.losses import fold_keys, normal_like
    from sdjax.diffusion.schedules import make_schedule, schedule_at
    from sdjax.families.conditioning import make_conditioner
    from sdjax.methods.denoise import LATENTS, STRATA
    from sdjax.models import weights
    from sdjax.models.params import component
    from sdjax.models.unet import UNet
    from sdjax.models.vae import VAE, sample_moments, scale_latents
    from sdjax.train.validation import _keys

    made, _, params, assembled = validator
    config = assembled.config
    found = made.losses(params)
    assert found.shape == (6, 8) and found.dtype == np.float32
    np.testing.assert_array_equal(made.timesteps, [62, 187, 312, 437, 562, 687, 812, 937])

    source = made.examples._sources[0]
    names = made.examples.names()
    vae = weights.merge(weights.abstract(VAE, config.model.vae)[0], component(params, "vae"))
    unet = weights.merge(weights.abstract(UNet, config.model.unet)[0], component(params, "unet"))
    conditioner = make_conditioner(model_of(config.model), assembled.tokenizers)
    tables = make_schedule(config.schedule)
    for row, stratum in ((0, 0), (1, 3), (5, 7)):
        example = source[int(names[row, 1])]
        image = transforms.prepare(
            example["image"], np.random.default_rng(0), height=16, width=16, crop="center",
            flip=False,
        ).image  # fmt: skip
        keys = _keys(names[row : row + 1])
        moments = vae.encode(image[None])
        noise = normal_like(fold_keys(keys, LATENTS), moments[..., :4])
        x0 = scale_latents(sample_moments(moments, noise), config.model.vae)
        tokens = {f: t.encode([example["text"]]) for f, t in assembled.tokenizers.items()}
        context = conditioner(params, tokens, target=(16, 16))
        t = made.timesteps[stratum : stratum + 1]
        eps = normal_like(fold_keys(fold_keys(keys, STRATA + stratum), 0), x0)
        alpha, sigma = schedule_at(tables, t)
        xt = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
        expected = np.mean(np.square(np.asarray(unet(xt, t, context)) - eps))
        np.testing.assert_allclose(found[row, stratum], expected, rtol=2e-5)


def test_an_examples_loss_does_not_depend_on_how_many_there_are(validator):
    made, method, params, assembled = validator
    fewer = Validator(
        assembled.config, method, assembled.tokenizers, make_mesh(assembled.config.mesh),
        split="test", count=3,
    )  # fmt: skip
    np.testing.assert_array_equal(fewer.examples.names(), made.examples.names()[:3])
    np.testing.assert_allclose(fewer.losses(params), made.losses(params)[:3], rtol=1e-6)


def test_the_choice_is_fixed_and_has_no_example_twice(assembled):
    config = assembled.config
    choose = lambda count, rows: FixedExamples(  # noqa: E731
        config.data, assembled.tokenizers, split="train", count=count, rows=rows
    )
    one, other = choose(20, 8).names(), choose(20, 3).names()
    np.testing.assert_array_equal(one, other)
    assert len({tuple(name) for name in one}) == 20
    assert sorted(one[:, 1]) != list(range(20))  # spread over the split, not its beginning
    assert len(choose(1000, 8)) == 40


def test_an_unknown_split_is_an_error_at_the_start(validating, tmp_path):
    validating.data.eval_split = "nothing"
    validating.sample.prompts = ("a red circle",)
    with pytest.raises(ValueError, match="nothing"):
        loop.run(resolve(validating), str(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()  # before anything is compiled


def test_maxima_are_those_of_the_captured_network(validator):
    made, method, params, _ = validator
    found = made.maxima(params)
    logits = {path for path in found if path.endswith(("attn1", "attn2"))}
    assert logits and any(path.endswith("resnets.0") for path in found)
    assert all(np.isfinite(value) for value in found.values())
    # The output projection of an attention scales what comes after it, and not its own logits.
    doubled = {p: v * 2 if p.endswith("attn2.to_out.0.kernel") else v for p, v in params.items()}
    again = made.maxima(doubled)
    first = next(path for path in found if path.endswith("attn2"))
    assert again[first] == found[first] and again != found


def test_summary_is_a_mean_in_float64():
    losses = np.asarray([[1.0, 2.0], [1e8, 4.0]], np.float32)
    found = summary(losses, np.asarray([10.0, 20.0]))
    assert found == {"loss": (50000000.5 + 3.0) / 2, "loss_at": {"t0010": 50000000.5, "t0020": 3.0}}


# ---- in a run --------------------------------------------------------------------------------


def run(config, workdir, **changes):
    config.update_from_flattened_dict(changes)
    return main.train(resolve(config), str(workdir))


def test_a_run_validates_and_keeps_the_best(validating, tmp_path, capsys):
    # A checkpoint at each validation that is the best so far, and of the others only the newest.
    validating.ema.profiles = ("warmup-0.9", "power-0.05")
    changes = {"train.keep_last": 1, "train.steps": 6, "train.report": True,
               "validation.maxima_every": 3}  # fmt: skip
    assert run(validating, tmp_path, **changes) == loop.DONE
    assert sorted(lines(tmp_path, "maxima/")) == [3, 6]
    assert "validation" in (tmp_path / "report.html").read_text()
    found = lines(tmp_path, "validation")
    assert sorted(found) == [2, 4, 6]
    for weights in ("raw", "warmup-0.9", "power-0.05"):
        for group in ("validation", "validation_train"):
            values = [found[2][f"{group}/{weights}/loss_at/t{t:04d}"] for t in (250, 750)]
            assert np.isfinite([*values, found[2][f"{group}/{weights}/loss"]]).all()
    assert found[2]["validation/raw/loss"] != found[2]["validation/warmup-0.9/loss"]
    own = {step: row["validation/warmup-0.9/loss"] for step, row in found.items()}
    best = min(own, key=own.get)
    assert found[6]["validation/best_step"] == best
    assert found[6]["validation/best"] == own[best]
    assert set(checkpoint.all_steps(tmp_path)) == {best, 6}
    assert f"checkpoints/{best}" in capsys.readouterr().out


def test_it_stops_when_patience_ends_and_the_same_command_does_not_go_on(validating, tmp_path):
    """A high learning rate breaks the model: the best is an early step."""
    small_autoencoder(validating)
    validating.optim.learning_rate = 0.3
    validating.validation.metric = "validation/raw/loss"
    changes = {"train.steps": 40, "validation.patience": 2, "train.checkpoint_every": 100}
    assert run(validating, tmp_path, **changes) == loop.DONE
    found = lines(tmp_path, "validation/")
    last = max(found)
    own = {step: row["validation/raw/loss"] for step, row in found.items()}
    best = min(own, key=own.get)
    assert last < 40 and last == best + 4  # two validations, two steps each
    assert set(checkpoint.all_steps(tmp_path)) >= {best, last}
    trained = lines(tmp_path, "train/loss")
    assert run(validating, tmp_path) == loop.DONE
    assert lines(tmp_path, "validation/") == found and lines(tmp_path, "train/loss") == trained
    # Broken off between the best step and the end, it stops where the unbroken run does.
    assert run(validating, tmp_path / "b", **{"train.steps": last - 2}) == loop.DONE
    assert run(validating, tmp_path / "b", **{"train.steps": 40}) == loop.DONE
    assert lines(tmp_path / "b", "validation/") == found


# ---- selection -------------------------------------------------------------------------------


def test_selection():
    config = ValidationConfig(patience=2, metric="a", mode="max")
    selection = Selection(config)
    assert [selection.observe(i, {"a": v}) for i, v in enumerate([1.0, 3.0, float("nan")])] == [
        True, True, False,
    ]  # fmt: skip
    assert (selection.value, selection.step, selection.stops) == (3.0, 1, False)
    resumed = Selection(config)
    resumed.set_state(json.loads(json.dumps(selection.get_state())))
    assert not resumed.observe(3, {"a": 3.0}) and resumed.stops  # as good is not better
    other = Selection(config, "b")
    other.set_state(selection.get_state())
    assert other.step is None
    with pytest.raises(ConfigError, match=r"'a'; a validation gives b"):
        selection.observe(4, {"b": 1.0})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metric": "validation/rwa/loss"}, "'validation/rwa/loss'; a validation gives .*raw/loss"),
        ({"metrics": ("fidelty",)}, "has fidelty; expected some of fid"),
        ({"metrics": ("fid",)}, "config.validation.metrics.*Inception weights"),
    ],
)
def test_metrics_that_there_are_not_are_errors_at_the_start(validating, tmp_path, changes, message):
    validating.validation.update(changes)
    with pytest.raises(ConfigError, match="(?s)" + message):
        main.train(resolve(validating), str(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_best_by_a_metric_of_pictures(validating, tmp_path):
    changes = {
        "validation.metrics": ("fidelity",), "validation.num_samples": 4, "train.steps": 4,
        "validation.metric": "evaluation/fidelity_colour", "validation.mode": "max",
    }  # fmt: skip
    assert run(validating, tmp_path, **changes) == loop.DONE
    found = lines(tmp_path, "evaluation/fidelity_colour")
    values = {step: row["evaluation/fidelity_colour"] for step, row in found.items()}
    best = max(values, key=lambda step: (values[step], -step))
    assert sorted(values) == [2, 4]
    assert lines(tmp_path, "validation/best_step")[4]["validation/best_step"] == best
    written = json.loads(
        next((tmp_path / "evaluations").glob("00000004-*/metrics.json")).read_text()
    )
    assert written["step"] == 4
    assert written["metrics"]["fidelity_colour"]["value"] == values[4]


def test_patience_without_validation_is_an_error():
    with pytest.raises(ValueError, match="patience"):
        ValidationConfig(patience=2, every=0)
