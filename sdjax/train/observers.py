"""Observations while training, each at its own interval: pictures, validation, snapshots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from sdjax.config import Config
from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.methods.method import Method
from sdjax.models.config import ConfigError
from sdjax.models.params import Params
from sdjax.optim import ema as ema_lib
from sdjax.system import paths
from sdjax.train.gallery import Gallery
from sdjax.train.hooks import REPORT_FILE, Hooks
from sdjax.train.monitoring.telemetry import Telemetry, flatten
from sdjax.train.selection import Selection
from sdjax.train.state import State
from sdjax.train.validation import Validator, replicate, summary
from sdjax.train.weight_sets import RAW, evaluated_set, weight_sets


class Observers:
    """Observe the state at the steps that the configuration says; changes nothing of it.

    gallery: draws.
    selection: which step is the best, and whether the run still gets better.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        tokenizers: Mapping[str, TextTokenizer],
        mesh: Mesh,
        folder: paths.Path,
        hooks: Hooks,
    ):
        self._config, self._mesh, self._folder = config, mesh, folder
        self.gallery = Gallery(config, method, tokenizers, folder)
        own = evaluated_set(config.ema.profiles)
        self._own_loss = f"validation/{own}/loss"
        self.selection = Selection(config.validation, config.validation.metric or self._own_loss)
        validation, data = config.validation, config.data
        wanted = {
            "validation": (data.eval_split, validation.examples),
            "validation_train": (data.split, validation.examples and validation.train_examples),
        }
        self._validators = {
            name: Validator(config, method, tokenizers, mesh, split=split, count=count)
            for name, (split, count) in wanted.items()
            if count
        }
        self._judge = hooks.make_judge(config, tokenizers, folder) if validation.metrics else None
        self._write_report = hooks.write_report if config.train.report else None
        self._asked = False  # for pictures of the step at hand
        self._check_metric()

    def _check_metric(self) -> None:
        """Check that a validation gives the number that tells the best, before a day has gone."""
        metric, metrics = self.selection.metric, self._config.validation.metrics
        known = {
            f"{group}/{weights}/{name}"
            for group, validator in self._validators.items()
            for weights in (RAW, *self._config.ema.profiles)
            for name in ("loss", *(f"loss_at/t{int(t):04d}" for t in validator.timesteps))
        }
        drawn = metric.removeprefix("evaluation/")
        of_pictures = drawn != metric and any(drawn.startswith(name) for name in metrics)
        if self._validators and metric not in known and not of_pictures:
            listed = ", ".join([*sorted(known), *(f"evaluation/{name}" for name in metrics)])
            raise ConfigError(
                f"config.validation.metric is {metric!r}; a validation gives {listed}"
            )

    def get_state(self) -> dict[str, Any]:
        """JSON-able, for the checkpoint."""
        return {"selection": self.selection.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Judge as the run that was saved would have; the checkpoint may be older than this."""
        if "selection" in state:
            self.selection.set_state(state["selection"])

    def wants_checkpoint(self, done: int, end: int) -> bool:
        """After `observe`: it is time for one, or step `done` is the last or the best so far."""
        regular = done % self._config.train.checkpoint_every == 0
        return regular or done == end or self.selection.stops or done == self.selection.step

    def _draws(self, done: int) -> bool:
        due = self._asked or _every(done, self._config.train.sample_every)
        return due and done < self._config.train.steps

    def _validates(self, done: int) -> bool:
        last = done == self._config.train.steps
        return bool(self._validators) and (last or _every(done, self._config.validation.every))

    def _keeps(self, done: int) -> bool:
        return _every(done, self._config.ema.snapshot_every)

    def _measures(self, done: int) -> bool:
        return _every(done, self._config.validation.maxima_every)

    def due(self, done: int, *, asked: bool = False) -> bool:
        """Whether there is anything to observe after step `done`.

        asked: whether somebody wishes to see pictures of it.
        """
        self._asked = asked
        looks = (self._draws, self._validates, self._measures, self._keeps)
        return any(look(done) for look in looks)

    def observe(self, done: int, state: State, frozen: Params, telemetry: Telemetry) -> None:
        """Look at the state after step `done`. All hosts call it.

        Raises:
            UserError: an example cannot be read, or a file not be written.
        """
        if self._draws(done):
            self.draw(done, state, frozen, telemetry)
            if self._asked:
                telemetry.message(f"pictures of step {done}, as asked on the page")
        if self._validates(done):
            self._validate(done, state, frozen, telemetry)
            self.report(telemetry)
        if self._measures(done):
            raw = {**frozen, **state["params"]}
            telemetry.scalars(done, {"maxima": self._validators["validation"].maxima(raw)})
        if self._keeps(done):
            dtype = self._config.ema.snapshot_dtype
            ema_lib.save_snapshots(self._folder, done, state["ema"], dtype=dtype)

    def draw(
        self, done: int, state: State, frozen: Params, telemetry: Telemetry
    ) -> paths.Path | None:
        """Pictures of step `done`; None, and a line, where they have NaN pixels."""
        try:
            return self.gallery.show(done, state, frozen, telemetry)
        except FloatingPointError as error:
            telemetry.message(f"no pictures of step {done}: {error}")
            return None

    def report(self, telemetry: Telemetry) -> None:
        """Write report.html anew, on process 0. Where it cannot be written, that is only told."""
        if self._write_report is not None and jax.process_index() == 0:
            telemetry.flush()
            try:
                self._write_report(self._folder)
            except paths.storage_errors() as error:
                telemetry.message(f"{self._folder / REPORT_FILE} cannot be written: {error}")

    def _validate(self, done: int, state: State, frozen: Params, telemetry: Telemetry) -> None:
        scalars: dict[str, Any] = {name: {} for name in self._validators}
        for weights, params in weight_sets(state).items():
            every = replicate({**frozen, **params()}, self._mesh)
            for name, validator in self._validators.items():
                scalars[name][weights] = summary(validator.losses(every), validator.timesteps)
        if self._judge is not None:
            own = weight_sets(state)[evaluated_set(self._config.ema.profiles)]()
            try:
                scalars["evaluation"] = self._judge(done, {**frozen, **own})
            except FloatingPointError as error:
                telemetry.message(f"no metrics of pictures of step {done}: {error}")
                scalars["evaluation"] = dict.fromkeys(self._config.validation.metrics, math.nan)
        flat = flatten(scalars)
        if self._judge is not None:
            flat.setdefault(self.selection.metric, math.nan)
        best = self.selection.observe(done, flat)
        scalars["validation"] |= {"best": self.selection.value, "best_step": self.selection.step}
        telemetry.scalars(done, scalars)
        telemetry.message(self._line(done, flat, best))

    def _line(self, done: int, flat: Mapping[str, float], best: bool) -> str:
        selection, config = self.selection, self._config.validation
        parts = [f"validation at step {done}: loss {flat[self._own_loss]:.4f}"]
        train = flat.get(self._own_loss.replace("validation/", "validation_train/", 1))
        if train is not None:
            parts.append(f"on training data {train:.4f}")
        if selection.metric != self._own_loss:
            parts.append(f"{selection.metric} {flat[selection.metric]:.4g}")
        if best:
            parts.append("the best so far")
        elif selection.step is not None:
            parts.append(f"best {selection.value:.4f} at step {selection.step}")
        if selection.stops:
            parts.append(
                f"{selection.since} validations without a new best, which is "
                f"config.validation.patience = {config.patience}: the run stops here"
            )
        return ", ".join(parts)


def _every(done: int, interval: int) -> bool:
    return bool(interval) and done % interval == 0
