"""The command `sdjax VERB`, recipes by name, and what a wheel holds."""

import importlib
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from sdjax import __main__ as command
from sdjax import verbs
from sdjax.errors import UserError

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sdjax"
RECIPES = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))


def config_of(*arguments):
    """The recipe that the arguments give, as a verb reads it."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    verbs.parse(["verb", *arguments], values)
    return verbs.recipe(values, "base")


def test_verbs_are_the_modules_that_are_programs():
    programs = {
        file.stem for file in PACKAGE.glob("*.py") if '__name__ == "__main__"' in file.read_text()
    }
    assert set(command.VERBS) == programs - {"__main__"}


def test_help_whose_reader_is_gone_ends_in_silence(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:  # closing it flushes what was not taken
        monkeypatch.setattr(sys, "stdout", stdout)
        assert command.main([]) == 0


def test_command_becomes_the_verb_with_its_options(monkeypatch):
    started = []
    monkeypatch.setattr(command.os, "execv", lambda *call: started.append(call))
    command.main(["sample", "--model=DIR", "--prompts", "a b"])
    module = [sys.executable, "-m", "sdjax.sample"]
    assert started == [(sys.executable, [*module, "--model=DIR", "--prompts", "a b"])]


def test_a_wrong_verb_is_exit_code_2_and_one_line(capsys):
    assert command.main(["smaple"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: sdjax has no verb 'smaple'; did you mean sample?\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(arguments, capsys):
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {verb} " in printed for verb in command.VERBS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_by_name_is_the_one_of_its_file(name):
    by_file = config_of(f"--config={ROOT / 'configs' / name}.py")
    assert config_of(f"--config={name}").to_dict() == by_file.to_dict()
    assert config_of("--config", name).to_dict() == by_file.to_dict()


def test_a_recipe_by_name_takes_overrides_and_changes_no_other_flag(monkeypatch):
    arguments = ["--config=base", "--config.train.steps=7", "--config.vae_from=base"]
    monkeypatch.setattr(sys, "argv", ["verb", *arguments])  # where ml_collections looks for them
    config = config_of(*arguments)
    assert (config.train.steps, config.vae_from) == (7, "base")


@pytest.mark.parametrize(
    "argument",
    ["--config.=5", "--config.", "--config..=5", "--config.data.=5", "--config.data..path=x",
     "--config.data[=5", "--config.stages[0]=5", "--config.ema.profiles[x]=3", "--config. =5",
     "-config.=5", "--config.data.path\n=5"],
)  # fmt: skip
def test_override_whose_field_is_no_name_is_refused(argument, monkeypatch):
    arguments = ["--config=base", argument]
    monkeypatch.setattr(sys, "argv", ["verb", *arguments])
    with pytest.raises(UserError) as error:
        config_of(*arguments)
    assert str(error.value).startswith(f"{argument!r}: expected --config.FIELD=VALUE, ")


@pytest.mark.parametrize(
    ("argument", "said"),
    [("--config.data.path.x=5", "config.data.path is a value and has no field 'x'"),
     ("--config.seed.real=5", "config.seed is a value and has no field 'real'"),
     ("--config.__class__=5", "the configuration has no field '__class__'")],
)  # fmt: skip
def test_override_of_a_field_within_a_value_is_refused(argument, said, monkeypatch):
    arguments = ["--config=base", argument]
    monkeypatch.setattr(sys, "argv", ["verb", *arguments])
    with pytest.raises(UserError, match=re.escape(said)):
        config_of(*arguments)


@pytest.mark.parametrize("module", ["main", "plan", "encode", "sweep"])
def test_help_of_config_says_that_a_recipe_is_run(module):
    verb = importlib.import_module(f"sdjax.{module}")
    values = flags.FLAGS if module == "main" else verb.FLAGS
    assert "is a Python file and is run" in values["config"].help


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert verbs.recipe_file("base") == str(ROOT / "configs" / "base.py")
    assert verbs.recipe_file("base:x") == str(ROOT / "configs" / "base.py") + ":x"
    (tmp_path / "base").touch()
    for given in ("base", "base.py", "configs/base.py", "../base", "nothing", ""):
        assert verbs.recipe_file(given) == given


@pytest.mark.parametrize(
    ("given", "hint"),
    [("bass", "did you mean base?"), ("configs/sd51.py", "did you mean sd15?"),
     ("what", f"the recipes are {', '.join(RECIPES)}")],
)  # fmt: skip
def test_a_recipe_that_is_not_there_is_named_with_those_that_are(given, hint):
    with pytest.raises(UserError) as error:
        config_of(f"--config={given}")
    assert str(error.value) == f"--config={given}: there is no such file or recipe; {hint}"


def test_a_wheel_has_all_packages_and_the_recipes():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent for file in PACKAGE.rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(setuptools["packages"]) == packages | {"sdjax.configs"}
    assert setuptools["package-dir"] == {"sdjax.configs": "configs"}
    assert verbs.recipe_folder() == ROOT / "configs"
