"""The training loop, in chapters. Resuming is calling `run` again with the same arguments."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from sdjax.checkpoints.assemble import Assembled
from sdjax.checkpoints.checkpoint import Checkpoints, latest_step
from sdjax.config import Config, to_dict
from sdjax.config_model import method_of_run
from sdjax.data.pipeline import BatchIterator, make_iterator
from sdjax.encoding.dataset import check_encoded
from sdjax.methods.method import Method
from sdjax.optim.optimizers import make_lr_schedule
from sdjax.parallel.batches import global_batch, shares
from sdjax.parallel.mesh import make_mesh
from sdjax.system import collector, paths, progress
from sdjax.train import agreement, announce, prediction_check, rollback, stages, startup
from sdjax.train.exporting import exporter
from sdjax.train.exporting.exporter import open_exporter
from sdjax.train.finish import finish
from sdjax.train.hooks import Hooks
from sdjax.train.monitoring.data_profile import DataProfiler
from sdjax.train.monitoring.health import Diverged
from sdjax.train.monitoring.model_flops import mfu_flops
from sdjax.train.monitoring.monitor import Monitor
from sdjax.train.monitoring.telemetry import Telemetry
from sdjax.train.observers import Observers
from sdjax.train.preemption import StopSignal
from sdjax.train.program import Steps, build, with_pictures
from sdjax.train.rollback import Spike
from sdjax.train.state import State
from sdjax.train.trackers import registry as trackers
from sdjax.train.trackers.registry import open_trackers
from sdjax.train.wishes import Wishes

DONE, DIVERGED, STOPPED = 0, 3, 75  # exit codes; 75 is EX_TEMPFAIL, "try again later"


def run(config: Config, workdir: str, *, dry_run: bool = False, hooks: Hooks | None = None) -> int:
    """Train to `config.train.steps` and write everything into `workdir`.

    Args:
        hooks: the judge of pictures and the writer of the report; by default there are none.

    Returns:
        An exit code: 0 finished, or stopped after saving by the wish of somebody who watches, so
        that no scheduler starts it again; 3 diverged, or the last pictures are NaN; 75 stopped by
        SIGTERM after saving.

    Raises:
        UserError: configuration or input cannot work; the message says what to change.
    """
    agreement.check_config(config)
    exporter.check(config.monitor)
    trackers.check(config.monitor)
    startup.enable_compilation_cache(config.compilation_cache)
    mesh = make_mesh(config.mesh)
    stages.check(config, mesh)
    if dry_run:
        return announce.describe(config, mesh)
    folder = paths.to_path(workdir)
    with startup.locked_workdir(folder), Wishes(folder) as wishes:
        while True:
            try:
                code = _train_stage(config, mesh, folder, hooks or Hooks(), wishes)
                if code is not None:
                    return code
            except Spike as spike:
                announce.announce_line(rollback.record(folder, spike))


def _train_stage(
    config: Config, mesh: Mesh, folder: paths.Path, hooks: Hooks, wishes: Wishes
) -> int | None:
    """Train one stage of the run, from its newest checkpoint; None if another stage follows.

    Raises:
        Spike: the run may go back.
    """
    # The steps have a bar of their own.
    with collector.paused(), progress.shown(jax.process_index() == 0):
        # 1. Networks, their weights, the tokenizers; what is trained and what is not.
        saved = startup.open_workdir(folder, config)
        agreement.check_shared(folder)
        assembled = startup.load(config, folder, saved)
        whole, newest = assembled.config, latest_step(folder)
        stage = stages.begin(whole, saved, newest or 0)
        config = stage.config
        method = method_of_run(config, assembled.tokenizers)
        assembled = startup.begin(assembled, method, saved)
        program = build(config, method, mesh)
        split = program.split
        check_encoded(config, assembled if saved is None else None, split.trained)

        # 2. Data, and who observes the run, whose own data may not be there.
        went_back = rollback.read(folder)
        data = _open_data(config, stage, assembled, method, mesh, went_back)
        observers = Observers(config, method, assembled.tokenizers, mesh, folder, hooks)

        # 3. What is frozen, and what was saved, each array straight to where it belongs.
        checkpoints = Checkpoints(
            folder, keep_last=config.train.keep_last, keep_every=config.train.keep_every
        )
        frozen = startup.place_frozen(
            whole, folder, assembled, method, program, observers.gallery.encode, saved=saved
        )
        done = 0
        state: State = {}
        position: dict[str, Any] = {}
        if newest is not None:
            done, state, position, _ = checkpoints.restore(program.state, newest)
        if done > stage.first:  # at its beginning a stage has data of its own
            data.set_state(position["iterator"])

        # 4. The step, compiled before the first batch is asked for. (Other shapes when they come.)
        # It takes longest, and other cores: what else takes a while is done meanwhile.
        train_step = Steps(program, config)
        named = [image.name for image in config.data.images]
        downscale = config.model.vae.downscale
        first_batch = with_pictures(program.batch, data.next_shape, downscale, named)
        with train_step.compiling(first_batch) as compiling:
            if newest is None:
                params = startup.initial_params(config, method, assembled, split, mesh)
                state = jax.jit(program.fresh, out_shardings=program.state_shardings)(params)
            compiled = compiling.result()
        announce.announce(config, assembled, split, mesh, folder, done, compiled)

        # 5. The metrics of each step, two steps late.
        telemetry = Telemetry(
            folder,
            total_steps=whole.train.steps,
            batch_size=config.data.batch_size,
            start_step=done,
            images_seen=functools.partial(stages.images_seen, whole),
            flops_per_image=mfu_flops(config),
            trackers=open_trackers(whole, folder),
            exporter=open_exporter(whole, folder, batch_size=config.data.batch_size, start=done),
        )
        announce.announce_data(data.summary, telemetry, done)
        monitor = Monitor(
            config,
            telemetry,
            folder,
            assembled.tokenizers,
            jax.jit(make_lr_schedule(config.optim, whole.train.steps)),
            data.examples_per_epoch,
            rollbacks=len(went_back),
            first=stage.first,
        )
        if done:
            monitor.resume(state["health"])
        if done > stage.first:  # what was usual in one stage is not in the next
            monitor.set_state(position["watch"])
            observers.set_state(position)

    def save() -> None:
        monitor.flush()
        with telemetry.pause():
            telemetry.flush()  # a kill after the save must not lose lines from before it
            position = {"iterator": data.get_state(), "watch": monitor.get_state()}
            checkpoints.pin(observers.selection.step)
            began, position = time.time(), position | observers.get_state()
            if checkpoints.save(done, state, position, to_dict(whole)):
                telemetry.saving(done, began)

    # 6. The steps.
    profiler = DataProfiler(folder, assembled.tokenizers)
    try:
        with StopSignal() as stop, telemetry, checkpoints:
            if done == 0:
                telemetry.hparams(to_dict(whole))
            while done < stage.end and not observers.selection.stops:
                done += 1
                shape = data.next_shape
                with monitor.waiting():
                    own = next(data)
                    batch = global_batch(own, mesh)
                profiler.observe(own)
                if done == 1:
                    every = {**frozen, **state["params"]}
                    with telemetry.pause():
                        prediction_check.warn(config, assembled, method, every, batch, mesh)
                if not train_step.has(batch):
                    monitor.flush()
                    with telemetry.pause():
                        announce.announce_shape(shape, train_step.compile(batch), telemetry)
                state, metrics = train_step(state, frozen, batch)
                monitor.push(done, batch, metrics)
                if checkpoints.check():
                    telemetry.saved()

                if observers.due(done, asked=wishes.draws_after(done)):
                    monitor.flush()
                    with telemetry.pause():
                        observers.observe(done, state, frozen, telemetry)
                if observers.wants_checkpoint(done, stage.end):
                    save()
                signalled, wished = stop.requested(done), wishes.stops_after(done)
                if (signalled or wished) and done < whole.train.steps:
                    save()
                    checkpoints.wait()
                    telemetry.saved()
                    why = "by a signal" if signalled else "as asked on the page"
                    telemetry.message(
                        f"stopped {why} after step {done} and saved; run the same command again "
                        "to go on"
                    )
                    return STOPPED if signalled else DONE
            monitor.flush()
            checkpoints.wait()
            telemetry.saved()
            if done < whole.train.steps and not observers.selection.stops:
                return None

            # 7. Pictures, a diffusers folder, and where it all is.
            finite = finish(config, method, assembled, state, frozen, observers, telemetry, folder)
            return DONE if finite else DIVERGED
    except Diverged:
        return DIVERGED
    finally:
        profiler.close()
        data.close()


def _open_data(
    config: Config,
    stage: stages.Segment,
    assembled: Assembled,
    method: Method,
    mesh: Mesh,
    went_back: Sequence[Mapping[str, Any]],
) -> BatchIterator:
    """This host's share, without the batches that the run has gone back for."""
    share = shares(mesh)[jax.process_index()]
    data = make_iterator(
        config.data,
        assembled.tokenizers,
        number_shapes=method.numbers,
        split=config.data.split,
        seed=stage.seed,
        process_index=share.index,
        process_count=share.count,
    )
    data.pass_over(event["batch"] for event in went_back if event["first"] == stage.first)
    agreement.check_data(data.get_state(), data.summary.lines)
    return data
