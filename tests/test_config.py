"""The configuration: one tree, checked once, with errors that name fields."""

import importlib.util
from pathlib import Path

import pytest

from sdjax.config import Config, default, resolve, to_dict
from sdjax.models.config import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_resolves_and_says_how_to_run_it(path):
    module = load(path)
    config = module.get_config()
    if config.data.name == "image_text_folder":
        config.data.path = "somewhere"
    resolve(config)
    assert f"--config=configs/{path.name}" in module.__doc__


def test_a_resolved_config_survives_json():
    import json

    config = resolve(default())
    assert resolve(json.loads(json.dumps(to_dict(config)))) == config == Config()


def test_an_unknown_field_cannot_be_set():
    config = default()
    with pytest.raises(AttributeError, match="stepz"):
        config.train.stepz = 3


def test_all_errors_are_listed_at_once():
    values = to_dict(Config())
    values["train"]["steps"] = "many"
    values["optim"]["learning_rate"] = -1.0
    values["data"]["batchsize"] = 3
    values["objective"] = 7
    with pytest.raises(ConfigError) as caught:
        resolve(values)
    message = str(caught.value)
    assert "config.train.steps is 'many' (str); expected int" in message
    assert "learning_rate" in message and "-1.0" in message
    assert "config.data.batchsize is not a field; did you mean config.data.batch_size?" in message
    assert "config.objective is 7" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stages", [1] * 200_000),
        ("stages", [{str(i): i for i in range(1000)}] * 3000),
        ("data", {f"{'x' * 50}{i}": i for i in range(1000)}),
        ("model", {f"{'x' * 50}{i}": {} for i in range(1000)}),
    ],
)
def test_a_message_stays_short_however_many_mistakes_there_are(field, value):
    values = to_dict(Config())
    values[field] = value
    values["objective"] = 7
    with pytest.raises(ConfigError) as caught:
        resolve(values)
    assert len(str(caught.value)) < 12_000


@pytest.mark.parametrize(
    ("field", "value", "fine"),
    [
        ("optim.learning_rate", 1, True),  # an int where a float is wanted
        ("train.steps", 1.5, False),
        ("train.steps", True, False),
        ("data.flip", 1, False),
        ("model.unet.attention_head_dim", (4, 8, 8, 8), True),  # int | tuple
        ("model.unet.attention_head_dim", "8", False),
        ("model.unet.block_out_channels", [320, 640, 1280, 1280], True),
        ("optim.groups", [["text", 0.5]], True),
        ("optim.groups", [["text"]], False),
    ],
)
def test_types(field, value, fine):
    values = to_dict(Config())
    group = values
    *path, name = field.split(".")
    for part in path:
        group = group[part]
    group[name] = value
    if fine:
        resolve(values)
    else:
        with pytest.raises(ConfigError, match=name):
            resolve(values)


def test_fields_that_do_not_go_together():
    values = to_dict(Config())
    values["schedule"]["zero_terminal_snr"] = True  # with the default epsilon prediction
    with pytest.raises(ConfigError, match="prediction_type"):
        resolve(values)
    values = to_dict(Config())
    values["data"]["name"], values["sample"]["fidelity"] = "mnist", 4
    with pytest.raises(ConfigError, match="fidelity is 4"):
        resolve(values)
    values = to_dict(Config())
    values["train"]["accumulation"] = 3
    with pytest.raises(ConfigError, match="batch_size is 64"):
        resolve(values)
