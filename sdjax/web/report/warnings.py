"""The warnings of the report: what is wrong with a run, or may be, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sdjax.web.report.data import DataReport
from sdjax.web.report.evaluations import Evaluation
from sdjax.web.report.metrics import Metrics, smooth
from sdjax.web.report.run import Run

DATA_WAIT = 0.05  # of the time
TRUNCATED = 0.01  # of the captions
UNREADABLE = 0.01  # of the examples
RISE = 1.02  # validation loss over its least; the noise on it is fixed, so little is enough
MEMORY = 0.95  # of what the device has


@dataclasses.dataclass(frozen=True)
class Warning:
    """A line of the first chapter. level: "bad", "warn" or "note". remedy: what to do."""

    level: str
    title: str
    remedy: str


def find(
    run: Run,
    metrics: Metrics,
    evaluations: Sequence[Evaluation] = (),
    data: Sequence[DataReport] = (),
    problems: Iterable[str] = (),
) -> list[Warning]:
    """Return the warnings, the worst first. problems: files that cannot be read, one a line."""
    found = [
        *_not_finite(run, metrics),
        *_overfitting(run, metrics),
        *_stopped(run, metrics),
        *_rollbacks(run),
        *_spikes(metrics),
        *_waiting(metrics),
        *_captions(metrics),
        *_examples(metrics, data),
        *_memory(metrics),
        *(Warning("warn", f"Evaluation {e.name}", say) for e in evaluations for say in e.warnings),
        *_files(metrics, problems),
    ]
    order = ("bad", "warn", "note")
    return sorted(found, key=lambda warning: order.index(warning.level))


def _not_finite(run: Run, metrics: Metrics) -> Iterator[Warning]:
    skipped = metrics.get("train/skipped_steps")
    if skipped and skipped.last:
        share = skipped.last / max(metrics.last_step, 1)
        yield Warning(
            "bad" if share > 0.01 else "warn",
            f"{skipped.last:,.0f} of {metrics.last_step:,} steps were skipped ({share:.2%})",
            "Their loss or gradient was NaN or infinite, and they changed nothing. Lower "
            "optim.learning_rate, set optim.clip_norm, or train with model.dtype=float32; if it "
            "is always the same data, look at the batches kept as bad_batch_*.npz.",
        )
    if metrics.nonfinite:
        names = sorted(metrics.nonfinite.items(), key=lambda item: -item[1])
        text = ", ".join(f"{name} ({count:,} lines)" for name, count in names[:6])
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        yield Warning(
            "bad",
            f"NaN or infinite metrics: {text}{more}",
            "The curves have gaps there. A loss that is NaN for a whole interval means that no "
            "step of it counted: treat it as skipped steps.",
        )
    files = list(run.workdir.glob("bad_batch_*.npz")) if run.workdir.exists() else []
    if files:
        yield Warning(
            "warn",
            f"{len(files)} batch(es) with which the run diverged are kept in the workdir",
            f"Open {files[0].name} with numpy and look for pictures that are all one colour, and "
            "for values out of range.",
        )


def _overfitting(run: Run, metrics: Metrics) -> Iterator[Warning]:
    """Validation loss rising since its least while the loss of training examples falls."""
    name, mode = run.best
    curve = metrics.get(name)
    if not curve or mode != "min" or len(curve.values) < 4:
        return
    best = int(curve.values.argmin())
    low, last = curve.values[best], curve.values[-2:].min()
    if best > len(curve.values) - 3 or low <= 0 or last < RISE * low:
        return
    seen = metrics.get(name.replace("validation/", "validation_train/", 1))
    if not seen or len(seen.steps) < 2:
        train = metrics.get("train/loss")
        smoothed = smooth(train) if train else None
        seen = smoothed[0] if smoothed else train
    step = int(curve.steps[best])
    if not seen or seen.values[-1] >= np.interp(step, seen.steps, seen.values):
        return
    yield Warning(
        "bad",
        f"Overfitting: {name} rose by {curve.values[-1] / low - 1:.1%} since step {step:,}, while "
        "the training loss fell",
        f"Use the checkpoint of step {step:,}, or the one nearest to it. Next time stop early "
        "(validation.patience), train on more data, raise optim.weight_decay or "
        "model.unet.dropout, or take a smaller network.",
    )


def _stopped(run: Run, metrics: Metrics) -> Iterator[Warning]:
    """A stop before the last step, by validation.patience."""
    patience, total = run.field("validation.patience", 0), run.field("train.steps", 0)
    name, mode = run.best
    curve = metrics.get(name)
    if not patience or not curve or metrics.last_step >= total:
        return
    best = int(curve.values.argmin() if mode == "min" else curve.values.argmax())
    since = len(curve.values) - 1 - best
    if since >= patience:
        yield Warning(
            "note",
            f"Stopped early at step {metrics.last_step:,} of {total:,}: {name} has not got better "
            f"for {since} validations",
            f"The best is {curve.values[best]:.4g} at step {int(curve.steps[best]):,}, and its "
            "checkpoint is kept. To go on all the same, raise validation.patience and run the "
            "same command.",
        )


def _rollbacks(run: Run) -> Iterator[Warning]:
    if run.rollbacks:
        steps = ", ".join(f"{event['step']:,} ({event['what']})" for event in run.rollbacks[:8])
        yield Warning(
            "warn",
            f"The run went back to a checkpoint {len(run.rollbacks)} time(s), at step {steps}",
            "It went on without the batches that caused it, which rollbacks.json names. More than "
            "a few call for a lower optim.learning_rate, or for a look at those batches.",
        )


def _spikes(metrics: Metrics) -> Iterator[Warning]:
    spikes = metrics.get("train/spikes")
    total = float(spikes.values.sum()) if spikes else 0.0
    if not spikes or not total:
        return
    share = total / max(metrics.last_step, 1)
    worst = int(spikes.steps[spikes.values.argmax()])
    yield Warning(
        "warn" if share > 0.001 else "note",
        f"{total:,.0f} spike(s): a loss or gradient norm far above its running mean, most of them "
        f"around step {worst:,}",
        "A few are harmless. Many call for optim.clip_norm, a longer optim.warmup_steps or a lower "
        "optim.learning_rate.",
    )


def _waiting(metrics: Metrics) -> Iterator[Warning]:
    wait = metrics.get("train/data_wait")
    if not wait:
        return
    later = wait.values[len(wait.values) // 4 :]  # the first lines fill the pipeline
    share = float(later.mean())
    if share > DATA_WAIT:
        yield Warning(
            "warn",
            f"The devices waited for data {share:.1%} of the time",
            "Decode in more processes or threads (data.workers, data.threads), keep more batches "
            "ready (data.prefetch), or encode the data ahead (`python -m sdjax.prepare --encode`).",
        )


def _captions(metrics: Metrics) -> Iterator[Warning]:
    cut, seen = metrics.get("train/truncated_captions"), metrics.get("train/images_seen")
    if not cut or not seen or not seen.last:
        return
    rises = np.diff(cut.values, prepend=0.0)  # it counts from 0 again when a run is resumed
    total = float(np.where(rises >= 0, rises, cut.values).sum())
    share = total / seen.last
    if share > TRUNCATED:
        yield Warning(
            "warn",
            f"{share:.1%} of the captions were longer than the text encoder reads, and were cut",
            "What comes late in them is not learnt. Shorten them, put what matters first, or train "
            "an encoder with more model.text_encoder.max_position_embeddings.",
        )


def _examples(metrics: Metrics, data: Sequence[DataReport]) -> Iterator[Warning]:
    reasons = {
        name.split("not_used_", 1)[1].replace("_", " "): curve.finite.values[-1]
        for name, curve in metrics.curves.items()
        if name.startswith("data/") and "not_used_" in name
    }
    if reasons:
        text = ", ".join(f"{count:,.0f} {reason}" for reason, count in reasons.items())
        yield Warning(
            "note",
            f"Examples of the dataset that are not used: {text}",
            "Correct if you meant to filter them; else look at data.min_score, data.min_side, "
            "data.max_aspect and data.buckets.",
        )
    for report in data:
        lost, total = report.unreadable
        if total and lost / total > UNREADABLE:
            yield Warning(
                "warn",
                f"{lost:,} of {total:,} rows ({lost / total:.1%}) of {report.folder} could not be "
                "read",
                "The data report says which and why; mend or fetch those files again, then run "
                "`python -m sdjax.prepare` once more.",
            )


def _memory(metrics: Metrics) -> Iterator[Warning]:
    peak, limit = metrics.get("device/memory_peak_gib"), metrics.get("device/memory_limit_gib")
    if peak and limit and peak.last > MEMORY * limit.last > 0:
        yield Warning(
            "note",
            f"The devices' memory is nearly full: {peak.last:.1f} of {limit.last:.1f} GiB",
            "A larger batch or resolution will not fit without train.accumulation, model.remat or "
            "a mesh with more fsdp; `python -m sdjax.plan --search` finds one.",
        )


def _files(metrics: Metrics, problems: Iterable[str]) -> Iterator[Warning]:
    if metrics.broken:
        yield Warning(
            "warn",
            f"{metrics.broken:,} of {metrics.lines:,} lines of metrics.jsonl are damaged",
            "They are left out here. A full disk or two runs in one workdir do this.",
        )
    for text in problems:
        yield Warning("warn", "Left out of this report, for it cannot be read", text)
