"""Convert between diffusers folders, sdjax workdirs and single-file checkpoints, without loss.

    python -m sdjax.convert --input=DIFFUSERS_FOLDER --output=WORKDIR
    python -m sdjax.convert --input=WORKDIR --output=DIFFUSERS_FOLDER [--weights=raw]
    python -m sdjax.convert --input=WORKDIR_OR_FOLDER --output=MODEL.safetensors --dtype=float16
    python -m sdjax.convert --input=MODEL.safetensors --output=WORKDIR --tokenizer=FOLDER

A diffusers pipeline (or the folder of one network, as a VAE) and a single file, as AUTOMATIC1111
and ComfyUI read, become a workdir that sdjax.sample, --config.init_from and --config.vae_from
accept. A workdir, or one of its checkpoints (WORKDIR/checkpoints/STEP), becomes a diffusers folder
that torch loads. An --output that ends in .safetensors is a single file; --to says otherwise. In
float32, there and back gives the same bits.

Exit codes: 0 done; 2 the input or an option is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from absl import logging

from sdjax import paths

FORMATS = ("workdir", "diffusers", "single_file")
MAX_SHARD_SIZE = "10GB"  # as in diffusers' save_pretrained
# Options that only one kind of input, or of output, has.
_INPUT_OPTIONS = {
    "variant": "diffusers",
    "step": "workdir",
    "tokenizer": "single_file",
    "config_from": "single_file",
    "prediction_type": "single_file",
    "scaling_factor": "single_file",
}


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    p = argparse.ArgumentParser(
        prog="python -m sdjax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--input",
        required=True,
        help="diffusers folder, workdir of sdjax or .safetensors file to read",
    )
    p.add_argument("--output", required=True, help="folder or .safetensors file to write; new")
    p.add_argument(
        "--to", choices=FORMATS,
        help="what to write; by default a single_file where --output ends in .safetensors, "
        "diffusers for a workdir, and a workdir for anything else",
    )  # fmt: skip
    p.add_argument(
        "--weights", default="ema",
        help="of a workdir: 'ema' (the first average the run keeps; the parameters themselves if "
        "it keeps none), 'raw' (the parameters themselves), or the name of an average, as "
        "'0.9999'; of a single file, 'ema' or 'raw' (%(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of the weights to write; a workdir is float32 (%(default)s)",
    )  # fmt: skip
    _add_file_options(p)
    p.add_argument(
        "--force", action="store_true", help="replace what an earlier conversion wrote to --output"
    )
    return p


def _add_file_options(p: argparse.ArgumentParser) -> None:
    """Those that belong to one kind of input or output."""
    p.add_argument("--step", type=int, help="of a workdir: which checkpoint; the newest by default")
    p.add_argument(
        "--variant", default="",
        help="of a diffusers folder to read: which of its weights, as 'fp16' or 'non_ema'",
    )  # fmt: skip
    p.add_argument(
        "--max_shard_size",
        help="of a file of weights in a diffusers folder to write, as 5GB or 500MB; a network that "
        f"is larger is spread over several ({MAX_SHARD_SIZE})",
    )
    single = p.add_argument_group("of a single file to read, which does not say everything")
    single.add_argument(
        "--tokenizer", default="",
        help="folder with CLIP's vocab.json and merges.txt, as the tokenizer/ of a pipeline",
    )  # fmt: skip
    single.add_argument(
        "--config_from", default="",
        help="diffusers folder or workdir whose configs, schedule and tokenizers are also those of "
        "the file, for models of another shape than the releases; its weights are not read",
    )  # fmt: skip
    single.add_argument(
        "--prediction_type", choices=("epsilon", "v_prediction"), default="",
        help="what the UNet predicts, for Stable Diffusion 2 and fine-tuned others",
    )  # fmt: skip
    single.add_argument(
        "--scaling_factor", type=float, help="of the latents of an autoencoder that is alone"
    )


def convert(
    source: paths.PathLike,
    target: paths.PathLike,
    *,
    to: str | None = None,
    weights: str = "ema",
    dtype: str = "float32",
    step: int | None = None,
    variant: str = "",
    max_shard_size: str | None = None,
    tokenizer: str = "",
    config_from: str = "",
    prediction_type: str = "",
    scaling_factor: float | None = None,
    force: bool = False,
) -> list[str]:
    """Convert `source` to the layout `to` at `target`; see the options of the verb.

    Returns:
        What was done, as lines for the user.

    Raises:
        PretrainedError, CheckpointError: `source` cannot be read or `target` not written.
        OSError: of the disk.
    """
    from sdjax.train.pretrained import Hints, PretrainedError, folder_kind, read_any

    source, target = paths.to_path(source), paths.to_path(target)
    kind = folder_kind(source)
    to = to or default_format(kind, target)
    _check_places(source, target, to)
    given = {
        "variant": variant,
        "step": step,
        "tokenizer": tokenizer,
        "config_from": config_from,
        "prediction_type": prediction_type,
        "scaling_factor": scaling_factor,
    }
    if problem := _misplaced(given, kind, to, dtype, max_shard_size):
        raise PretrainedError(f"{problem}; {source} is a {kind}, and {target} becomes a {to}")
    like = read_any(config_from, with_weights=False) if config_from else None
    hints = Hints(tokenizer, prediction_type, scaling_factor, like)
    read = read_any(source, weights=weights, step=step, variant=variant, hints=hints)
    count = sum(value.size for value in read.params.values())
    lines = [f"read {', '.join(read.networks)}: {count:,} parameters from {source}"]
    if read.ignored:
        lines.append(f"ignored, as they do not change the maths: {', '.join(read.ignored)}")
    options = {"dtype": dtype, "overwrite": force}
    return lines + _write(to, target, read, options, max_shard_size or MAX_SHARD_SIZE)


def default_format(kind: str, target: paths.Path) -> str:
    """What is written where the user does not say."""
    if target.suffix == ".safetensors":
        return "single_file"
    return "diffusers" if kind == "workdir" else "workdir"


def _misplaced(
    given: dict[str, Any], kind: str, to: str, dtype: str, max_shard_size: str | None
) -> str:
    """What is wrong with options that another kind of input or output has, or ""."""
    for option, value in given.items():
        if value not in ("", None) and kind != _INPUT_OPTIONS[option]:
            wanted = _INPUT_OPTIONS[option]
            return f"--{option}={value} is for a {wanted} as --input: leave it out"
    if to == "workdir" and dtype != "float32":
        return f"--dtype={dtype}: a workdir holds float32; leave --dtype out"
    if to != "diffusers" and max_shard_size:
        return f"--max_shard_size={max_shard_size} is for a diffusers folder to write: leave it out"
    return ""


def _check_places(source: paths.Path, target: paths.Path, to: str) -> None:
    """PretrainedError if writing would destroy what is read, or the name and kind disagree."""
    from sdjax.train.pretrained import PretrainedError

    inner, outer = paths.resolved(target), paths.resolved(source)
    if inner == outer or inner in outer.parents:
        raise PretrainedError(f"--output={target} is --input, or holds it; choose another folder")
    if to != "single_file" and target.suffix == ".safetensors":
        raise PretrainedError(f"--output={target} is the name of a file, but a {to} is a folder")


def _write(
    to: str, target: paths.Path, read: Any, options: dict[str, Any], max_shard_size: str
) -> list[str]:
    """Write networks in the layout `to`; what was done, as lines."""
    from sdjax.train.pretrained import write_diffusers
    from sdjax.train.single_file_writer import write_single_file
    from sdjax.train.workdir import save_workdir

    if to == "workdir":
        save_workdir(target, read, overwrite=options["overwrite"])
        field = "init_from" if len(read.networks) > 1 else "vae_from"
        return [f"wrote the workdir {target}; train from it with --config.{field}={target}"]
    if to == "diffusers":
        write_diffusers(target, read, max_shard_size=max_shard_size, **options)
        return [f"wrote the diffusers folder {target}, {options['dtype']}"]
    notes = write_single_file(target, read, **options)
    return [f"wrote the single file {target}, {options['dtype']}", *notes]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, convert, and give the exit code."""
    args = parser().parse_args(argv)
    # Imported here so that --help and a mistyped option answer at once.
    from sdjax.errors import explain
    from sdjax.train.checkpoint import CheckpointError

    logging.set_verbosity(logging.WARNING)  # Orbax narrates
    try:
        options = vars(args)
        lines = convert(options.pop("input"), options.pop("output"), **options)
    except paths.storage_errors(ValueError, CheckpointError) as error:
        return explain(error)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
