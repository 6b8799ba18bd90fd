"""Say how good a model is, in the field's own numbers, with intervals.

    python -m sdjax.evaluate --model=WORKDIR
    python -m sdjax.evaluate --model=WORKDIR --metrics=validation_loss
    python -m sdjax.evaluate --model=DIFFUSERS_FOLDER --dataset=PICTURES --output=out \\
        --inception=pt_inception-2015-12-05-6726825d.pth --clip=clip-vit-large-patch14
    python -m sdjax.evaluate --images=FOLDER --dataset=PICTURES --output=out --metrics=fid \\
        --inception=FILE
    python -m sdjax.evaluate --model=VAE --dataset=PICTURES --output=out --lpips=VGG16_FILE
    python -m sdjax.evaluate --model=NEW --against=OLD --output=out

It draws pictures of the captions of a dataset's held-out split, and compares them with the pictures
of that split. Stop it at any time: the same command goes on, to the same answer. What it needs and
does not have it leaves out, and says so.

  metric            better  what it says                                          it takes
  fid, kid          less    how far the pictures are from real ones, as a whole   --inception
  cmmd              less    the same, by CLIP, which sees more of the content     --clip
  clip_score        more    whether pictures show what their captions say         --clip
  precision         more    share of pictures that look real                      either of them
  recall            more    share of real pictures that the model could draw      either of them
  density, coverage more    the same two, less moved by outliers                  either of them
  diversity         more    how different pictures of one prompt are              either of them
                            (--per_prompt=4), 0 where they are all the same
  memorised         less    share of pictures closer to a training picture than   -
                            95 % of held-out pictures are: 0.05 without copying
  fidelity          more    colours, shapes, number and relations that are right  captioned_shapes
  inside_error      less    how far pictures are from those whose masks they      a model that fills
  outside_error             fill: mean difference of pixels, 0 to 1, in the mask  masks
                            and outside of it
  validation_loss   less    the loss on held-out pictures, and at each timestep   a workdir
  example_loss      less    the same of every picture of --split alone; a table    a workdir, and
                            and a page of the worst and best: bad captions show    to be asked for
  robustness        -       how far pictures move under misspelt, shuffled,         to be asked for
                            upper-case and empty prompts, and turned noise

An autoencoder makes the pictures of the held-out split again, and has metrics of its own:

  psnr              more    peak signal-to-noise ratio, in dB                      -
  ssim              more    structural similarity                                  -
  lpips             less    how different they look, by VGG16                      --lpips
  rfid              less    distance of both sets of pictures, as fid              --inception

and the mean and deviation of each channel of its latents, with the scaling_factor that they imply.

With --against, the same prompts are drawn from the same noise by another model: how often pictures
win by each of their scores, and how far each metric moved.

In --output: metrics.json, metrics.png (with the 95 % intervals), grid.png, nearest.png (the
pictures closest to training pictures, beside these), images/ (all pictures, with their prompts),
example_loss.jsonl and example_loss.html, comparison.json.

Exit codes: 0 done; 2 the input or an option is wrong, or a file cannot be written; 130 Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take a while
    from sdjax.system.interrupts import install

    install("the same command goes on")

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from absl import logging

from sdjax.evaluation.options import (
    add_data_options,
    add_judging_options,
    add_picture_options,
    add_reading_options,
)
from sdjax.sampling.options import (
    add_expert_option,
    add_lora_option,
    check_run,
    guidance_changes,
    sampler_changes,
)
from sdjax.system import locks, paths, progress
from sdjax.system.allocator import use_large_pages

if TYPE_CHECKING:
    from sdjax.evaluation.loading import Loaded
    from sdjax.evaluation.losses import ExampleLosses
    from sdjax.evaluation.request import Request
    from sdjax.families.family import Model


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    p = argparse.ArgumentParser(
        prog="python -m sdjax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--model", action="append", default=[],
        help="workdir of sdjax, or a diffusers folder; given again, the mean of the predictions of "
        "models, as sdjax.sample has it",
    )  # fmt: skip
    add_expert_option(p)
    add_lora_option(p)
    p.add_argument(
        "--against", action="append", default=[], metavar="DIR",
        help="a model to compare with, drawn from the same prompts and noise, or the --output of "
        "an evaluation that was: how often pictures win by each score, with the interval, and how "
        "far each metric moved (comparison.json); may be given again",
    )  # fmt: skip
    p.add_argument(
        "--images", default="", metavar="DIR",
        help="judge the pictures of this folder in place of drawing; captions are those of its "
        "metadata.jsonl, if it has one",
    )  # fmt: skip
    p.add_argument(
        "--output", default="",
        help="folder for all that is found; WORKDIR/evaluations/STEP-WEIGHTS-DATASET by default",
    )  # fmt: skip
    p.add_argument(
        "--metrics", default="", metavar="NAME,NAME,...",
        help="which of those above, as fid,clip_score; by default all that can be had, but for "
        "those that are to be asked for",
    )  # fmt: skip
    p.add_argument(
        "--audit", default="", metavar="FILE",
        help="draw the prompts of this yaml file and count how often pictures show which attribute "
        "(docs/evaluation.md has one); without --metrics, that alone",
    )  # fmt: skip
    p.add_argument(
        "--ema_lengths", default="", metavar="LOW:HIGH:COUNT",
        help="find the best length of average of a run with EMA snapshots, as 0.02:0.2:10: so many "
        "relative widths between the two, judged by the first of --metrics (validation_loss)",
    )  # fmt: skip
    p.add_argument(
        "--resamples", type=int, default=1000,
        help="of the bootstrap of the intervals; 0 for none; kid and cmmd, where one costs more, "
        "use at most 200 (%(default)s)",
    )  # fmt: skip
    add_data_options(p)
    add_judging_options(p)
    add_picture_options(p)
    add_reading_options(p)
    _add_hosts_options(p)
    return p


def _add_hosts_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group(
        "several hosts", "every one runs the same command; SLURM, Open MPI and Cloud TPU say by "
        "themselves who is who. They must share --output."
    )  # fmt: skip
    group.add_argument("--coordinator", default="", help="HOST:PORT of process 0; any free port")
    group.add_argument("--num_processes", type=int, default=0, help="how many run together")
    group.add_argument("--process_id", type=int, default=-1, help="which of them this is, from 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, evaluate, and give the exit code."""
    args = parser().parse_args(argv)
    from sdjax.checkpoints.checkpoint import CheckpointError
    from sdjax.errors import UserError, explain
    from sdjax.parallel import distributed, hosts

    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    try:
        distributed.join(
            args.coordinator, args.num_processes, args.process_id,
            timeout=300.0, heartbeat_timeout=60.0,
        )  # fmt: skip
    except UserError as error:
        os._exit(explain(error))  # JAX's own way out waits for the hosts that did not come

    def run() -> int:
        import jax

        with progress.shown(jax.process_index() == 0):
            found = evaluate(args)
        tell(found)
        return 0

    try:
        return hosts.together(run)
    except paths.storage_errors(CheckpointError, ValueError, FloatingPointError) as error:
        return explain(error)


