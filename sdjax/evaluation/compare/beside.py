"""The models that an evaluation is compared with, evaluated beside it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax

from sdjax.errors import UserError
from sdjax.evaluation.compare import against
from sdjax.evaluation.evaluation import Results
from sdjax.evaluation.loading import load
from sdjax.evaluation.opening import open_session
from sdjax.evaluation.session import Session
from sdjax.families.family import Model
from sdjax.system import paths


def with_comparisons(
    session: Session,
    results: Results,
    output: paths.Path,
    *,
    change: Callable[[Model, str], Model],
) -> Results:
    """Return the results with the tables of what --against asks for, and write comparison.json.

    Args:
        session, results: of the evaluation in the folder `output`.
        change: (model, its name for messages) -> the model as the options have it.

    Raises:
        UserError and its kin: nothing was drawn, or a model cannot be compared.
    """
    request = session.request
    if session.prompts is None:
        raise UserError(
            f"--against={request.against[0]} compares pictures, and none are drawn; give --metrics "
            "of pictures, and --num_samples above 0"
        )
    sides = []
    for place in request.against:
        folder = paths.to_path(place)
        if not against.is_evaluation(folder):
            folder = _evaluated(session, place, output, change)
        sides.append(against.read_side(folder, name=place))
    if jax.process_index() != 0:
        return results
    found = against.compare(
        against.read_side(output), sides, clip=session.inputs.clip,
        resamples=request.resamples, seed=request.seed,
    )  # fmt: skip
    against.write(output, found)
    notes = tuple(note for one in found for note in one.notes)
    return dataclasses.replace(
        results,
        tables=(*results.tables, *against.tables(found)),
        warnings=(*results.warnings, *notes),
    )


def _evaluated(
    session: Session, place: str, output: paths.Path, change: Callable[[Model, str], Model]
) -> paths.Path:
    """Evaluate a model as the session does; return the folder."""
    ours, own = session.loaded, session.request
    assert ours is not None
    loaded = load(place, weights=own.weights, networks=own.networks)
    name = f"--against={place}"
    if loaded.found.is_autoencoder:
        raise UserError(f"{name} is an autoencoder, and draws nothing")
    found = change(loaded.found, name)
    loaded = dataclasses.replace(loaded, found=found, data=ours.data)  # the same prompts
    request = dataclasses.replace(
        own, model=place, others=(), experts=(), against=(), lora=(), step=None, audit="",
        size=session.size, split=session.split,
        num_samples=session.count,
    )  # fmt: skip
    folder = output / "against" / re.sub(r"[^A-Za-z0-9_.]+", "_", place).strip("_")
    open_session(request, loaded, folder).run(folder)
    return folder
