"""The training loop, in chapters. Resuming is calling `run` again with the same arguments."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from sdjax.checkpoints.assemble import method_of_run
from sdjax.checkpoints.checkpoint import Checkpoints, latest_step
from sdjax.config import Config, to_dict
from sdjax.data.pipeline import BatchIterator, make_iterator
from sdjax.encoding.dataset import check_encoded
from sdjax.optim.optimizers import make_lr_schedule
from sdjax.parallel.batches import global_batch, shares
from sdjax.parallel.mesh import make_mesh
from sdjax.system import collector, paths, progress
from sdjax.train import agreement, announce, rollback, stages, startup
from sdjax.train.finish import finish
from sdjax.train.hooks import Hooks
from sdjax.train.looks import Looks
from sdjax.train.monitoring.health import Diverged
from sdjax.train.monitoring.model_flops import mfu_flops
from sdjax.train.monitoring.monitor import Watch
from sdjax.train.monitoring.telemetry import Telemetry
from sdjax.train.preemption import StopSignal
from sdjax.train.program import Steps, build, with_pictures
from sdjax.train.rollback import Spike
from sdjax.train.state import State

DONE, DIVERGED, STOPPED = 0, 3, 75  # exit codes; 75 is EX_TEMPFAIL, "try again later"


def run(config: Config, workdir: str, *, dry_run: bool = False, hooks: Hooks | None = None) -> int:
    """Train to `config.train.steps` and write everything into `workdir`.

    Args:
        hooks: the judge of pictures and the writer of the report; by default there are none.

    Returns:
        An exit code: 0 finished; 3 diverged, or the last pictures are NaN; 75 stopped by SIGTERM
        after saving.

    Raises:
        UserError: configuration or input cannot work; the message says what to change.
    """
    agreement.check_config(config)
    startup.enable_compilation_cache(config.compilation_cache)
    mesh = make_mesh(config.mesh)
    stages.check(config, mesh)
    if dry_run:
        return announce.describe(config, mesh)
    folder = paths.to_path(workdir)
    with startup.locked_workdir(folder):
        while True:
            try:
                code = _train_stage(config, mesh, folder, hooks or Hooks())
                if code is not None:
                    return code
            except Spike as spike:
                announce.announce_line(rollback.record(folder, spike))


def _train_stage(config: Config, mesh: Mesh, folder: paths.Path, hooks: Hooks) -> int | None:
    """One stage of the run, from its newest checkpoint; None if another stage follows.

    Raises:
        Spike: the run may go back.
    """
    # The steps have a bar of their own.
    with collector.paused(), progress.shown(jax.process_index() == 0):
        training = _Training(config, mesh, folder, hooks)
    return training.run()


class _Training:
    """One stage of a run. Made in the order of the chapters below, then run once."""

    def __init__(self, config: Config, mesh: Mesh, folder: paths.Path, hooks: Hooks):
        self.mesh, self.folder = mesh, folder
        saved = startup.open_workdir(folder, config)
        agreement.check_shared(folder)
        self.resumed = saved is not None

        # 1. Networks, their weights, the tokenizer; what is trained and what is not.
        self.assembled = startup.load(config, folder, saved)
        self.whole = self.assembled.config
        newest = latest_step(folder)
        stages.check_data(self.whole, newest or 0)
        if saved is not None:
            stages.check_begun(saved, self.whole, newest or 0)
        self.stage = stages.segment_at(self.whole, newest or 0)
        self.config = self.stage.config
        self.method = method_of_run(self.config, self.assembled.tokenizers)
        self.program = build(self.config, self.method, mesh)
        loaded = None if self.resumed else self.assembled
        check_encoded(self.config, loaded, self.program.split.trained)

        # 2. Data, and what looks at the run, whose own data may not be there.
        went_back = rollback.read(folder)
        self.data = self._open_data(went_back)
        self.looks = Looks(self.config, self.method, self.assembled.tokenizers, mesh, folder, hooks)

        # 3. The state: shapes and shardings, then arrays, each straight to where it belongs.
        keep_last, keep_every = self.config.train.keep_last, self.config.train.keep_every
        self.checkpoints = Checkpoints(folder, keep_last=keep_last, keep_every=keep_every)
        split = self.program.split
        self.frozen = startup.place_frozen(
            self.whole, folder, self.assembled, split, mesh, resumed=self.resumed
        )
        before: dict[str, Any] = {}
        self.done = 0
        if newest is not None:
            self.done, self.state, before, _ = self.checkpoints.restore(self.program.state, newest)
        if self.done > self.stage.first:  # at its beginning a stage has data of its own
            self.data.set_state(before["iterator"])

        # 4. The step, compiled before the first batch is asked for. (Other shapes when they come.)
        # It takes longest, and other cores: what else takes a while is done meanwhile.
        self.train_step = Steps(self.program, self.config)
        shape = self.data.next_shape, self.config.model.vae.downscale
        with self.train_step.compiling(with_pictures(self.program.batch, *shape)) as compiling:
            if newest is None:
                self.state = self._first_state()
            compiled = compiling.result()
        announce.announce(self.config, self.assembled, split, mesh, folder, self.done, compiled)

        # 5. Those who watch it.
        self.telemetry = self._make_telemetry()
        announce.announce_data(self.data.summary, self.telemetry, self.done)
        self.watch = self._make_watch(len(went_back))
        if self.done:
            self.watch.resume(self.state["health"])
        if self.done > self.stage.first:  # what was usual in one stage is not in the next
            self.watch.set_state(before["watch"])
            self.looks.set_state(before)

    def _open_data(self, went_back: Sequence[Mapping[str, Any]]) -> BatchIterator:
        """This host's share, without the batches that the run has gone back for."""
        share = shares(self.mesh)[jax.process_index()]
        data = make_iterator(
            self.config.data,
            self.assembled.tokenizers,
            with_size="size" in self.method.example,
            split=self.config.data.split,
            seed=self.stage.seed,
            process_index=share.index,
            process_count=share.count,
        )
        data.pass_over(event["batch"] for event in went_back if event["first"] == self.stage.first)
        agreement.check_data(data.get_state(), data.summary.lines)
        return data

    def _first_state(self) -> State:
        program, split = self.program, self.program.split
        params = startup.initial_params(self.config, self.method, self.assembled, split, self.mesh)
        return jax.jit(program.fresh, out_shardings=program.state_shardings)(params)

    def _make_telemetry(self) -> Telemetry:
        return Telemetry(
            self.folder,
            total_steps=self.whole.train.steps,
            batch_size=self.config.data.batch_size,
            start_step=self.done,
            images_seen=functools.partial(stages.images_seen, self.whole),
            flops_per_image=mfu_flops(self.config),
        )

    def _make_watch(self, rollbacks: int) -> Watch:
        return Watch(
            self.config,
            self.telemetry,
            self.folder,
            self.assembled.tokenizers,
            jax.jit(make_lr_schedule(self.config.optim, self.whole.train.steps)),
            self.data.examples_per_epoch,
            rollbacks=rollbacks,
            first=self.stage.first,
        )

    def run(self) -> int | None:
        """To the end of the stage; None if another follows."""
        try:
            with StopSignal() as stop, self.telemetry, self.checkpoints:
                if self.done == 0:
                    self.telemetry.hparams(to_dict(self.whole))
                while self.done < self.stage.end and not self.looks.selection.stops:
                    self._step()
                    self._look_and_save()
                    if stop.requested(self.done) and self.done < self.whole.train.steps:
                        return self._stop()
                self.watch.flush()
                self.checkpoints.wait()
                if self.done < self.whole.train.steps and not self.looks.selection.stops:
                    return None
                # Pictures, a diffusers folder, and where it all is.
                finite = finish(
                    self.config, self.method, self.assembled, self.state, self.frozen, self.looks,
                    self.telemetry, self.folder,
                )  # fmt: skip
                return DONE if finite else DIVERGED
        except Diverged:
            return DIVERGED
        finally:
            self.data.close()

    def _step(self) -> None:
        self.done += 1
        shape = self.data.next_shape
        with self.watch.waiting():
            batch = global_batch(next(self.data), self.mesh)
        if not self.train_step.has(batch):
            self.watch.flush()
            with self.telemetry.pause():
                announce.announce_shape(shape, self.train_step.compile(batch), self.telemetry)
        self.state, metrics = self.train_step(self.state, self.frozen, batch)
        self.watch.push(self.done, batch, metrics)
        self.checkpoints.check()

    def _look_and_save(self) -> None:
        if self.looks.due(self.done):
            self.watch.flush()
            with self.telemetry.pause():
                self.looks.look(self.done, self.state, self.frozen, self.telemetry)
        if self.looks.wants_checkpoint(self.done, self.stage.end):
            self._save()

    def _save(self) -> None:
        self.watch.flush()
        with self.telemetry.pause():
            self.telemetry.flush()  # a kill after the save must not lose lines from before it
            position = {"iterator": self.data.get_state(), "watch": self.watch.get_state()}
            position |= self.looks.get_state()
            self.checkpoints.pin(self.looks.selection.step)
            self.checkpoints.save(self.done, self.state, position, to_dict(self.whole))

    def _stop(self) -> int:
        self._save()
        self.checkpoints.wait()
        self.telemetry.message(
            f"stopped by a signal after step {self.done} and saved; run the same command again to "
            "go on"
        )
        return STOPPED
