"""Checkpoints of a run with Orbax: asynchronous, atomic, restored straight into their shardings.

    WORKDIR/checkpoints/STEP/state     the train state
                             data      state of the data iterator, JSON
                             config    the configuration, JSON

A save counts only once it is complete; what a killed one leaves is never read, and is removed when
training starts again. The first save of a process is opened again before the next, or before the
run ends. A checkpoint that cannot be read is a `CheckpointError` that says what to do; it never
becomes a silent restart.

The functions on a workdir only read, and may be used while a run is writing to it.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    EveryNSteps,
    LatestN,
    PreservationPolicy,
)

from sdjax.checkpoints import saved_state
from sdjax.checkpoints.checkpoint_log import leave_errors_to_callers
from sdjax.errors import UserError
from sdjax.system import paths, progress, text_files, untrusted
from sdjax.system.paths import PathLike
from sdjax.system.untrusted import is_number, listed

# What a host reads at once while it restores: Orbax's own limit, 96, is room for a whole copy.
RESTORE_GB = 4
# A host that needs a part of an array reads (and unpacks) the whole chunks it lies in.
CHUNK_BYTES = 8 * 2**20


class CheckpointError(UserError):
    """A checkpoint cannot be written or read. The message names it and says what to do."""


# ---- reading a workdir -----------------------------------------------------------------------


def checkpoint_folder(workdir: PathLike) -> paths.Path:
    """Where a run keeps its checkpoints; `paths.Path`, as Orbax needs its `glob`."""
    return paths.not_cut_off(paths.absolute(workdir)) / "checkpoints"


def all_steps(workdir: PathLike) -> list[int]:
    """Steps of the complete checkpoints, rising."""
    folder = checkpoint_folder(workdir)
    complete = ocp.utils.checkpoint_steps_paths(folder) if folder.is_dir() else []
    return sorted(int(path.name) for path in complete if is_number(path.name))


def latest_step(workdir: PathLike) -> int | None:
    """Step of the newest complete checkpoint; None if there is none."""
    return max(all_steps(workdir), default=None)


def read_config(workdir: PathLike, step: int | None = None) -> dict[str, Any]:
    """The configuration saved with a checkpoint, the newest by default."""
    step = _existing(workdir, step)
    with _explained(workdir, step):
        return text_files.read_object(
            checkpoint_folder(workdir) / str(step) / "config" / "metadata"
        )


def restore_params(
    workdir: PathLike,
    which: str = "params",
    step: int | None = None,
    networks: Container[str] | None = None,
) -> dict[str, np.ndarray]:
    """One set of parameters on the host, without the moments and without knowing the model.

    Args:
      workdir: of the run.
      which: "params", or "ema:PROFILE" for an average, as "ema:0.9999".
      step: the newest by default.
      networks: whose parameters; all by default.

    Returns:
      {path: array}
    """
    step = _existing(workdir, step)
    with _explained(workdir, step):
        folder = checkpoint_folder(workdir) / str(step) / "state"
        handler = ocp.PyTreeCheckpointHandler()
        saved = handler.metadata(folder).tree
        kind, _, profile = which.partition(":")
        sets = {"params": saved["params"]}
        sets |= {f"ema:{name}": params for name, params in saved.get("ema", {}).items()}
        if which not in sets:
            raise CheckpointError(
                f"which={which!r}: the checkpoint of step {step} in {workdir} has {', '.join(sets)}"
            )
        wanted = {path for path in sets[which] if not networks or path.split(".")[0] in networks}
        if not wanted:
            return {}
        chosen = {path: leaf for path, leaf in sets[which].items() if path in wanted}
        item = {"params": chosen} if kind == "params" else {"ema": {profile: chosen}}
        saved_state.check_size(checkpoint_folder(workdir) / str(step), _bytes(item))
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        with _reading(step, item):
            restored = handler.restore(
                folder, args=ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)
            )
    return restored["params"] if kind == "params" else restored["ema"][profile]


def _reading(step: int, tree: Any) -> AbstractContextManager[Any]:
    """Shows how much of a checkpoint is read. Compressed, it is a tenth less than its arrays."""
    name = f"reading the checkpoint of step {step}"
    return progress.work(name, _bytes(tree), poll=progress.bytes_read())


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in _arrays(tree))


def _arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if getattr(leaf, "shape", None) is not None]


def _existing(workdir: PathLike, step: int | None) -> int:
    steps = all_steps(workdir)
    if not steps:
        raise CheckpointError(
            f"{checkpoint_folder(workdir)} has no checkpoint; give the workdir of a run that has "
            "saved one"
        )
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{checkpoint_folder(workdir)} has no checkpoint of step {step}; it has {steps}"
        )
    return steps[-1] if step is None else step


@contextmanager
def _explained(workdir: PathLike, step: int) -> Iterator[None]:
    """Any error while reading a checkpoint, as one that names it and says what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        folder = checkpoint_folder(workdir) / str(step)
        older = [s for s in all_steps(workdir) if s < step]
        then = (
            f"to fall back to step {older[-1]}" if older else "to start the run from the beginning"
        )
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be read: {folder}\n"
            f"  {type(error).__name__}: {str(error).strip()[:500]}\n"
            f"It may be damaged. Restore it from a copy, or delete that folder {then}."
        ) from error


