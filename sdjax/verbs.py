"""The beginning of the verbs with absl's flags.

A recipe is a Python file with a `get_config()`, which is run; those of sdjax also go by their
names, as "base".
"""

from __future__ import annotations

import contextlib
import difflib
import keyword
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from sdjax.errors import UserError, explain
from sdjax.system import paths, untrusted

# {flag: argument of `sdjax.config.choosing`}.
_VARIANTS = {"config.model.family": "family", "config.method.name": "method"}
CONFIG_HELP = (
    "Recipe: the name of one, such as base, or a file; change its fields with "
    "--config.FIELD=VALUE; method.name and model.family also decide which fields there are. A "
    "recipe is a Python file and is run: take none from somebody you do not trust."
)


def run(
    argv: Sequence[str], values: flags.FlagValues, module: str, about: str, body: Callable[[], int]
) -> int:
    """Parse the flags, answer --help, else call `body`; an exit code.

    Args:
        argv: with the program's name first.
        values: the verb's own flags, of which "help" is one.
        module: the verb's, whose flags --help lists; about: its docstring.
    """
    try:
        rest = parse(list(argv), values)
        if values["help"].value:
            print(f"{about}\n{values.module_help(module) or values.get_help()}")
            return 0
        if rest[1:]:
            raise UserError(f"unexpected arguments {rest[1:]}; options start with --")
        return body()
    except paths.storage_errors(UserError, flags.Error) as error:
        return explain(error)


def recipe_folder() -> Path:
    """The folder of sdjax's recipes: inside an installed package, beside it in a clone."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def recipe_file(given: str) -> str:
    """The file that --config=`given` means: a name of a recipe becomes its file.

    A file that is there comes first. What follows a colon is for the recipe's `get_config`.
    """
    name, colon, argument = given.partition(":")
    file = recipe_folder() / f"{name}.py"
    if re.fullmatch(r"\w+", name) and not Path(name).is_file() and file.is_file():
        return f"{file}{colon}{argument}"
    return given


def recipe(values: flags.FlagValues, example: str) -> ConfigDict:
    """The recipe of --config, with its overrides.

    Args:
        example: the recipe that an error names as one.

    Raises:
        UserError: there is none.
    """
    found = values["config"].value
    if found is None:
        raise UserError(f"--config is missing; for instance --config={example}")
    if not isinstance(found, ConfigDict):
        name = config_flags.get_config_filename(values["config"])
        known = sorted(file.stem for file in recipe_folder().glob("*.py"))
        close = difflib.get_close_matches(Path(name).stem, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the recipes are {', '.join(known)}"
        raise UserError(f"--config={name}: there is no such file or recipe; {hint}")
    return found


def parse(argv: list[str], values: flags.FlagValues) -> list[str]:
    """Return the arguments that absl leaves.

    Raises:
        flags.Error: an unknown flag or a wrong value.
        UserError: the configuration has no such field.
    """
    for argument in argv:
        _check_field(argument)
    try:
        with _choosing(argv):
            return values(_with_recipe_files(argv))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        for argument in argv:
            _check_known(argument)  # ml_collections raises any of these where one is not
        raise


def _choosing(argv: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Let --config.model.family and --config.method.name decide which fields a recipe has.

    They change what `sdjax.config.default` gives, and so have to be known before the recipe runs.
    """
    found = {}
    for argument in argv:
        flag, equals, value = argument.lstrip("-").partition("=")
        if flag in _VARIANTS and equals:
            found[_VARIANTS[flag]] = value
    if not found:
        return contextlib.nullcontext()
    from sdjax.config import choosing

    return choosing(**found)


def _check_field(argument: str) -> None:
    """Raise a UserError if what stands between --config. and = is no name of a field."""
    flag = argument.partition("=")[0]
    found = re.fullmatch(r"--?config\.(.*)", flag, re.DOTALL)
    if found is None:
        return
    plain = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", found[1], re.ASCII)
    if not plain or any(keyword.iskeyword(name) for name in found[1].split(".")):
        raise UserError(
            f"{untrusted.brief(argument)}: expected --config.FIELD=VALUE, where FIELD is names "
            "with points between them, as in --config.train.steps=100 (a tuple is set as a whole)"
        )


def _check_known(argument: str) -> None:
    """Raise a UserError if an argument sets a field that the configuration does not have."""
    found = re.fullmatch(r"--?config\.([\w.]+)(=.*)?", argument, re.DOTALL)
    if found is None:
        return
    from sdjax.config import all_fields

    here, names = all_fields(), found[1].split(".")
    for i, name in enumerate(names):
        if here is None:
            return  # a group that a recipe may have
        if not isinstance(here, dict):
            value = ".".join(["config", *names[:i]])
            raise UserError(
                f"{untrusted.brief(argument)}: {value} is a value and has no field {name!r}; set "
                f"it by --{value}=VALUE"
            )
        if name not in here:
            close = difflib.get_close_matches(name, here, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            shown = argument if len(argument) < 200 else untrusted.brief(argument)
            raise UserError(f"{shown}: the configuration has no field {name!r}{hint}")
        here = here[name]


def _with_recipe_files(argv: Sequence[str]) -> list[str]:
    """The arguments with a file for the recipe that --config names."""
    found = list(argv)
    for i, argument in enumerate(found):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            if equals:
                found[i] = f"{flag}={recipe_file(value)}"
            elif i + 1 < len(found):
                found[i + 1] = recipe_file(found[i + 1])
    return found


def parse_or_exit(argv: list[str]) -> list[str]:
    """`parse` for absl's `app.run`, whose flags are those of the whole program.

    --help is answered here, with exit code 0; absl's own answer ends with 1.
    """
    if {"-h", "--help"} & set(argv[1:]):
        print(f"{sys.modules['__main__'].__doc__}\n{flags.FLAGS.main_module_help()}")
        sys.exit(0)
    try:
        return parse(argv, flags.FLAGS)
    except (UserError, flags.Error) as error:
        sys.exit(explain(error))
