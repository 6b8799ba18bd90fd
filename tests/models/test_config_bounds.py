"""Configs of strangers: every number has bounds, and messages name the field."""

import dataclasses
import json
import typing

import pytest

from sdjax.config import default, resolve
from sdjax.diffusion.grids import SamplerConfig
from sdjax.diffusion.schedules import MOST_TIMESTEPS, ScheduleConfig
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.clip_vision import CLIPVisionConfig, read_clip_config
from sdjax.models.config import ConfigError, read_config
from sdjax.models.flux.config import FluxConfig
from sdjax.models.unet import UNetConfig
from sdjax.models.vae import VAEConfig

CLASSES = (UNetConfig, VAEConfig, CLIPTextConfig, CLIPVisionConfig, FluxConfig, ScheduleConfig,
           SamplerConfig)  # fmt: skip
HUGE = (10**9, 10**400, float("inf"), float("nan"), -(10**9))


def numbers(cls):
    """The fields of a config that hold a number, or several."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        if kinds & {int, float, tuple[int, ...]}:
            yield field.name, float in kinds, tuple[int, ...] in kinds


FIELDS = [
    (cls, name, value)
    for cls in CLASSES
    for name, is_float, _ in numbers(cls)
    for value in HUGE
    if is_float or isinstance(value, int)
]


def test_there_are_numbers_to_bound():
    assert len(FIELDS) > 100 and {cls for cls, _, _ in FIELDS} == set(CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_number_that_no_network_has_is_refused_with_its_field_and_bound(cls):
    for _, name, value in (found for found in FIELDS if found[0] is cls):
        with pytest.raises(ConfigError, match=rf"x.json: (.|\n)*{name}.*expected") as seen:
            read_config(cls, {name: value}, where="x.json")
        assert len(str(seen.value)) < 600


@pytest.mark.parametrize("cls", CLASSES)
def test_a_number_within_a_list_that_no_network_has_is_refused(cls):
    for name, _, several in numbers(cls):
        if several:
            for values in ([10**9] * 4, [4, 4, 10**9, 4], [-4] * 4):
                with pytest.raises(ConfigError, match=f"{name} = "):
                    read_config(cls, {name: values}, where="x.json")


def test_a_network_of_too_many_blocks_is_refused():
    most = {"layers_per_block": 32, "transformer_layers_per_block": 128}
    with pytest.raises(ConfigError, match="layers_per_block = 32: .*at most 500 blocks in all"):
        UNetConfig.from_json(most | {"cross_attention_dim": 8})
    many = {"block_out_channels": [32] * 1000, "down_block_types": [], "up_block_types": []}
    for cls in (UNetConfig, VAEConfig):
        with pytest.raises(
            ConfigError, match="block_out_channels = .* 1000 in all.*1 to 10 levels"
        ):
            cls.from_json(many)


@pytest.mark.parametrize("cls", CLASSES)
def test_values_of_another_type_are_refused_by_field(cls):
    for field in dataclasses.fields(cls):
        for value in ({"a": 1}, [[1]], [{}], {}):
            with pytest.raises(ConfigError, match=f"{field.name} = ") as seen:
                read_config(cls, {field.name: value}, where="x.json")
            assert len(str(seen.value)) < 600


def test_long_and_deep_files_give_short_messages():
    content = {f"x{i}": "y" * 10_000 for i in range(1000)} | {"z" * 10_000: 1}
    with pytest.raises(ConfigError, match="and 961 more") as seen:
        read_config(UNetConfig, content, where="x.json")
    assert len(str(seen.value)) < 10_000
    deep = [1]
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(ConfigError, match="x.json: lists and groups are nested"):
        read_config(UNetConfig, {"sample_size": deep}, where="x.json")


@pytest.mark.parametrize("value", [3, "CLIPTextModelWithProjection", {"a": 1}, [[]], None])
def test_architectures_of_another_type_are_no_traceback(value):
    try:
        config, _ = CLIPTextConfig.from_json({"architectures": value})
        assert config.projection_dim is None
    except ConfigError as error:
        assert "architectures" in str(error)


def test_parts_of_a_clip_that_are_no_groups_are_refused():
    for value in (3, [1], "x"):
        with pytest.raises(ConfigError, match="x.json: vision_config = "):
            read_clip_config({"model_type": "clip", "vision_config": value}, "x.json")


def test_a_workdirs_configuration_has_the_same_bounds():
    for group, name, value in (
        ("schedule", "num_train_timesteps", MOST_TIMESTEPS + 1),
        ("schedule", "snr_scale", float("nan")),
        ("ema", "profiles", 10**400),
        ("optim", "learning_rate", 10**400),
        ("sample", "guidance", {"a": [1] * 10**5}),
    ):
        content = json.loads(json.dumps(default().to_dict()))
        content[group][name] = value
        with pytest.raises(ConfigError, match=name) as seen:
            resolve(content)
        assert len(str(seen.value)) < 1000
    content = json.loads(json.dumps(default().to_dict()))
    content["model"]["unet"]["layers_per_block"] = 10**9
    with pytest.raises(ConfigError, match="config.model.unet: layers_per_block = 1000000000: exp"):
        resolve(content)
    with pytest.raises(ConfigError, match="config has 980 more fields that it has not"):
        resolve({f"x{i}": 1 for i in range(1000)})
