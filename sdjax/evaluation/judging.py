"""Metrics of pictures while training: `sdjax.evaluate`, of the weights that are drawn with."""

from __future__ import annotations

from collections.abc import Mapping

from sdjax.config import Config
from sdjax.config_model import model_of_run
from sdjax.data.text.text_tokenizer import TextTokenizer
from sdjax.errors import UserError
from sdjax.evaluation.choice import ON_REQUEST
from sdjax.evaluation.loading import OWN, Loaded
from sdjax.evaluation.opening import open_session
from sdjax.evaluation.request import Request
from sdjax.models.config import ConfigError
from sdjax.models.params import Params
from sdjax.parallel.sharding import to_host
from sdjax.system import paths
from sdjax.train.weight_sets import evaluated_set


class PictureJudge:
    """Draws `validation.num_samples` pictures of held-out captions and compares them.

    Each time it writes what `sdjax.evaluate` writes, into WORKDIR/evaluations.

    Raises:
        ConfigError: a metric is none, or cannot be computed with what the configuration gives.
    """

    def __init__(self, config: Config, tokenizers: Mapping[str, TextTokenizer], folder: paths.Path):
        validation = config.validation
        self._folder = folder / "evaluations"
        self._weights = evaluated_set(config.ema.profiles)
        try:
            request = Request(
                model=str(folder),
                dataset=OWN,  # the recipe's, whose user is here
                metrics=validation.metrics,
                num_samples=validation.num_samples,
                seed=config.seed,
                weights=self._weights,
                dtype=config.model.dtype,
                inception=validation.inception,
                clip=validation.clip,
                features=validation.features,
            )
            networks = model_of_run(config, tokenizers)
            if asked := [name for name in ON_REQUEST if name in request.metrics]:
                raise UserError(f"{asked[0]} is for sdjax.evaluate alone, after training")
            loaded = Loaded(networks, folder, config, data=config.data)
            self._session = open_session(request, loaded, self._folder)
        except UserError as error:
            raise ConfigError(
                f"config.validation.metrics = {validation.metrics!r}: {error}\n(what is --NAME for "
                "sdjax.evaluate is config.validation.NAME here)"
            ) from error

    def __call__(self, step: int, params: Params) -> dict[str, float]:
        """{metric: value} of parameters of every network. All hosts call it, and get the same."""
        whole = {path: to_host(value) for path, value in params.items()}
        name = f"{step:08d}-{self._weights}-training"
        results = self._session.run(self._folder / name, params=whole, about={"step": step})
        return {name: estimate.value for name, estimate in results.metrics.items()}
