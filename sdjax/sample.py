"""Draw pictures from prompts.

    python -m sdjax.sample --model=DIR --prompts="a red circle" --prompts="a blue square"
    --output=out

DIR is a workdir of sdjax or a diffusers folder. Each picture is a PNG that carries its settings;
grid.png shows them all with their prompts. A picture depends on its number, the seed and the
settings alone, not on the batch size.

Why a picture is as it is: --explain shows where each word went, --trajectory how the picture came
out of the noise, --interpolate what lies between two prompts or two seeds. docs/explaining.md has
examples. Exit codes: 0 done; 2 the input or an option is wrong, or a file cannot be written; 130
Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take a while
    from sdjax.system.interrupts import install

    install("the same command draws the pictures again")

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from absl import logging

from sdjax.errors import UserError, explain
from sdjax.sampling.inputs import read_latents, read_prompts, repeated, write_metadata
from sdjax.sampling.options import (
    add_condition_options,
    add_drawing_options,
    add_explaining_options,
    add_model_options,
    add_network_options,
    add_picture_options,
    add_prompt_options,
    add_run_options,
    check_run,
    check_together,
    guidance_changes,
    sampler_changes,
)
from sdjax.system import locks, paths, progress
from sdjax.system.allocator import use_large_pages

if TYPE_CHECKING:
    import numpy as np

    from sdjax.diffusion.samplers import SamplerConfig
    from sdjax.families.embeddings import Embedding
    from sdjax.families.family import Model
    from sdjax.sampling.ensemble import Expert
    from sdjax.sampling.request import SamplingRequest


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    own = "the model's own by default"
    p = argparse.ArgumentParser(
        prog="python -m sdjax.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(p)
    add_prompt_options(p)
    p.add_argument("--output", required=True, help="folder for the pictures")
    p.add_argument(
        "--count", type=int,
        help="so many pictures, of the prompts in turn, and metadata.jsonl with their prompts, so "
        "that the folder can be trained on; one of each prompt by default",
    )  # fmt: skip
    add_run_options(p, own=own)
    p.add_argument(
        "--original_size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"),
        help="SDXL: the size that the picture is to look as if it had been; its own by default",
    )  # fmt: skip
    p.add_argument(
        "--crop", nargs=2, type=int, metavar=("TOP", "LEFT"), default=[0, 0],
        help="SDXL: the corner it is to look cropped at (0 0)",
    )  # fmt: skip
    p.add_argument(
        "--latents", metavar="FILE",
        help=".npy with the initial noise, standard normal, one for each prompt: [N, h, w, C], or "
        "[N, C, h, w] as torch has it",
    )  # fmt: skip
    p.add_argument(
        "--same_noise", action="store_true",
        help="start all pictures from the noise of the first: they differ by their prompts alone",
    )  # fmt: skip
    add_drawing_options(p.add_argument_group("how to get from noise to picture"), own=own)
    add_picture_options(p.add_argument_group("pictures to begin with"))
    steering = p.add_argument_group("networks that steer")
    add_network_options(steering)
    add_condition_options(steering)
    add_explaining_options(p.add_argument_group("why the pictures are as they are"))
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, draw, and give the exit code."""
    args = parser().parse_args(argv)
    from sdjax.checkpoints.checkpoint import CheckpointError
    from sdjax.train.startup import enable_compilation_cache

    enable_compilation_cache("")  # the second drawing of a shape compiles nothing
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    try:
        with progress.shown():
            done = sample(args)
        print(done)
    except paths.storage_errors(CheckpointError, ValueError, FloatingPointError) as error:
        return explain(error)
    return 0


def _sampler(model: Model, args: argparse.Namespace, name: str = "") -> SamplerConfig:
    """The model's own sampler with what the options change."""
    from sdjax.families.sampler import choose_sampler, sampler_note

    name = name or f"--model={args.model[0]}"
    sampler = choose_sampler(model, sampler_changes(args), name)
    if note := sampler_note(model, sampler, name):
        print(note, file=sys.stderr)
    return sampler


