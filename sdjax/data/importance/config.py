"""The group `data.importance`: how often which example of the training split comes."""

from __future__ import annotations

import dataclasses

from sdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImportanceConfig:
    """Weights of examples by which they are drawn. Raises UserError for a cap below 1."""

    # JSON lines with the `key` of an example and its `weight`; or example_loss.jsonl of
    # `sdjax.evaluate`, whose weights are losses over the mean at the same timestep. "": all alike.
    weights: str = ""
    cap: float = 3.0  # an example comes at most so many times as often as without, at least 1 / cap
    unbiased: bool = True  # divide the loss by how much more often: the same loss is minimised

    def __post_init__(self) -> None:
        if not self.cap >= 1:
            raise UserError(f"data.importance.cap is {self.cap}; expected 1 or more")
