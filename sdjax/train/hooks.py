"""The work that a verb hands to the loop, since the rooms that do it stand above training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from sdjax.errors import UserError
from sdjax.system import paths

if TYPE_CHECKING:  # sdjax.report, which starts at once, needs the file's name alone
    from sdjax.config import Config
    from sdjax.data.text.text_tokenizer import TextTokenizer
    from sdjax.models.params import Params

REPORT_FILE = "report.html"


class Judge(Protocol):
    """Metrics of the pictures that a model draws."""

    def __call__(self, step: int, params: Params) -> dict[str, float]:
        """Return {metric: value} for the parameters of every network, after `step` steps.

        All hosts call it, and get the same.

        Raises:
            FloatingPointError: the pictures have NaN pixels.
        """


class MakeJudge(Protocol):
    """Opens what a judge needs, before the first step."""

    def __call__(
        self, config: Config, tokenizers: Mapping[str, TextTokenizer], folder: paths.Path
    ) -> Judge: ...


class WriteReport(Protocol):
    """Writes the report of a workdir into it, as `REPORT_FILE`."""

    def __call__(self, folder: paths.Path, /) -> object: ...


def no_judge(config: Config, tokenizers: Mapping[str, TextTokenizer], folder: paths.Path) -> Judge:
    """Refuse `config.validation.metrics`: the caller of the loop has brought no judge.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"config.validation.metrics is {config.validation.metrics!r}, but this caller of "
        "sdjax.train.loop.run hands it no judge; use sdjax.main.train, or set it to ()"
    )


@dataclasses.dataclass(frozen=True)
class Hooks:
    """make_judge: for `config.validation.metrics`. write_report: None writes no report."""

    make_judge: MakeJudge = no_judge
    write_report: WriteReport | None = None