def make_request(args: argparse.Namespace) -> Request:
    """The options as `sdjax.evaluation` takes them.

    Raises:
        UserError: one has a value that it cannot have.
    """
    from sdjax.errors import UserError
    from sdjax.evaluation.loading import NetworkOptions
    from sdjax.evaluation.request import Request

    check_run(args)
    if (args.height is None) != (args.width is None):
        raise UserError("--height and --width: give both, or none")
    names = (
        "images", "audit", "dataset", "split", "data_dir", "num_samples", "per_prompt",
        "seed", "weights", "step", "negative_prompt", "batch_size", "dtype",
        "inception", "clip", "download", "features", "lpips", "reference", "reference_samples",
        "train_samples", "validation_examples", "resamples",
    )  # fmt: skip
    return Request(
        model=args.model[0] if args.model else "",
        others=tuple(args.model[1:]),
        experts=tuple(args.expert),
        against=tuple(args.against),
        metrics=tuple(name.strip() for name in args.metrics.split(",") if name.strip()),
        sampler=sampler_changes(args),
        guidance=guidance_changes(args),
        embeddings=tuple(args.embedding),
        size=None if args.height is None else (args.height, args.width),
        lora=tuple(args.lora),
        networks=NetworkOptions(
            tuple(args.controlnet), tuple(args.ip_adapter), args.image_encoder, args.guess_mode
        ),
        named_image=tuple(args.named_image),
        **{name: getattr(args, name) for name in names},
    )


def evaluate(args: argparse.Namespace) -> str:
    """Do what the options of `parser` say.

    Returns:
        A table of what was found, and where it is.

    Raises:
        UserError and its kin: the model, a file or an option is wrong.
        FloatingPointError: a picture has NaN pixels.
    """
    from sdjax.errors import UserError
    from sdjax.evaluation.compare.beside import with_comparisons
    from sdjax.evaluation.evaluation_output import FILE, table
    from sdjax.evaluation.opening import open_session
    from sdjax.evaluation.request import default_output
    from sdjax.train.startup import enable_compilation_cache

    request = make_request(args)
    loaded = _load(args, request) if request.model else None
    if loaded is not None and loaded.found.is_autoencoder:
        return _autoencoder(args, request, loaded)
    if args.embedding and loaded is None:
        raise UserError("--embedding is for a model that draws, not for --images")
    enable_compilation_cache("")
    output = paths.to_path(args.output) if args.output else default_output(request, loaded)
    if args.ema_lengths:
        if not args.output:
            output = output.with_name(f"{output.name}-ema_lengths")
        with _locked(output):
            return _search(args, request, loaded, output)
    with _locked(output):
        session = open_session(request, loaded, output)
        if session.note:
            tell(session.note)
        results = session.run(output)
        if results.examples is not None:
            _write_examples(output, results.examples, f"{request.model}, {session.dataset}")
        if request.against:
            results = with_comparisons(session, results, output, change=_change(args))
    title = f"{request.model or args.images}, {session.dataset} {session.split}"
    return f"{table(title, results)}\n\n{output / FILE}, with the plots and pictures beside it"


