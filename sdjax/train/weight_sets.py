"""The sets of weights that a run can be judged by: the parameters themselves, and each average."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from sdjax.models.params import Params
from sdjax.optim.optimizers import eval_params
from sdjax.parallel.sharding import placed_like
from sdjax.train.state import State

RAW = "raw"


def weight_sets(state: State) -> dict[str, Callable[[], Params]]:
    """{name: its parameters, made when called}: "raw" and each profile of the EMA."""
    sets: dict[str, Callable[[], Params]] = {
        RAW: lambda: eval_params(state["opt_state"], state["params"])
    }
    for profile in state["ema"]:
        sets[profile] = functools.partial(_as_the_parameters, state, profile)
    return sets


def _as_the_parameters(state: State, profile: str) -> Params:
    """An average, which may be split over more devices, joined once and not at each use."""
    return placed_like(state["ema"][profile], state["params"])


def evaluated_set(profiles: Sequence[str]) -> str:
    """The set that is drawn with and exported: the first average, else "raw"."""
    return profiles[0] if profiles else RAW


def evaluated_params(state: State, profiles: Sequence[str]) -> Params:
    """The parameters of `evaluated_set`.

    Args:
        profiles: of the recipe, whose order the state does not keep: JAX sorts a dictionary.
    """
    return weight_sets(state)[evaluated_set(profiles)]()
