"""The training loop, in chapters. Resuming is calling `run` again with the same arguments."""

from __future__ import annotations

import functools

import jax

from sdjax import paths
from sdjax.config import Config, to_dict
from sdjax.data.pipeline import make_iterator
from sdjax.parallel.batches import global_batch, shares
from sdjax.parallel.mesh import make_mesh
from sdjax.train import agreement, report, rollback, stages, startup
from sdjax.train.checkpoint import Checkpoints, latest_step
from sdjax.train.encode_dataset import check_encoded
from sdjax.train.finish import finish
from sdjax.train.health import Diverged
from sdjax.train.looks import Looks
from sdjax.train.model_flops import mfu_flops
from sdjax.train.monitor import Watch
from sdjax.train.optim import make_lr_schedule
from sdjax.train.preemption import StopSignal
from sdjax.train.program import Steps, build, with_pictures
from sdjax.train.rollback import Spike
from sdjax.train.task import make_task
from sdjax.train.telemetry import Telemetry

DONE, DIVERGED, STOPPED = 0, 3, 75  # exit codes; 75 is EX_TEMPFAIL, "try again later"


def run(config: Config, workdir: str, *, dry_run: bool = False) -> int:
    """Train to `config.train.steps` and write everything into `workdir`.

    Returns:
        An exit code: 0 finished, 3 diverged, 75 stopped by SIGTERM after saving.

    Raises:
        UserError: configuration or input cannot work; the message says what to change.
    """
    while True:
        try:
            code = _train(config, workdir, dry_run)
            if code is not None:
                return code
        except Spike as spike:
            report.announce_line(rollback.record(paths.to_path(workdir), spike))


def _train(config: Config, workdir: str, dry_run: bool) -> int | None:
    """One stage of the run, from its newest checkpoint; None if another stage follows.

    Raises:
        Spike: the run may go back.
    """
    # 1. Devices.
    agreement.check_config(config)
    startup.enable_compilation_cache(config.compilation_cache)
    mesh = make_mesh(config.mesh)
    stages.check(config, mesh)
    if dry_run:
        return report.describe(config, mesh)
    folder = paths.to_path(workdir)
    saved = startup.open_workdir(folder, config)
    agreement.check_shared(folder)

    # 2. Networks, their weights, the tokenizer; what is trained and what is not.
    assembled = startup.load(config, folder, saved)
    whole, tokenizers = assembled.config, assembled.tokenizers
    newest = latest_step(folder)
    stages.check_data(whole, newest or 0)
    if saved is not None:
        stages.check_begun(saved, whole, newest or 0)
    stage = stages.segment_at(whole, newest or 0)
    config, steps = stage.config, whole.train.steps
    task = make_task(config, tokenizers)

    # 3. The state: shapes and shardings, then arrays, each straight to where it belongs.
    program = build(config, task, mesh)
    split = program.split
    check_encoded(config, assembled if saved is None else None, split.trained)
    checkpoints = Checkpoints(
        folder, keep_last=config.train.keep_last, keep_every=config.train.keep_every
    )
    share = shares(mesh)[jax.process_index()]
    data = make_iterator(
        config.data,
        tokenizers,
        with_size="size" in task.example,
        split=config.data.split,
        seed=stage.seed,
        process_index=share.index,
        process_count=share.count,
    )
    went_back = rollback.read(folder)
    data.pass_over(event["batch"] for event in went_back if event["first"] == stage.first)
    agreement.check_data(data.get_state(), data.summary.lines)
    looks = Looks(config, task, tokenizers, mesh, folder)  # here: its splits may not be there
    frozen = startup.place_frozen(whole, folder, assembled, split, mesh, resumed=saved is not None)
    if newest is not None:
        start, state, before, _ = checkpoints.restore(program.state, newest)
        if start > stage.first:
            data.set_state(before["iterator"])
    else:
        start = 0
        params = startup.initial_params(config, task, assembled, split, mesh)
        state = jax.jit(program.fresh, out_shardings=program.state_shardings)(params)
        del params

    # 4. The step, compiled before the first batch is asked for. (Other shapes when they come.)
    train_step = Steps(program, config)
    compiled = train_step.compile(
        with_pictures(program.batch, data.next_shape, config.model.vae.downscale)
    )
    report.announce(config, assembled, split, mesh, folder, start, compiled)

    telemetry = Telemetry(
        folder,
        total_steps=steps,
        batch_size=config.data.batch_size,
        start_step=start,
        images_seen=functools.partial(stages.images_seen, whole),
        flops_per_image=mfu_flops(config),
    )
    report.announce_data(data.summary, telemetry, start)
    watch = Watch(
        config,
        telemetry,
        folder,
        tokenizers,
        make_lr_schedule(config.optim, steps),
        data.examples_per_epoch,
        rollbacks=len(went_back),
        first=stage.first,
    )
    if start:
        watch.resume(state["health"])
    if start > stage.first:  # what was usual in one stage is not in the next
        watch.set_state(before["watch"])
        looks.set_state(before)

    def save(done: int) -> None:
        watch.flush()
        with telemetry.pause():
            telemetry.flush()  # a kill after the save must not lose lines from before it
            position = {"iterator": data.get_state(), "watch": watch.get_state()}
            checkpoints.pin(looks.selection.step)
            checkpoints.save(done, state, position | looks.get_state(), to_dict(whole))

    # 5. The loop.
    try:
        with StopSignal() as stop, telemetry, checkpoints:
            if start == 0:
                telemetry.hparams(to_dict(whole))
            done = start
            while done < stage.end and not looks.selection.stops:
                done += 1
                shape = data.next_shape
                with watch.waiting():
                    batch = global_batch(next(data), mesh)
                if not train_step.has(batch):
                    watch.flush()
                    with telemetry.pause():
                        report.announce_shape(shape, train_step.compile(batch), telemetry)
                state, metrics = train_step(state, frozen, batch)
                watch.push(done, batch, metrics)
                checkpoints.check()
                if looks.due(done):
                    watch.flush()
                    with telemetry.pause():
                        looks.look(done, state, frozen, telemetry)
                if looks.wants_checkpoint(done, stage.end):
                    save(done)
                if stop.requested(done) and done < steps:
                    save(done)
                    checkpoints.wait()
                    telemetry.message(
                        f"stopped by a signal after step {done} and saved; run the same command "
                        "again to go on"
                    )
                    return STOPPED

            if done == stage.end < steps and not looks.selection.stops:
                watch.flush()
                checkpoints.wait()
                return None

            # 6. The end: pictures, a diffusers folder, and where it all is.
            watch.flush()
            checkpoints.wait()
            finish(config, task, assembled, state, frozen, looks, telemetry, folder)
            return DONE
    except Diverged:
        return DIVERGED
    finally:
        data.close()
