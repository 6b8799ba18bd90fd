"""Convert between diffusers folders, sdjax workdirs and single-file checkpoints, without loss.

    python -m sdjax.convert --input=DIFFUSERS_FOLDER --output=WORKDIR
    python -m sdjax.convert --input=WORKDIR --output=DIFFUSERS_FOLDER [--weights=raw]
    python -m sdjax.convert --input=WORKDIR_OR_FOLDER --output=MODEL.safetensors --dtype=float16
    python -m sdjax.convert --input=MODEL.safetensors --output=WORKDIR --tokenizer=FOLDER
    python -m sdjax.convert --input=WORKDIR --output=FOLDER --average last:5
    python -m sdjax.convert --output=FOLDER --average runs/a runs/b [--average_weights 1 2]
    python -m sdjax.convert --input=WORKDIR --output=FOLDER --ema_length=0.07
    python -m sdjax.convert --input=WORKDIR --bundle
    python -m sdjax.convert --input=MODEL --lora=FILE:0.8 --output=MERGED
    python -m sdjax.convert --input=ADAPTER --output=FILE.safetensors --format=kohya
    python -m sdjax.convert --input=TUNED --base=MODEL --extract_lora=16 --output=FILE.safetensors

A diffusers pipeline (or the folder of one network, as a VAE) and a single file, as AUTOMATIC1111
and ComfyUI read, become a workdir that sdjax.sample, --config.init_from and --config.vae_from
accept. A workdir, or one of its checkpoints (WORKDIR/checkpoints/STEP), becomes a diffusers folder
that torch loads. An --output that ends in .safetensors is a single file; --to says otherwise. In
float32, there and back gives the same bits.

--average writes the mean of several models in place of one: of checkpoints of a run, or of runs
that began from the same weights. --ema_length writes the average of a run over another length than
it tracked. Both are often better models than the last checkpoint (docs/averages.md).

--lora merges adapters (LoRA, DoRA, LoHa, LoKr) into the model. --format writes an adapter in
another layout, --extract_lora the difference of two models as a LoRA (docs/convert.md).

--bundle writes no other folder: it copies the frozen networks that a workdir refers to
(WORKDIR/frozen.json) into it, so that it can be moved to another machine.

Exit codes: 0 done; 2 the input or an option is wrong, or a file cannot be written; 130 Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take a while
    from sdjax.system.interrupts import install

    install("the same command begins again")

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

from sdjax.checkpoints.conversion_options import (
    INPUT_OPTIONS,
    add_adapter_options,
    add_average_options,
    add_file_options,
)
from sdjax.system import locks, paths, progress

if TYPE_CHECKING:
    from sdjax.checkpoints import averages
    from sdjax.families.family import Model
    from sdjax.formats.single_file import Hints

FORMATS = ("workdir", "diffusers", "single_file")


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
        help="diffusers folder, workdir of sdjax or .safetensors file to read; left out where "
        "--average names folders",
    )
    p.add_argument("--output", help="folder or .safetensors file to write; new")
    p.add_argument(
        "--bundle", action="store_true",
        help="in place of writing an --output, copy into --input, a workdir, the frozen networks "
        "that it refers to; no other option goes with it",
    )  # fmt: skip
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
    add_file_options(p)
    add_average_options(p)
    add_adapter_options(p)
    p.add_argument(
        "--force", action="store_true", help="replace what an earlier conversion wrote to --output"
    )
    return p


@dataclasses.dataclass(frozen=True)
class Options:
    """The wishes for a conversion, by the names of the verb's options; "" and None for nothing.

    lora: adapters to merge, see `checkpoints.adapters.with_loras`.
    """

    to: str | None = None
    weights: str = "ema"
    dtype: str = "float32"
    step: int | None = None
    variant: str = ""
    max_shard_size: str | None = None
    config_from: str = ""
    average: Sequence[str] | None = None
    average_weights: Sequence[float] | None = None
    ema_length: float | None = None
    lora: Sequence[str] = ()
    force: bool = False
    tokenizer: str = ""
    prediction_type: str = ""
    zero_terminal_snr: bool | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None

    def misplaced(self, kind: str, to: str) -> str:
        """Return the fault of options that another kind of input or output has, or ""."""
        for option, wanted in INPUT_OPTIONS.items():
            value = getattr(self, option)
            if value not in ("", None) and kind != wanted:
                return f"--{option}={value} is for a {wanted} as --input: leave it out"
        if to == "workdir" and self.dtype != "float32":
            return f"--dtype={self.dtype}: a workdir holds float32; leave --dtype out"
        if to != "diffusers" and self.max_shard_size:
            return (
                f"--max_shard_size={self.max_shard_size} is for a diffusers folder to write: leave "
                "it out"
            )
        return ""

    def hints(self) -> Hints:
        """Answer for a single file what it does not say.

        Raises:
            ModelError: `config_from` cannot be read.
        """
        from sdjax.checkpoints.reading import read_any
        from sdjax.formats.single_file import Hints

        names = "tokenizer prediction_type zero_terminal_snr scaling_factor shift_factor".split()
        given = {name: getattr(self, name) for name in names}
        like = read_any(self.config_from, with_weights=False) if self.config_from else None
        return Hints(like=like, **{k: v for k, v in given.items() if v not in ("", None)})


def convert(source: paths.PathLike | None, target: paths.PathLike, **options: Any) -> list[str]:
    """Convert `source` to another layout at `target`.

    Args:
        source: None where `average` names folders.
        options: fields of `Options`.

    Returns:
        What was done, as lines for the user.

    Raises:
        ModelError, CheckpointError: `source` cannot be read or `target` not written.
        OSError: of the disk.
    """
    from sdjax.checkpoints.adapters import with_loras
    from sdjax.formats.folders import ModelError, folder_kind

    asked = Options(**options)
    found = _sources(source, asked)
    target = paths.to_path(target)
    kinds = [folder_kind(member.path) for member in found]
    to = asked.to or default_format(kinds[0], target)
    for member, kind in zip(found, kinds, strict=True):
        _check_places(member.path, target, to)
        if problem := asked.misplaced(kind, to):
            raise ModelError(f"{problem}; {member.path} is a {kind}, and {target} becomes a {to}")
    with locks.replacing(target, "--output", "sdjax.convert"):
        read, origin = _read(found, asked)
        read = with_loras(read, asked.lora)
        return [*_read_lines(read, origin, asked, to), *_write(to, target, read, asked)]


def _read_lines(read: Model, origin: str, asked: Options, to: str) -> list[str]:
    """Lines for the user on what was read."""
    count = sum(value.size for value in read.params.values())
    lines = [f"read {', '.join(read.networks)}: {count:,} parameters from {origin}"]
    lines += [f"merged the adapter {option}" for option in asked.lora]
    if read.ignored:
        lines.append(f"ignored, as they do not change the maths: {', '.join(read.ignored)}")
    if read.unsupported_sampler and to == "workdir":
        assert read.sampler
        lines.append(
            f"its sampler is {read.unsupported_sampler}, which sdjax does not have: the workdir is "
            f"drawn from with {read.sampler.name}, and a folder written of it has the one there was"
        )
    return lines


def bundle(workdir: paths.PathLike) -> list[str]:
    """Copy the networks that a workdir refers to into it; what was done, as lines for the user.

    Raises:
        ModelError: it is no workdir, or a network is not there or has changed.
    """
    from sdjax.checkpoints import workdir as runs
    from sdjax.formats.folders import ModelError, folder_kind

    folder = paths.to_path(workdir)
    if (kind := folder_kind(folder)) != "workdir" or folder.parent.name == "checkpoints":
        raise ModelError(f"--bundle: --input={folder} is a {kind}; expected the workdir of a run")
    with locks.held(folder, "--input", "sdjax.convert"):
        names = runs.bundle(folder)
    if not names:
        return [f"{folder} holds all of its networks"]
    return [f"copied into {folder}: {', '.join(names)}"]


def _sources(source: paths.PathLike | None, asked: Options) -> list[averages.Member]:
    """Return the sources. ModelError if the options that name them contradict one another."""
    from sdjax.checkpoints import averages
    from sdjax.formats.folders import ModelError

    if asked.average:
        for option in ("step", "ema_length"):
            if (value := getattr(asked, option)) is not None:
                raise ModelError(f"--{option}={value} does not go with --average: leave one out")
        return averages.members(source, asked.average)
    if asked.average_weights:
        raise ModelError("--average_weights is for --average, which names the models")
    if source is None:
        raise ModelError("--input is missing, the model to convert (or --average DIR DIR ...)")
    if asked.ema_length is None:
        return [averages.Member(paths.to_path(source), asked.step)]
    if asked.weights != "ema":
        raise ModelError(
            f"--weights={asked.weights} does not go with --ema_length, which says what average to "
            "take"
        )
    return [averages.Member(_run_of(paths.to_path(source)))]


def _read(found: Sequence[averages.Member], asked: Options) -> tuple[Model, str]:
    """The model to write, and what it was made of."""
    from sdjax.checkpoints import averages
    from sdjax.checkpoints.reading import read_any

    hints = asked.hints()

    def read_one(member: averages.Member) -> Model:
        return read_any(
            member.path,
            weights=asked.weights,
            step=member.step,
            variant=asked.variant,
            hints=hints,
        )

    if len(found) > 1:
        read = averages.average(found, read_one, asked.average_weights)
        return read, f"the mean of {', '.join(map(str, found))}"
    read, origin, length = read_one(found[0]), str(found[0].path), asked.ema_length
    if length is None:
        return read, origin
    # The average may be of a step whose checkpoint is gone: the model around it is the newest.
    read, at = averages.with_ema_length(read, found[0].path, length, asked.step)
    return read, f"the average of width {length:g} of {origin} at step {at}"


def _run_of(path: paths.Path) -> paths.Path:
    """The workdir of a checkpoint (WORKDIR/checkpoints/STEP), or the path itself."""
    return path.parents[1] if path.parent.name == "checkpoints" else path


def default_format(kind: str, target: paths.Path) -> str:
    """Return the format that is written where the user names none."""
    if target.suffix == ".safetensors":
        return "single_file"
    return "diffusers" if kind == "workdir" else "workdir"


def _check_places(source: paths.Path, target: paths.Path, to: str) -> None:
    """ModelError if writing would destroy what is read, or the name and kind disagree."""
    from sdjax.formats.folders import ModelError

    inner, outer = paths.resolved(target), paths.resolved(source)
    if inner == outer or inner in outer.parents:
        raise ModelError(f"--output={target} is --input, or holds it; choose another folder")
    if to != "single_file" and target.suffix == ".safetensors":
        raise ModelError(f"--output={target} is the name of a file, but a {to} is a folder")


def _write(to: str, target: paths.Path, read: Model, asked: Options) -> list[str]:
    """Write networks in the layout `to`; what was done, as lines."""
    from sdjax.checkpoints.workdir import save_workdir
    from sdjax.formats.diffusers_folder import write_diffusers
    from sdjax.formats.single_file_writer import write_single_file

    dtype, size = asked.dtype, asked.max_shard_size or ""
    if to == "workdir":
        save_workdir(target, read, overwrite=asked.force)
        field = "init_from" if len(read.networks) > 1 else "vae_from"
        flag = shlex.quote(f"--config.{field}={target}")
        return [f"wrote the workdir {target}; train from it with {flag}"]
    if to == "diffusers":
        write_diffusers(target, read, max_shard_size=size, dtype=dtype, overwrite=asked.force)
        return [f"wrote the diffusers folder {target}, {dtype}"]
    notes = write_single_file(target, read, dtype=dtype, overwrite=asked.force)
    return [f"wrote the single file {target}, {dtype}", *notes]


def _of_adapter(options: dict[str, Any]) -> list[str] | None:
    """Write an adapter where the options ask for one; what was done, or None for a model.

    Raises:
        ValueError: other options are given that do not go with it.
    """
    from sdjax.checkpoints.adapter_conversion import AdapterOptions, convert_adapter
    from sdjax.formats.single_file import Hints

    names = {"form": "format", "base": "base", "extract": "extract_lora", "rank": "lora_rank"}
    names["dynamic"] = "lora_dynamic"
    asked = AdapterOptions(**{field: options.pop(name) for field, name in names.items()})
    asked.check()
    if not asked.asked:
        return None
    names_own = ("input", "output", "weights", "step", "dtype", "force")
    own = {name: options.pop(name) for name in names_own}
    own["hints"] = Hints(options.pop("tokenizer"), options.pop("prediction_type"))
    for name, value in options.items():
        if value != parser().get_default(name):
            raise ValueError(f"--{name}={value} does not go with an adapter to write: leave it out")
    if own["input"] is None:
        raise ValueError("--input is missing, the adapter, or the run or model to take it from")
    return convert_adapter(own.pop("input"), own.pop("output"), asked, **own)


def _alone(options: dict[str, Any]) -> str:
    """Return the --input of --bundle. ValueError if other options are given, or it is not."""
    for name, value in options.items():
        if name != "input" and value != parser().get_default(name):
            raise ValueError(f"--{name}={value} does not go with --bundle: leave one out")
    if options["input"] is None:
        raise ValueError("--input is missing, the workdir to copy networks into")
    return options["input"]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, convert, and give the exit code."""
    args = parser().parse_args(argv)
    # Imported here so that --help and a mistyped option answer at once.
    from sdjax.checkpoints.checkpoint import CheckpointError
    from sdjax.errors import explain

    logging.set_verbosity(logging.WARNING)  # Orbax narrates
    try:
        options = vars(args)
        with progress.shown():
            if options.pop("bundle"):
                lines = bundle(_alone(options))
            else:
                if options["output"] is None:
                    raise ValueError("--output is missing, the folder or file to write")
                lines = _of_adapter(options) or convert(
                    options.pop("input"), options.pop("output"), **options
                )
    except paths.storage_errors(ValueError, CheckpointError) as error:
        return explain(error)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
