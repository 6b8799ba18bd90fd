"""`python -m sdjax.prepare --encode`: what a configuration would encode, encoded ahead.

    python -m sdjax.prepare --encode --config=RECIPE --output=DIR
        [--config.field=value ...] [--encode_text] [--encode_flipped] [--max_sequence_length=N]

Pictures of config.data become VAE moments, cropped (and sorted into buckets) as the configuration
says; with --encode_text captions become embeddings too. Training takes them with
--config.data.name=encoded --config.data.path=DIR, and refuses them if its VAE, text encoder, crop
or buckets are others. A run that was killed goes on when the same command is given again.

On several hosts every one runs the command with its own --host and the same --hosts, onto one
shared or gs:// --output. They need no connection: each encodes its shards, and host 0 ends last.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import config_flags

from sdjax import verbs
from sdjax.errors import UserError
from sdjax.system import locks, progress

FLAGS = flags.FlagValues()
_ENCODE = flags.DEFINE_bool("encode", True, "This mode of sdjax.prepare.", flag_values=FLAGS)
flags.DEFINE_bool("help", False, "Show this and stop.", short_name="h", flag_values=FLAGS)
config_flags.DEFINE_config_file(
    "config", None, f"Its data and networks. {verbs.CONFIG_HELP}", flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder of the encoded dataset; may be gs://.", flag_values=FLAGS
)
_SPLITS = flags.DEFINE_list(
    "splits", [], "Which; by default config.data.split and eval_split.", flag_values=FLAGS
)
_TEXT = flags.DEFINE_bool(
    "encode_text", False, "Keep embeddings of the captions, for frozen text encoders.",
    flag_values=FLAGS,
)  # fmt: skip
_LENGTH = flags.DEFINE_integer(
    "max_sequence_length", None,
    "Tokens of T5, for SD3 and FLUX.1: config.model.max_sequence_length, which the run takes too.",
    flag_values=FLAGS,
)  # fmt: skip
_FLIPPED = flags.DEFINE_bool(
    "encode_flipped", False, "Keep mirrored pictures as well, which data.flip then takes.",
    flag_values=FLAGS,
)  # fmt: skip
_DTYPE = flags.DEFINE_string(
    "encode_dtype", "bfloat16", "Of what is kept: bfloat16 or float32.", flag_values=FLAGS
)
_BATCH = flags.DEFINE_integer(
    "batch", 16, "Pictures that a device encodes at once.", flag_values=FLAGS
)
_SHARD = flags.DEFINE_integer(
    "shard_examples", 1024, "Examples in a file, after each of which a killed run can go on.",
    flag_values=FLAGS,
)  # fmt: skip
_HOST = flags.DEFINE_integer(
    "host", 0, "Which of several hosts this is, from 0.", flag_values=FLAGS
)
_HOSTS = flags.DEFINE_integer("hosts", 1, "How many hosts share the work.", flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    """The verb; `argv` with the program's name first."""
    return verbs.run(argv, FLAGS, __name__, __doc__ or "", _run)


def _run() -> int:
    recipe = verbs.recipe(FLAGS, "sd15_finetune")
    if not _OUTPUT.value:
        raise UserError("--output is missing, the folder of the encoded dataset")
    if not 0 <= _HOST.value < _HOSTS.value:
        raise UserError(f"--host is {_HOST.value}; expected 0 to --hosts - 1 = {_HOSTS.value - 1}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    from sdjax.config import resolve
    from sdjax.encoding.dataset import Options, encode_dataset
    from sdjax.train.startup import enable_compilation_cache

    options = Options(
        splits=tuple(_SPLITS.value),
        text=_TEXT.value,
        flipped=_FLIPPED.value,
        dtype=_DTYPE.value,
        batch=_BATCH.value,
        shard_examples=_SHARD.value,
    )
    if _LENGTH.value is not None:
        if "max_sequence_length" not in recipe.model:
            raise UserError(
                "--max_sequence_length is for SD3 and FLUX.1; the recipe's model.family is "
                f"{recipe.model.family!r}, whose text encoders say how many tokens they read"
            )
        recipe.model.max_sequence_length = _LENGTH.value
    config = resolve(recipe)
    enable_compilation_cache(config.compilation_cache)
    host, hosts = _HOST.value, _HOSTS.value
    own = f"{locks.FILE}-{host}" if hosts > 1 else locks.FILE  # each host writes its own shards
    with (
        locks.held(_OUTPUT.value, "--output", "sdjax.prepare --encode", name=own),
        progress.shown(),
    ):
        report = encode_dataset(config, _OUTPUT.value, options, host=host, hosts=hosts)
    if report is None:
        print(f"host {_HOST.value}: its shards are there; host 0 ends the work")
        return 0
    for split, examples in report.examples.items():
        print(f"{split}: {examples} examples encoded")
        for reason, names in report.dropped[split].items():
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            print(f"  {len(names)} left out, {reason}: {shown}")
    text = " --config.data.text_embeddings=True" if options.text else ""
    if _LENGTH.value is not None:
        text += f" --config.model.max_sequence_length={_LENGTH.value}"
    path = shlex.quote(f"--config.data.path={_OUTPUT.value}")
    print(f"to train on them: --config.data.name=encoded {path}{text}")
    return 0
