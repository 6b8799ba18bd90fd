"""Weights of examples from a file: read, matched with the examples of a source, and capped."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.data.importance.config import ImportanceConfig
from sdjax.errors import UserError
from sdjax.system import paths, text_files

_MOST = 2**31  # bytes of a file


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The weights of the examples of a source.

    values: float64 [N] with a mean of 1, within 1 / cap and cap.
    note: a line about them, for people.
    """

    values: np.ndarray
    note: str


def read(file: str) -> dict[int, dict[str, float]]:
    """Return {part of a mixture: {key: weight above 0}} of a file, see `ImportanceConfig`.

    Raises:
        UserError: it cannot be read, or names the line that is wrong.
    """
    lines = text_files.lines(text_files.read_text(paths.to_path(file), most=_MOST))
    rows = [(i, _row(file, i, line)) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"data.importance.weights: {file} has no lines")
    if any("weight" in row for _, row in rows):
        values = [_number(file, i, row, "weight") for i, row in rows]
    else:
        values = loss_ratios(file, rows)
    found: dict[int, dict[str, float]] = {}
    for (i, row), value in zip(rows, values, strict=True):
        if not (math.isfinite(value) and value > 0):
            raise UserError(
                f"data.importance.weights: {file}, line {i}: the weight is {value}; expected a "
                "number above 0"
            )
        found.setdefault(int(row.get("part", 0)), {})[str(row["key"])] = value
    return found


def loss_ratios(file: str, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> list[float]:
    """The loss of each example over the mean of all at a timestep, averaged over the timesteps.

    rows: (number of the line, a line of example_loss.jsonl).
    """
    names = list(rows[0][1].get("loss_at") or ())
    if not names:  # of an autoencoder
        losses = np.array([[_number(file, i, row, "loss")] for i, row in rows])
    else:
        losses = np.array(
            [
                [_number(file, i, row.get("loss_at") or {}, name) for name in names]
                for i, row in rows
            ]
        )
    means = losses.mean(axis=0)
    ratios = np.divide(losses, means, out=np.ones_like(losses), where=means > 0)
    return [max(float(ratio), 1e-6) for ratio in ratios.mean(axis=1)]


def _row(file: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"data.importance.weights: {file}, line {number} is no JSON ({error})"
        ) from error
    if not isinstance(row, dict) or "key" not in row or not str(row.get("part", 0)).isdigit():
        raise UserError(
            f"data.importance.weights: {file}, line {number}: expected an object with a 'key', as "
            '{"key": "a.jpg", "weight": 2.0}, or a line of example_loss.jsonl'
        )
    return row


def _number(file: str, number: int, row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f"data.importance.weights: {file}, line {number}: {name!r} is {value!r}; expected a "
            "number in every line"
        )
    return float(value)


def capped(ratios: np.ndarray, cap: float) -> np.ndarray:
    """Ratios [N] above 0, scaled and clipped so that their mean is 1 and all are in [1/cap, cap].

    The scale is the one at which the mean of the clipped values is 1.
    """
    ratios = np.asarray(ratios, np.float64)
    low, high = math.log(1 / cap / ratios.max()), math.log(cap / ratios.min())
    for _ in range(100):  # the mean rises with the scale, from 1/cap to cap
        middle = (low + high) / 2
        if np.clip(math.exp(middle) * ratios, 1 / cap, cap).mean() < 1:
            low = middle
        else:
            high = middle
    return np.clip(math.exp(high) * ratios, 1 / cap, cap)


def of_source(
    config: ImportanceConfig, given: Mapping[str, float], keys: Sequence[str], name: str
) -> Weights:
    """The weights of the examples with these keys; an example that the file lacks has a ratio of 1.

    Raises:
        UserError: the file has none of them.
    """
    known = [key in given for key in keys]
    if not any(known):
        raise UserError(
            f"data.importance.weights = {config.weights!r} has none of the {len(keys)} examples of "
            f"{name}; its first key is {next(iter(given), '(none)')!r}, and theirs {keys[0]!r}"
        )
    mean = float(np.mean([given[key] for key in keys if key in given]))
    ratios = np.array([given.get(key, mean) for key in keys], np.float64) / mean
    values = capped(ratios, config.cap)
    how = "losses divided by it" if config.unbiased else "losses as they are"
    return Weights(
        values,
        f"drawn by the weights of {config.weights}, which has {sum(known):,} of {len(keys):,} "
        f"examples: {values.min():.2f} to {values.max():.2f} times as often, {how}",
    )
