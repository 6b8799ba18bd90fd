"""Reading a config strictly."""

import dataclasses

import pytest

from sdjax.models.config import ConfigError, json_values, matches, read_config


@dataclasses.dataclass(frozen=True)
class Example:
    width: int = 3
    rate: float = 0.5
    name: str = "a"
    sizes: int | tuple[int, ...] = (1, 2)
    on: bool = True

    def __post_init__(self):
        if self.width < 0:
            raise ValueError(f"width = {self.width}: expected >= 0")


def test_values_become_fields_and_the_rest_is_sorted_out():
    data = {"width": 4, "rate": 1, "sizes": [3, 4], "_class_name": "X", "cache": 7, "off": [0, 0]}
    config, ignored = read_config(
        Example, data, where="f.json", ignored=frozenset({"cache"}), neutral={"off": (0,)}
    )
    assert config == Example(width=4, rate=1, sizes=(3, 4))
    assert ignored == ["_class_name", "cache"]
    assert json_values(config)["sizes"] == [3, 4]


def test_absent_and_null():
    config, _ = read_config(
        Example, {"name": None}, where="f", absent={"width": 9}, null={"name": "z"}
    )
    assert (config.width, config.name) == (9, "z")


def test_all_problems_come_in_one_message():
    data = {"width": 1.5, "rate": True, "on": 1, "sizes": [1, "2"], "off": True, "other": None}
    with pytest.raises(ConfigError) as error:
        read_config(Example, data, where="dir/f.json", neutral={"off": (0, False)})
    message = str(error.value)
    for line in ("dir/f.json", "width = 1.5 (expected int)", "rate = True (expected float)",
                 "on = 1 (expected bool)", "sizes = (1, '2')", "off = True (supported: 0 or False)",
                 "other = None (unknown field)"):  # fmt: skip
        assert line in message


def test_validation_of_the_class_names_the_file():
    with pytest.raises(ConfigError, match="f.json(.|\n)*width = -1: expected >= 0"):
        read_config(Example, {"width": -1}, where="f.json")


@pytest.mark.parametrize(
    "value, hint, fits",
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (True, float, False),
        ((1, 2), tuple[int, ...], True),
        ((1, 2.0), tuple[int, ...], False),
        (None, int | None, True),
        (None, int, False),
        ("a", str, True),
    ],
)
def test_matches(value, hint, fits):
    assert matches(value, hint) == fits