# ---- a run's own checkpoints -----------------------------------------------------------------


class _Pinned(PreservationPolicy):
    """Keeps one checkpoint, whichever is set."""

    step: int | None = None

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """See orbax's PreservationPolicy."""
        return [info.step == self.step for info in checkpoints]


class Checkpoints:
    """The checkpoints that a training run writes. Use as a context manager.

    Every process calls every method.

    Args:
      workdir: of the run; created if missing.
      keep_last: checkpoints to keep, the newest ones,
      keep_every: plus all whose step is a multiple of this, 0 = none.
    """

    def __init__(self, workdir: PathLike, *, keep_last: int = 2, keep_every: int = 0):
        if keep_last < 1 or keep_every < 0:
            raise ValueError(
                f"keep_last={keep_last}, keep_every={keep_every}: expected 1 or more, 0 or more"
            )
        self._workdir = workdir
        self.folder = checkpoint_folder(workdir)
        self._begun: tuple[int, int] | None = None  # a step to open again, and its arrays
        self._proven = False
        if "\\" in str(self.folder):  # TensorStore takes it for "/", and writes elsewhere
            raise CheckpointError(
                f"{self.folder}: checkpoints cannot be written below a folder with a backslash in "
                "its name; give a folder without one"
            )
        self._pinned = _Pinned()
        policies: list[PreservationPolicy] = [LatestN(keep_last), self._pinned]
        policies += [EveryNSteps(keep_every)] if keep_every else []
        leave_errors_to_callers()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        with self._written("opening"):
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=options,
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(restore_concurrent_gb=RESTORE_GB),
                    "data": ocp.JsonCheckpointHandler(),
                    "config": ocp.JsonCheckpointHandler(),
                },
            )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if exc_type is None:
                raise
            print(error, flush=True)  # the error under way matters more

    def save(
        self,
        step: int,
        state: Any,
        data_state: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        force: bool = False,
    ) -> bool:
        """Start saving, after waiting for the save before; returns once `state` may be donated.

        Args:
          step: optimizer steps done.
          state: pytree of arrays.
          data_state: JSON-able state of the data iterator.
          config: JSON-able configuration.
          force: save even if a later step is saved.

        Returns:
          False if this step (or, without `force`, a later one) is saved already.

        Raises:
          CheckpointError: this save cannot start, or the one before has failed.
        """
        with self._written(f"saving step {step}"):
            self._finish()
            if step in self._manager.all_steps():
                return False
            chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state, save_args=chunked),
                data=ocp.args.JsonSave(dict(data_state)),
                config=ocp.args.JsonSave(dict(config)),
            )
            begun = self._manager.save(step, args=items, force=force)
            if begun and not self._proven and jax.process_index() == 0:
                self._begun = step, len(saved_state.leaves(state))
            return begun

    def pin(self, step: int | None) -> None:
        """Keep the checkpoint of `step`, as long as no other is pinned in its place."""
        self._pinned.step = step

    def check(self) -> bool:
        """Whether no save is under way; `CheckpointError` if the last has failed. Does not wait."""
        saving = self._manager.is_saving_in_progress()
        if not saving:
            self.wait()
        return not saving

    def wait(self) -> None:
        """Until the last save is complete. Raises `CheckpointError` if it failed."""
        with self._written("saving"):
            self._finish()

    def close(self) -> None:
        """Wait for the last save and end."""
        with self._written("saving"):
            try:
                self._finish()
            finally:
                self._manager.close()

    def _finish(self) -> None:
        """Wait for the save under way; open the first one of this process again."""
        begun, self._begun = self._begun, None
        self._manager.wait_until_finished()
        if begun is not None:
            self._read_back(*begun)
            self._proven = True

    def _read_back(self, step: int, arrays: int) -> None:
        """Raise `CheckpointError` unless the checkpoint of `step` opens and has so many arrays."""
        folder = self.folder / str(step)
        try:
            found = len(saved_state.stored(folder))
            problem = f"it has {found} of {arrays} arrays" if found != arrays else ""
            for item in ("data", "config"):
                text_files.read_json(folder / item / "metadata", most=untrusted.MOST_TEXT)
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).strip()[:500]}"
        if problem:
            raise CheckpointError(
                f"the checkpoint of step {step} was written without an error, but cannot be opened "
                f"again: {folder}\n  {problem}\nThe run could not go on from it, so it stops now. "
                "Delete that folder, and give a --workdir of a plain name, or on another disk"
            )

    def all_steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        return all_steps(self._workdir)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return latest_step(self._workdir)

    def read_config(self, step: int | None = None) -> dict[str, Any]:
        """The configuration saved with a checkpoint, the newest by default."""
        return read_config(self._workdir, step)

    def restore(
        self, abstract_state: Any, step: int | None = None
    ) -> tuple[int, Any, dict[str, Any], dict[str, Any]]:
        """Restore a checkpoint, the newest by default.

        Args:
          abstract_state: the state as `jax.ShapeDtypeStruct` leaves with their shardings, which
            need not be those it was saved with.
          step: which one.

        Returns:
          step, state, data_state, config

        Raises:
          CheckpointError: there is none, it cannot be read, or its state has other parts than
            `abstract_state` (all are named).
        """
        self.wait()
        step = _existing(self._workdir, step)
        with _explained(self._workdir, step):
            check_structure(self.folder / str(step), abstract_state)
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state),
                data=ocp.args.JsonRestore(),
                config=ocp.args.JsonRestore(),
            )
            with _reading(step, abstract_state):
                restored = self._manager.restore(step, args=items)
        return step, restored.state, restored.data, restored.config

    @contextmanager
    def _written(self, doing: str) -> Iterator[None]:
        try:
            yield
        except paths.storage_errors(ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            steps = all_steps(self._workdir)
            left = f"step {steps[-1]} is the last complete one" if steps else "there is no other"
            raise CheckpointError(
                f"{doing}: the checkpoint could not be written to {self.folder}\n"
                f"  {type(error).__name__}: {str(error).strip()[:500]}\n"
                f"Is the disk full or read-only? Checkpoints before it are untouched ({left}); "
                "make room and run the same command again."
            ) from error


def check_structure(step_folder: PathLike, abstract_state: Any) -> None:
    """Compare a saved state with the one to restore: names, shapes, dtypes.

    Raises:
      CheckpointError: listing what differs.
    """
    lines = saved_state.differences(step_folder, saved_state.leaves(abstract_state))
    if lines:
        raise CheckpointError(
            f"the state in {step_folder} is not that of this configuration:\n  "
            + listed(lines)
            + "\nUse the configuration it was saved with (model, optimizer, groups, EMA profiles), "
            "or another workdir."
        )