def _check_model(model: Model, args: argparse.Namespace, name: str) -> None:
    """Check that a model can draw, and that the options are for it.

    Raises:
        UserError: something that drawing takes is missing, or an option is not for this model.
    """
    from sdjax.data.numbers import of_geometry
    from sdjax.sampling.generate import check_guidance

    if model.missing():
        raise UserError(
            f"{name} has {', '.join(model.networks) or 'no network'} only; drawing "
            f"takes {model.family.denoiser}, vae, and a text encoder with its tokenizer"
        )
    check_guidance(model, guidance_changes(args), name)
    takes_geometry = bool(of_geometry(model.family.numbers, model.native_size))
    if not takes_geometry and (args.original_size or any(args.crop)):
        raise UserError(f"--original_size and --crop are for SDXL; {name} is not one")


def _tell_truncated(model: Model) -> None:
    tokenizer = max(model.tokenizers.values(), key=lambda own: own.context_length)
    if tokenizer.truncated:
        marks = tokenizer.marks_before + tokenizer.marks_after
        print(
            f"note: {tokenizer.truncated} of the prompts are longer than "
            f"{tokenizer.context_length - marks} tokens and were cut",
            file=sys.stderr,
        )


def _tell_words(words: Sequence[Embedding], texts: Sequence[str]) -> None:
    """Say which of the words that were learnt no prompt has: it would be without effect."""
    for word in words:
        if not any(word.token.lower() in text.lower() for text in texts):
            print(f"note: no prompt has the word {word.token!r} of --embedding", file=sys.stderr)


def _numbers(
    args: argparse.Namespace, model: Model, count: int, height: int, width: int
) -> dict[str, np.ndarray]:
    """The numbers of the geometry that the model takes, [count, ...]."""
    import numpy as np

    from sdjax.data.numbers import of_geometry

    original = args.original_size or (height, width)
    found = of_geometry(model.family.numbers, tuple(original), tuple(args.crop))
    return {field: np.tile(value, (count, 1)) for field, value in found.items()}


def _request(args: argparse.Namespace, prompts: list[str]) -> SamplingRequest:
    """Return the pictures to draw, with all that they depend on."""
    from sdjax.checkpoints.controls import read_control
    from sdjax.sampling.about import refining
    from sdjax.sampling.control_options import with_controls
    from sdjax.sampling.ensemble import with_experts, with_others, with_refiner
    from sdjax.sampling.ip_options import with_ip_adapters
    from sdjax.sampling.pictures import with_pictures

    name = f"--model={args.model[0]}"
    request = _request_of(args, prompts, args.model[0], name, loras=args.lora)
    size = tuple(side * request.model.vae.downscale for side in request.shape[:2])
    if len(args.model) > 1:
        names = [(f"--model={folder}", folder) for folder in args.model[1:]]
        others = [(n, _request_of(args, prompts, folder, n, size)) for n, folder in names]
        request = with_others(request, others)
    if args.expert:
        request = with_experts(request, [_expert(args, prompts, one, size) for one in args.expert])
    request = with_pictures(request, args.init_image, args.mask_image, args.strength)
    read = partial(read_control, weights=args.weights)
    request = with_controls(request, args.controlnet, args.control_image, args.guess_mode, read)
    request = with_ip_adapters(request, args.ip_adapter, args.ip_image, args.image_encoder, read)
    if args.refiner is None:
        return request
    name, start = f"--refiner={args.refiner}", refining(args)["refiner_start"]
    refiner = _request_of(args, prompts, args.refiner, name, size)
    return with_refiner(request, refiner, start, name=name)


def _expert(
    args: argparse.Namespace, prompts: list[str], option: str, size: tuple[int, ...]
) -> tuple[Expert, SamplingRequest]:
    """Return an expert that --expert names, and the pictures as it draws them."""
    from sdjax.checkpoints.experts import read_expert_option
    from sdjax.sampling.ensemble import Expert

    folder, levels = read_expert_option(option)
    name = f"--expert={option}"
    request = _request_of(args, prompts, folder, name, size, args.lora)
    return Expert(name, request.model, levels), request


