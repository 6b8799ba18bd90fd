"""What the verbs with absl's flags have in common: their beginning."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from sdjax import paths
from sdjax.errors import UserError, explain


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


def recipe(values: flags.FlagValues, example: str) -> ConfigDict:
    """The recipe of --config, with its overrides.

    Args:
        example: the file that an error names as one.

    Raises:
        UserError: there is none.
    """
    found = values["config"].value
    if found is None:
        raise UserError(f"--config is missing; for instance --config={example}")
    if not isinstance(found, ConfigDict):
        name = config_flags.get_config_filename(values["config"])
        raise UserError(f"--config={name}: there is no such file; recipes are in configs/")
    return found


def parse(argv: list[str], values: flags.FlagValues) -> list[str]:
    """What absl leaves of the arguments.

    Raises:
        flags.Error: an unknown flag or a wrong value.
        UserError: the configuration has no such field.
    """
    try:
        return values(argv)
    except (AttributeError, KeyError) as error:  # ml_collections' word for an unknown field
        unknown, close = re.search(r"\w+", str(error)), re.search(r'mean "(\w+)"', str(error))
        name = unknown.group() if unknown else ""
        culprit = next((arg for arg in argv if arg.startswith("--config.") and name in arg), None)
        if culprit is None:
            raise
        hint = f"; did you mean {close.group(1)}?" if close else ""
        raise UserError(f"{culprit}: the configuration has no field {name!r}{hint}") from None


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