def _load(args: argparse.Namespace, request: Request) -> Loaded:
    """Return the model of the options, with those that draw beside it."""
    from sdjax.evaluation.compare.members import with_members
    from sdjax.evaluation.loading import load

    loaded = load(
        request.model, weights=args.weights, step=args.step, loras=args.lora,
        networks=request.networks,
    )  # fmt: skip
    if loaded.found.is_autoencoder:
        return loaded
    change = _change(args)
    loaded = dataclasses.replace(loaded, found=change(loaded.found, f"--model={request.model}"))
    if not (request.others or request.experts):
        return loaded
    return with_members(
        loaded, request.others, request.experts, weights=args.weights, loras=args.lora,
        change=change,
    )  # fmt: skip


def _change(args: argparse.Namespace) -> Callable[[Model, str], Model]:
    """Return what makes of a model and its name the model as the options have it."""
    from sdjax.families.conditioning import with_text_length
    from sdjax.formats.embeddings import with_files

    def change(model: Model, name: str) -> Model:
        if args.max_sequence_length is not None:
            model = with_text_length(model, args.max_sequence_length, name)
        return with_files(model, args.embedding)[0] if args.embedding else model

    return change


def _autoencoder(args: argparse.Namespace, request: Request, loaded: Loaded) -> str:
    """See `evaluate`; for an autoencoder."""
    from sdjax.errors import UserError
    from sdjax.evaluation.autoencoders import open_autoencoder
    from sdjax.evaluation.evaluation_output import FILE, table
    from sdjax.evaluation.request import default_output
    from sdjax.train.startup import enable_compilation_cache

    if args.ema_lengths:
        raise UserError(f"--ema_lengths is for a model that draws; --model={request.model} is none")
    if other := next((name for name in ("others", "experts", "against") if getattr(request, name)),
                     ""):  # fmt: skip
        shown = {"others": "a second --model"}.get(other, f"--{other.removesuffix('s')}")
        raise UserError(f"{shown} is for models that draw; --model={request.model} does not")
    enable_compilation_cache("")
    output = paths.to_path(args.output) if args.output else default_output(request, loaded)
    with _locked(output):
        session = open_autoencoder(request, loaded)
        results = session.run(output)
    title = f"{request.model}, {session.dataset} {session.split}"
    return f"{table(title, results)}\n\n{output / FILE}, with the plots and pictures beside it"


def _write_examples(output: paths.Path, found: ExampleLosses, title: str) -> None:
    """Write the page of the examples that stand out; process 0 does so for all."""
    import jax

    from sdjax.web.examples import write_examples

    if jax.process_index() == 0:
        write_examples(output, found, title)


def _locked(output: paths.Path) -> contextlib.AbstractContextManager[None]:
    """Keep other evaluations out of the folder; process 0 does so for all."""
    import jax

    if jax.process_index() != 0:
        return contextlib.nullcontext()
    return locks.held(output, "--output", "sdjax.evaluate")


def _search(
    args: argparse.Namespace, request: Request, loaded: Loaded | None, output: paths.Path
) -> str:
    """The best length of average."""
    from sdjax.errors import UserError
    from sdjax.evaluation import ema_lengths
    from sdjax.evaluation.choice import ON_REQUEST
    from sdjax.evaluation.evaluation_output import FILE, number
    from sdjax.evaluation.opening import open_session

    members = (*args.lora, *args.embedding, *request.others, *request.experts, *request.against)
    if members or (loaded is not None and loaded.controls):
        raise UserError(
            "--ema_lengths takes averages of a model alone; leave out a second --model, --expert, "
            "--against, --lora, --embedding, --controlnet and --ip_adapter, and give the run of no "
            "network that steers"
        )
    if asked := [name for name in request.metrics[:1] if name in ON_REQUEST]:
        raise UserError(f"--ema_lengths is not judged by {asked[0]}; name another of --metrics")
    lengths = ema_lengths.parse(args.ema_lengths)
    ema_lengths.check(loaded)
    request = dataclasses.replace(request, metrics=request.metrics[:1] or ("validation_loss",))
    session = open_session(request, loaded, output)
    _, best = ema_lengths.search(session, lengths, output, tell=tell)
    return (
        f"\nbest: {best.length:g}, with {best.metric} {number(best.estimate.value)}\n"
        f"make a model of it: {best.command}\n\n{output / FILE}, with the curve beside it"
    )


def tell(line: str) -> None:
    """Print, once for all hosts."""
    import jax

    if jax.process_index() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    use_large_pages()
    sys.exit(main())
