"""Losses of held-out examples: their mean, their curve, and which examples stand out.

The loss of an example is mostly that of its timestep. So each loss is set against those of the
other examples at the same timestep, with the same network: what is left tells examples apart.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from sdjax.evaluation.metrics import bootstrap
from sdjax.evaluation.metrics.bootstrap import RESAMPLES, Estimate
from sdjax.models.params import Params
from sdjax.system import paths

EXAMPLES_FILE = "example_loss.jsonl"
OUTLIER = 3.0  # standard deviations above the mean


@dataclasses.dataclass(frozen=True)
class Example:
    """The losses of one example.

    Attributes:
      key: its file name, or the number it is stored under.
      part: the number of its dataset in a mixture, 0 without one.
      shape: (height, width) of its picture as the network sees it.
      loss: the mean over the timesteps.
      score: the mean over timesteps of how many standard deviations the loss is above the mean of
        all examples at that timestep.
      uncaptioned: the mean loss with the empty caption in place of its own; None where there is no
        such loss.
      caption_score: the same as `score`, of the loss minus that with the empty caption: high where
        the caption helps less than captions do elsewhere. None as above.
    """

    key: str
    part: int
    number: int
    shape: tuple[int, int]
    caption: str
    loss: float
    score: float
    uncaptioned: float | None = None
    caption_score: float | None = None


class ReadPicture(Protocol):
    """Reads the picture of an example."""

    def __call__(self, example: Example) -> np.ndarray:
        """Return it as the network sees it, uint8 [H, W, 3]. Raises DataError."""


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleLosses:
    """The losses of the examples of a split.

    Attributes:
      examples: the worst, by `score`, first.
      losses, uncaptioned: float32 [N, n] in the order of `examples`; see `Example`.
      timesteps: [n]; empty for an autoencoder, whose losses have one column.
      read: None for a dataset without pictures.
    """

    examples: tuple[Example, ...]
    losses: np.ndarray
    uncaptioned: np.ndarray | None
    timesteps: np.ndarray
    split: str
    read: ReadPicture | None

    @property
    def by_caption(self) -> tuple[Example, ...]:
        """The examples, those that their captions help least first; () without such scores."""
        if self.uncaptioned is None:
            return ()
        return tuple(sorted(self.examples, key=lambda one: -(one.caption_score or 0.0)))


class FindExampleLosses(Protocol):
    """Computes the losses of examples."""

    def __call__(self, params: Params) -> ExampleLosses:
        """Return those of parameters {path: array} of every network. All hosts call it."""


def scores(losses: np.ndarray) -> np.ndarray:
    """How far losses [N, n] stand out, float64 [N]: the mean over columns of z-scores.

    A column's z-scores have mean 0 and standard deviation 1 over the examples; those of a column
    whose losses are all equal are 0.
    """
    values = np.asarray(losses, np.float64)
    spread = values.std(axis=0)
    centred = values - values.mean(axis=0)
    return np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0).mean(axis=1)


def estimates(found: ExampleLosses, *, resamples: int, seed: int) -> dict[str, Estimate]:
    """The metrics `example_loss` and, where there is one, `caption_gain`.

    caption_gain is the share of the loss that captions take away: 1 minus the loss over the loss
    with empty captions, of all examples together; its interval resamples examples.
    """
    losses = found.losses.mean(axis=1, dtype=np.float64)
    outliers = sum(one.score > OUTLIER for one in found.examples)
    made = {
        "example_loss": bootstrap.mean(
            losses, resamples=resamples, seed=seed, higher_is_better=False,
            details={"outliers": outliers},
        )
    }  # fmt: skip
    if found.uncaptioned is None:
        return made
    without = found.uncaptioned.mean(axis=1, dtype=np.float64)

    def gain(rows: np.ndarray) -> float:
        return float(1 - losses[rows].sum() / without[rows].sum())

    low = high = None
    if resamples:
        drawn = bootstrap.replicate(gain, len(losses), resamples=resamples, seed=seed)
        low, high = bootstrap.percentiles(drawn)
    made["caption_gain"] = Estimate(gain(np.arange(len(losses))), low, high, True, len(losses))
    return made


def write(folder: paths.Path, found: ExampleLosses) -> paths.Path:
    """Write a line of JSON for each example, the worst first; return the file.

    Raises:
      WriteError: it cannot be written.
    """
    file = folder / EXAMPLES_FILE
    lines = []
    for one, losses in zip(found.examples, found.losses, strict=True):
        row: dict[str, Any] = dataclasses.asdict(one) | {"split": found.split}
        row["loss_at"] = {
            f"t{int(t):04d}": float(loss) for t, loss in zip(found.timesteps, losses, strict=False)
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    paths.write_text(file, "\n".join(lines) + "\n")
    return file


def validation(
    losses: np.ndarray, timesteps: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Estimate, dict[str, Any]]:
    """The mean of losses [N, n] and the curve over timesteps [n]; intervals resample examples."""
    options: Mapping[str, Any] = {"resamples": resamples, "seed": seed, "higher_is_better": False}
    whole = bootstrap.mean(losses.mean(axis=1, dtype=np.float64), **options)
    parts = [bootstrap.mean(column, **options) for column in losses.T]
    curve = {
        "x": [float(t) for t in timesteps],
        "y": [part.value for part in parts],
        "low": [part.low for part in parts],
        "high": [part.high for part in parts],
        "x_label": "timestep",
    }
    return whole, curve
