"""Convert between the folders of diffusers and of sdjax, either way, without loss.

    python -m sdjax.convert --input=DIFFUSERS_FOLDER --output=WORKDIR
    python -m sdjax.convert --input=WORKDIR --output=DIFFUSERS_FOLDER [--weights=raw]

--input decides the direction. A diffusers pipeline (or the folder of one network, as a VAE) becomes
a workdir that sdjax.sample, --config.init_from and --config.vae_from accept. A workdir, or one of
its checkpoints (WORKDIR/checkpoints/STEP), becomes a diffusers folder that torch loads. In float32,
there and back gives the same bits.

Exit codes: 0 done; 2 the input or an option is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from absl import logging

from sdjax import paths


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    p = argparse.ArgumentParser(
        prog="python -m sdjax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--input", required=True, help="diffusers folder, or workdir of sdjax, to read")
    p.add_argument("--output", required=True, help="folder to write; must be new, or empty")
    p.add_argument(
        "--weights", default="ema",
        help="of a workdir: 'ema' (the first average the run keeps; the parameters themselves if "
        "it keeps none), 'raw' (the parameters themselves), or the name of an average, as '0.9999' "
        "(%(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of the weights in a diffusers folder to write; a workdir is float32 (%(default)s)",
    )  # fmt: skip
    p.add_argument("--step", type=int, help="of a workdir: which checkpoint; the newest by default")
    p.add_argument(
        "--variant", default="",
        help="of a diffusers folder to read: which of its weights, as 'fp16' or 'non_ema'",
    )  # fmt: skip
    p.add_argument(
        "--force", action="store_true", help="replace what an earlier conversion wrote to --output"
    )
    return p


def convert(
    source: paths.PathLike,
    target: paths.PathLike,
    *,
    weights: str = "ema",
    dtype: str = "float32",
    step: int | None = None,
    variant: str = "",
    force: bool = False,
) -> list[str]:
    """Convert `source` to the other layout at `target`.

    Returns:
        What was done, as lines for the user.

    Raises:
        PretrainedError, CheckpointError: `source` cannot be read or `target` not written.
        OSError: of the disk.
    """
    from sdjax.train.pretrained import PretrainedError, folder_kind, read_any, write_diffusers
    from sdjax.train.workdir import save_workdir

    source, target = paths.to_path(source), paths.to_path(target)
    kind = folder_kind(source)
    inner, outer = paths.resolved(target), paths.resolved(source)
    if inner == outer or inner in outer.parents:
        raise PretrainedError(f"--output={target} is --input, or holds it; choose another folder")
    if kind == "diffusers" and dtype != "float32":
        raise PretrainedError(
            f"--dtype={dtype}: {source} becomes a workdir, which holds float32; leave --dtype out"
        )
    read = read_any(source, weights=weights, step=step, variant=variant)
    if kind == "diffusers":
        save_workdir(target, read, overwrite=force)
    else:
        write_diffusers(target, read, dtype=dtype, overwrite=force)
    count = sum(value.size for value in read.params.values())
    lines = [f"read {', '.join(read.networks)}: {count:,} parameters from {source}"]
    if read.ignored:
        lines.append(f"ignored, as they do not change the maths: {', '.join(read.ignored)}")
    if kind == "diffusers":
        field = "init_from" if len(read.networks) > 1 else "vae_from"
        lines.append(f"wrote the workdir {target}; train from it with --config.{field}={target}")
    else:
        lines.append(f"wrote the diffusers folder {target}, {dtype}, weights {weights!r}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, convert, and give the exit code."""
    args = parser().parse_args(argv)
    # Imported here so that --help and a mistyped option answer at once.
    from sdjax.errors import explain
    from sdjax.train.checkpoint import CheckpointError

    logging.set_verbosity(logging.WARNING)  # Orbax narrates
    try:
        lines = convert(
            args.input,
            args.output,
            weights=args.weights,
            dtype=args.dtype,
            step=args.step,
            variant=args.variant,
            force=args.force,
        )
    except paths.storage_errors(ValueError, CheckpointError) as error:
        return explain(error)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
