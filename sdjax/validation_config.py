"""The `validation` group of the configuration."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """The loss on a fixed choice of held-out examples, and what follows from it."""

    every: int = 1000  # steps between; 0: only at the end
    examples: int = 256  # of data.eval_split; 0: no validation
    train_examples: int = 256  # the same of data.split, so that the gap shows overfitting
    strata: int = 8  # timesteps, the middles of so many equal parts of their range
    rows: int = 8  # examples that a device computes at once
    # What tells the best checkpoint, which is kept: "" is the loss of what is sampled with (the
    # first average, or the weights themselves); else a name of metrics.jsonl, such as
    # "validation/raw/loss_at/t0937".
    metric: str = ""
    # Of pictures that are drawn at every validation, see `sdjax.evaluate --help`: metrics such as
    # ("fid", "clip_score"), logged as evaluation/NAME, and what they take.
    metrics: tuple[str, ...] = ()
    num_samples: int = 1000  # pictures for these metrics
    inception: str = ""  # --inception of sdjax.evaluate
    clip: str = ""  # --clip
    features: str = ""  # --features
    mode: str = "min"  # or "max", where more is better
    patience: int = 0  # validations without a new best after which the run stops; 0: never
    # Steps between looks at the largest activations and attention logits of the UNet; 0: never.
    maxima_every: int = 0

    def __post_init__(self):
        for name in ("every", "examples", "train_examples", "patience", "maxima_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"validation.{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("strata", "rows", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"validation.{name} is {getattr(self, name)}; expected 1 or more")
        if self.mode not in ("min", "max"):
            raise ValueError(f"validation.mode is {self.mode!r}; expected 'min' or 'max'")
        if self.metrics and not self.examples:
            raise ValueError(
                f"validation.metrics is {self.metrics!r}, but validation.examples is 0, which "
                "switches validation off; expected some"
            )
        if self.maxima_every and not self.examples:
            raise ValueError(
                f"validation.maxima_every is {self.maxima_every}, but validation.examples, which "
                "are looked at, is 0; expected some, or maxima_every 0"
            )
        if self.patience and not (self.every and self.examples):
            raise ValueError(
                f"validation.patience is {self.patience}, but validation.every is {self.every} and "
                f"validation.examples is {self.examples}; expected both above 0, or patience 0"
            )