def _request_of(
    args: argparse.Namespace,
    prompts: list[str],
    folder: str,
    name: str,
    size: tuple[int, ...] | None = None,
    loras: Sequence[str] = (),
) -> SamplingRequest:
    """Return the pictures as one model draws them.

    Args:
        name: of the model, for messages; size: height and width if no option has to say them.
        loras: adapters for it, as --lora names them.
    """
    import jax.numpy as jnp
    import numpy as np

    from sdjax.checkpoints.adapters import with_loras
    from sdjax.checkpoints.reading import read_any
    from sdjax.families.conditioning import encode_text, with_text_length
    from sdjax.formats.embeddings import with_files
    from sdjax.sampling.a1111 import with_weights
    from sdjax.sampling.generate import drawing_of, latent_shape, settings_of
    from sdjax.sampling.request import SamplingRequest

    model = with_loras(read_any(folder, weights=args.weights), loras)
    if args.max_sequence_length is not None:
        model = with_text_length(model, args.max_sequence_length, name)
    _check_model(model, args, name)
    model, words = with_files(model, args.embedding)
    if folder == args.model[0]:
        _tell_words(words, [*prompts, args.negative_prompt or ""])
    rows, columns = size or model.native_size
    height, width = args.height or rows, args.width or columns
    shape = latent_shape(model, height, width)
    weighted = args.prompt_syntax == "a1111"
    texts = [*prompts, args.negative_prompt or ""]
    tokens = encode_text(model.tokenizers, [""] * len(texts) if weighted else texts)
    _tell_truncated(model)
    batch = {field: rows[:-1] for field, rows in tokens.items()}
    batch |= _numbers(args, model, len(prompts), height, width)
    request = SamplingRequest(
        model=model,
        dtype=args.dtype,
        drawing=drawing_of(settings_of(model), _sampler(model, args, name), guidance_changes(args)),
        params={path: jnp.asarray(value) for path, value in model.params.items()},
        texts=prompts,
        prompts=batch,
        negative={field: rows[-1] for field, rows in tokens.items()},
        shape=shape,
        seed=args.seed,
        batch_size=args.batch_size,
        latents=read_latents(args.latents, len(prompts), shape) if args.latents else None,
        positions=np.arange(len(prompts)) * (not args.same_noise),
    )
    return with_weights(request, texts[-1]) if weighted else request


def sample(args: argparse.Namespace) -> str:
    """Draw what the options of `parser` say.

    Returns:
        A line that says what was drawn and where it is.

    Raises:
        UserError and its kin: the model or an option is wrong.
        FloatingPointError: a picture has NaN pixels.
    """
    from sdjax.sampling import explain, interpolate, trajectory
    from sdjax.sampling.about import settings_of_request
    from sdjax.sampling.control_options import control_settings
    from sdjax.sampling.grids import grid, save_png
    from sdjax.sampling.pictures import picture_settings

    check_run(args)
    check_together(args)
    prompts = repeated(read_prompts(args.prompts, args.prompts_file), args.count)
    output = paths.to_path(args.output)
    with locks.held(output, "--output", "sdjax.sample"):
        request = _request(args, prompts)
        looks: dict[str, Any] = {}
        if args.explain:
            looks["words"] = explain.Explanation(request, args.explain_layers, args.explain_steps)
        if args.trajectory is not None:
            looks["steps"] = trajectory.Steps(request, args.trajectory or None, args.animation)
        ways = args.interpolate is not None and interpolate.plan_ways(
            request, args.interpolate, args.interpolate_seeds
        )
        images, seen = request.draw([look.callback for look in looks.values()])
        settings = settings_of_request(args, request)
        for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            own = picture_settings(
                request.model, args.init_image, args.mask_image, args.strength, i
            )
            own |= control_settings(args, number=i, count=len(prompts))
            about = {"prompt": prompt, "number": i, **settings, **own}
            save_png(output / f"{i:05d}.png", image, about)
            for look, states in zip(looks.values(), seen, strict=True):
                look.write(output, i, image, states, about)
        save_png(output / "grid.png", grid(images, prompts))
        if args.count is not None:
            write_metadata(output, [f"{i:05d}.png" for i in range(len(prompts))], prompts)
        if ways:
            interpolate.draw_ways(
                output, request, ways, images, args.interpolate_seeds, settings, args.animation
            )
        return f"{len(images)} pictures in {output}, together in {output / 'grid.png'}"


if __name__ == "__main__":
    use_large_pages()
    sys.exit(main())
