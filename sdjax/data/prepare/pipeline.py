"""A run of prepare: three Beam pipelines, and the steps between them that need all shards."""

from __future__ import annotations

import contextlib
import functools
import json
import logging as std_logging
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sdjax.data.prepare import cleaning, duplicates, report, writing
from sdjax.data.prepare.index import Index, IndexEntry, read_index
from sdjax.data.prepare.settings import Settings, Workspace, assign_splits, identity
from sdjax.data.raw import formats
from sdjax.data.raw.remedies import unusable
from sdjax.data.raw.rows import Shard, Survey
from sdjax.data.tfds.dataset_folder import write_metadata
from sdjax.errors import UserError
from sdjax.system import locks, paths, progress, text_files, untrusted

std_logging.disable(std_logging.WARNING)  # Beam warns that it cannot reach BigQuery
import apache_beam as beam  # noqa: E402

std_logging.disable(std_logging.NOTSET)

STATE = "prepare.json"
_OPTIONS = {
    name: f"--{name}"
    for name in (
        "format", "image_key", "text_key", "min_caption_chars", "max_caption_chars",
        "drop_pattern", "min_side", "max_aspect", "max_pixels", "convert_modes", "score",
        "outside_links",
    )
}  # fmt: skip


def run(
    input: str,
    settings: Settings,
    workspace: Workspace,
    *,
    workers: int,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Prepare a dataset, or finish a killed run, and return the report.

    workers: processes of this machine; 1 works in this one. beam_options: for another runner.
    Raises UserError when nothing is usable, or the output is that of another run.
    """
    with progress.work("looking at the input"):
        survey = formats.survey(
            input, settings.format, settings.fields, outside=settings.outside_links
        )
        fingerprint = formats.fingerprint(survey.shards, settings.fields)
    shards = survey.shards
    workers = min(workers or os.cpu_count() or 1, len(shards))
    make = functools.partial(_pipeline, workers=workers, options=tuple(beam_options))
    make()  # it refuses wrong options before any work
    key = identity(settings, fingerprint)
    done = _begin(workspace, key)
    if done is not None:
        print(f"{workspace.folder} is finished already", file=sys.stderr)
        return done
    stored = {split for shard in shards for split in shard.splits}
    notes = [*survey.lines(), *settings.cuts(stored)]
    for note in notes:
        print(note, file=sys.stderr, flush=True)
    _clean(make, shards, settings, workspace)
    indices = [read_index(workspace, number) for number in range(len(shards))]
    if not any(index.entries for index in indices):
        raise UserError(_nothing_usable(input, survey, indices, workspace, settings))
    dropped = _find_duplicates(make, len(shards), settings, workspace)
    kept = _split(indices, dropped, stored, settings)
    outputs = writing.plan(f"prepared_{key}", kept, shard_bytes=settings.shard_mb << 20)
    missing = [output for output in outputs if not (workspace.folder / output.file).exists()]
    files = [output.file for output in missing]
    with progress.work("writing", len(files), unit="files", poll=_there(workspace.folder, files)):
        _each(make, missing, functools.partial(writing.write_output, workspace=workspace))
    found = report.make(settings, survey, notes, indices, dropped, kept, outputs)
    report.write(found, indices, dropped, workspace, settings)
    description = f"Made by sdjax.prepare, {sum(found['splits'].values())} examples."
    write_metadata(
        workspace.folder,
        dataset=outputs[0].dataset,
        features=cleaning.features(settings.scores, settings.fields.images),
        splits=writing.stored(outputs),
        description=description,
    )
    paths.write_text(workspace.folder / STATE, json.dumps({"identity": key}))
    writing.remove_work(workspace)
    return found


def _nothing_usable(
    input: str, survey: Survey, indices: list[Index], workspace: Workspace, settings: Settings
) -> str:
    """The message that nothing is usable; write the report and remove intermediate files."""
    found = report.make(settings, survey, survey.lines(), indices, {}, [], [])
    report.write(found, indices, {}, workspace, settings)
    writing.remove_work(workspace)
    skips = [skip for index in indices for skip in index.skips]
    reasons = dict(Counter(skip.reason for skip in skips))
    return (
        f"--input is {input!r}, of which not one image can be used: {reasons}; expected images, "
        f"each with a caption (--text_key is {settings.fields.text!r})"
        f"{unusable(skips, found['passed_over'], _OPTIONS)}"
        f"\n  {workspace.folder / report.HTML} lists them"
    )


def _begin(workspace: Workspace, key: str) -> dict[str, Any] | None:
    """Make the work folder, or check that it is this run's; return the report if all is done."""
    if paths.exists(workspace.folder / STATE):
        state, finished = workspace.folder / STATE, True
    else:
        state, finished = workspace.work / STATE, False
        paths.make_folder(workspace.work)
        if not state.exists():
            there = {path.name for path in workspace.folder.iterdir() if not locks.is_lock(path)}
            # A run that could use nothing leaves its report, which may be replaced.
            others = sorted(there - {"work", report.JSON, report.HTML, report.DROPPED})
            if others:
                raise UserError(f"--output is {str(workspace.folder)!r}, which holds {others[:5]}; "
                                "expected a folder that is empty or not there")  # fmt: skip
            workspace.write_json(state, {"identity": key})
    if text_files.read_object(state).get("identity") != key:
        raise UserError(
            f"--output is {str(workspace.folder)!r}, which holds "
            f"{'the dataset' if finished else 'the beginning'} of a run with other options, or of "
            "input that has changed since; delete it or set another --output"
        )
    if not finished:
        return None
    if workspace.work.exists():  # the run was killed at the very end
        writing.remove_work(workspace)
    return text_files.read_object(workspace.folder / report.JSON, most=untrusted.MOST_TEXT)


def _clean(make: Any, shards: list[Shard], settings: Settings, workspace: Workspace) -> None:
    """Clean all shards that are not clean."""
    jobs = [job for job in enumerate(shards) if not workspace.index(job[0]).exists()]
    poll = cleaning.how_far(workspace, [number for number, _ in jobs])
    with progress.work("cleaning", len(jobs), poll=poll):
        _each(
            make,
            jobs,
            functools.partial(cleaning.clean_shard, workspace=workspace, settings=settings),
        )


def _find_duplicates(
    make: Any, shards: int, settings: Settings, workspace: Workspace
) -> dict[int, tuple[str, int]]:
    """The dropped examples: {position: (reason, the position of the kept one)}."""
    if settings.duplicates == "none":
        return {}
    target = workspace.work / "duplicates.json"
    if not target.exists():
        distance = settings.near_distance if settings.duplicates == "near" else None
        folder = workspace.work / "pairs"
        paths.make_folder(folder)
        with progress.work("looking for duplicates"), _own_errors(), make() as pipeline:
            _ = (
                duplicates.find(
                    pipeline, list(range(shards)), workspace=workspace, distance=distance
                )
                | "batches" >> beam.BatchElements(min_batch_size=1000, max_batch_size=100_000)
                | "write pairs" >> beam.Map(duplicates.write_pairs, workspace=workspace)
            )
        # Pairs of a killed run may be among them: they are the same.
        pairs = {pair for file in folder.iterdir() for pair in _pairs(file)}
        workspace.write_json(target, sorted(duplicates.resolve(pairs).items()))
    with untrusted.explained(target, "the duplicates of a run", remedy="delete it"):
        return {later: (reason, kept) for later, (reason, kept) in _read(target)}


def _pairs(file: paths.Path) -> set[duplicates.Pair]:
    """The pairs of duplicates that a part of the run has found."""
    with untrusted.explained(file, "pairs of duplicates", remedy="delete its folder"):
        return {(int(first), int(later), str(kind)) for first, later, kind in _read(file)}


def _read(file: paths.Path) -> Any:
    """A value that a part of the run has left, as large as the dataset asks for."""
    return text_files.read_json(file, most=untrusted.MOST_TEXT)


def _split(
    indices: list[Index], dropped: dict[int, Any], stored: set[str], settings: Settings
) -> list[tuple[int, int, IndexEntry, str]]:
    """The (shard, row, entry, split) of all that is kept, in order."""
    left = [
        (shard, row, entry)
        for shard, index in enumerate(indices)
        for row, entry in enumerate(index.entries)
        if duplicates.position(shard, row) not in dropped
    ]
    names, found = [e.name for *_, e in left], [e.split for *_, e in left]
    splits = assign_splits(names, found, stored, settings)
    return [(*item, split) for item, split in zip(left, splits, strict=True)]


def _there(folder: paths.Path, names: Sequence[str]) -> Callable[[], float]:
    """A function that returns how many of the files exist."""
    return lambda: len({path.name for path in folder.iterdir()}.intersection(names))


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """A context that raises a worker's error of this package again, without Beam's additions.

    Beam adds its place, and puts the traceback of another process into the message of an error of
    its own.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        raised = list(re.finditer(r"^sdjax\.[\w.]+: ", text, re.M))
        if raised:
            text = text[raised[-1].end() :]
        elif not isinstance(error, UserError):
            raise
        raise UserError(text.partition(" [while running ")[0].strip()) from None


def _each(make: Any, jobs: Sequence[Any], work: Callable[[Any], Any]) -> None:
    """Do every job in the processes of the runner."""
    if jobs:
        with _own_errors(), make() as pipeline:
            _ = pipeline | beam.Create(jobs) | beam.Reshuffle() | beam.Map(work)


def _pipeline(*, workers: int, options: Sequence[str]) -> Any:
    """A Beam pipeline for the runner of the options, or for processes of this machine.

    Raises UserError when the options do not fit the runner.
    """
    from apache_beam.options.pipeline_options import PipelineOptions

    # Beam logs the traceback of a worker's error, which the error itself has too.
    std_logging.getLogger("apache_beam").setLevel(std_logging.CRITICAL)
    parsed = PipelineOptions(list(options))
    unknown = sorted(
        set(parsed.get_all_options(retain_unknown_options=True)) - set(parsed.get_all_options())
    )
    if not any(option.startswith("--runner=") for option in options):
        if unknown:
            raise UserError(f"Beam has no option --{unknown[0]} on this machine; set --runner=... "
                            "for another, or leave it out")  # fmt: skip
        return _local_pipeline([f"--direct_num_workers={workers}", *options], workers)
    if unknown:
        print(f"no options of Beam itself, so for the runner: {unknown}", file=sys.stderr)
    try:
        return beam.Pipeline(options=parsed)
    except (ValueError, ImportError) as error:
        raise UserError(f"Beam refuses {list(options)}: {error}") from error


def _local_pipeline(options: list[str], workers: int) -> Any:
    """A pipeline set up as by DirectRunner, which itself may download a runner."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import fn_runner
    from apache_beam.runners.portability.portable_runner import JobServiceHandle
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    # The workers need no other option. Without this one they log much that is of no use.
    encoded = JobServiceHandle.encode_pipeline_options(
        {"default_sdk_harness_log_level": "CRITICAL"}
    )
    info = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    command = f"{shlex.quote(sys.executable)} -m sdjax.data.prepare.worker"
    processes = SubprocessSDKEnvironment.from_command_string(command) if workers > 1 else None
    runner = fn_runner.FnApiRunner(
        default_environment=processes, provision_info=fn_runner.ExtendedProvisionInfo(info)
    )
    return beam.Pipeline(runner=runner, options=PipelineOptions(options))
