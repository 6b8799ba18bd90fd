"""Raw images and captions -> a clean dataset of ArrayRecord shards that training reads.

    python -m sdjax.prepare --input=DIR --output=DIR

The input is an image folder, WebDataset tar shards or parquet files, local or gs://. What cannot be
used is dropped and listed with the reason in report.json, report.html and dropped.jsonl of the
output. A run that was killed goes on when the same command is given again. Training reads the
output with --config.data.name=prepared --config.data.path=DIR.

With --from_ratings it makes a folder of pictures to train on of what people said of pictures that
`sdjax.serve --ratings=DIR` drew; docs/serving.md has the way round.

With --encode it does something else: see `python -m sdjax.prepare --encode --help`.

Everything after `--` goes to Apache Beam, which runs it on other machines, too:

    python -m sdjax.prepare --input=gs://B/RAW --output=gs://B/CLEAN -- --runner=DataflowRunner ...

Exit codes: 0 done; 2 the input or an option is wrong, or a file cannot be written; 130 Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take a while
    from sdjax.system.interrupts import install

    install("the same command goes on")

import importlib.util
import math
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from sdjax.data import named_images, ratings
from sdjax.data.named_images import NamedImage
from sdjax.data.prepare.settings import DUPLICATES, Settings, Workspace
from sdjax.data.raw import formats, mended
from sdjax.data.raw.clean import Rules, ScoreRule
from sdjax.data.raw.rows import Fields, passed_over
from sdjax.errors import UserError, explain
from sdjax.system import locks, paths, progress
from sdjax.system.interrupts import ignored_by_children
from sdjax.verbs import parse

FLAGS = flags.FlagValues()  # of its own: those of `sdjax.main` mean nothing here
_KINDS: dict[type, Any] = {
    bool: flags.DEFINE_bool, int: flags.DEFINE_integer,
    float: flags.DEFINE_float, str: flags.DEFINE_string,
}  # fmt: skip
# Options that are fields of Rules and of Settings, where their defaults stand.
_OF_RULES = {
    "min_side": "Pictures with a shorter short side in pixels are dropped; 0 drops none.",
    "max_aspect": "Those with more of long side over short side are dropped; 0 drops none.",
    "max_pixels": "More are refused before decoding; 0 for as many as Pillow opens.",
    "orient": "Turn pictures as their EXIF orientation says.",
    "convert_modes": "Convert CMYK, palettes, grey, 16 bits and transparency to RGB; else drop.",
    "min_caption_chars": "Shorter captions are dropped; 0 keeps pictures without a caption.",
    "max_caption_chars": "Longer captions are dropped; 0 drops none.",
    "collapse_spaces": "White space of any kind and length becomes one space.",
    "unescape_html": "&amp;amp; becomes &.",
    "strip_control": "Leave control characters of captions out.",
    "drop_pattern": "Captions in which this regular expression is found are dropped.",
}
_OF_SETTINGS = {
    "near_distance": "How many of 64 bits may differ for pictures to look alike.",
    "validation_share": "Of train, by hash of the name, unless the input has such a split.",
    "test_share": "The same for test.",
    "shard_mb": "Size of the files written.",
    "thumbnails": "Pictures of each reason in the report.",
    "outside_links": "Read what links below the input lead to outside of it.",
}
_DEFAULT = Settings("", Fields(), Rules())
for _owner, _texts in ((_DEFAULT.rules, _OF_RULES), (_DEFAULT, _OF_SETTINGS)):
    for _name, _text in _texts.items():
        _value: Any = getattr(_owner, _name)
        _KINDS[type(_value)](_name, _value, _text, flag_values=FLAGS)

_HELP = flags.DEFINE_bool("help", False, "Show this and stop.", short_name="h", flag_values=FLAGS)
_INPUT = flags.DEFINE_string(
    "input", None, "Folder, file or pattern (DIR/train-*.tar) of the raw data; may be gs://.",
    flag_values=FLAGS,
)  # fmt: skip
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder of the dataset; may be gs://.", flag_values=FLAGS
)
_FORMAT = flags.DEFINE_enum(
    "format", "auto", ("auto", *formats.FORMATS), "What the input is; auto looks.",
    flag_values=FLAGS,
)  # fmt: skip
_IMAGE_KEY = flags.DEFINE_string(
    "image_key", _DEFAULT.fields.image, "Parquet column of the images.", flag_values=FLAGS
)
_TEXT_KEY = flags.DEFINE_string(
    "text_key", _DEFAULT.fields.text,
    "Column or JSON field of the caption. In tars, text is the .txt, or `caption` of the .json.",
    flag_values=FLAGS,
)  # fmt: skip
_CAPTIONS_KEY = flags.DEFINE_string(
    "captions_key", _DEFAULT.fields.captions, "Column or JSON field of a list of other captions.",
    flag_values=FLAGS,
)  # fmt: skip
_BACKGROUND = flags.DEFINE_string(
    "background", "255,255,255", "Red, green, blue under what is transparent.", flag_values=FLAGS
)
_SCORES = flags.DEFINE_multi_string(
    "score", [],
    "A number of each row that is stored with it, and its limits: quality, quality>=5, "
    "nsfw<=0.3 or 4<=quality<=9. Give it once for each.",
    flag_values=FLAGS,
)  # fmt: skip
_NAMED_IMAGES = flags.DEFINE_multi_string(
    "named_image", [],
    "A picture of each row besides the main one, as NAME=KEY:KIND: control=edge:condition or "
    "mask=mask:mask; docs/data.md says where KEY is read. KIND is picture, condition or mask. Give "
    "it once for each.",
    flag_values=FLAGS,
)  # fmt: skip
_DUPLICATES = flags.DEFINE_enum(
    "duplicates", _DEFAULT.duplicates, DUPLICATES,
    "What is dropped: nothing, equal pixels, or also what looks alike.",
    flag_values=FLAGS,
)  # fmt: skip
_CAPTIONS_FROM = flags.DEFINE_string(
    "captions_from", _DEFAULT.captions_from,
    "File of captions that take the place of those of the input, as `sdjax.serve --captions=FILE` "
    'writes it: a line {"file_name": a row\'s name, "text": its caption} for each.',
    flag_values=FLAGS,
)  # fmt: skip
_WORKERS = flags.DEFINE_integer(
    "workers", 0, "Processes on this machine; 0 is one for each core.", lower_bound=0,
    flag_values=FLAGS,
)  # fmt: skip


def parse_score(text: str) -> ScoreRule:
    """ "4<=quality<=9", "quality>=4", "quality" -> ScoreRule. Raises UserError."""
    number = r"([-+.\deE]+)"
    match = re.fullmatch(rf"(?:{number}<=)?(\w+)(?:(<=|>=){number})?", text.replace(" ", ""))
    try:
        if not match or (match[1] and match[3] == ">="):
            raise ValueError(text)
        limits = {"low": float(match[1])} if match[1] else {}
        if match[3]:
            limits["low" if match[3] == ">=" else "high"] = float(match[4])
    except ValueError as error:
        raise UserError(
            f"--score is {text!r}; expected a column such as quality, quality>=5, nsfw<=0.3 "
            "or 4<=quality<=9"
        ) from error
    return ScoreRule(match[2], **limits)


def parse_image(text: str) -> NamedImage:
    """ "control=edge:condition" -> NamedImage. Raises UserError."""
    try:
        return named_images.parse(text)
    except UserError as error:
        raise UserError(f"--named_image is {text!r}: {error}") from error


def parse_colour(text: str) -> tuple[int, int, int]:
    """ "255,0,0" -> (255, 0, 0). Raises UserError."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) < 256 for part in parts):
        raise UserError(f"--background is {text!r}; expected three numbers of 0 to 255, as 255,0,0")
    red, green, blue = (int(part) for part in parts)
    return red, green, blue


def settings_of_flags() -> Settings:
    """Raises UserError, naming the flag, for a value that cannot be."""
    scores = tuple(parse_score(text) for text in _SCORES.value)
    images = tuple(parse_image(text) for text in _NAMED_IMAGES.value)
    rules_of_flags: dict[str, Any] = {name: FLAGS[name].value for name in _OF_RULES}
    others: dict[str, Any] = {name: FLAGS[name].value for name in _OF_SETTINGS}
    rules = Rules(
        **rules_of_flags,
        background=parse_colour(_BACKGROUND.value),
        scores=scores,
        images=images,
    )
    columns = tuple(rule.column for rule in scores)
    found = (
        _FORMAT.value
        if _FORMAT.value != "auto"
        else formats.detect(_INPUT.value or "", outside=bool(FLAGS["outside_links"].value))
    )
    return Settings(
        format=found,
        fields=Fields(_IMAGE_KEY.value, _TEXT_KEY.value, _CAPTIONS_KEY.value, columns, images),
        rules=rules,
        duplicates=_DUPLICATES.value,
        captions_from=_CAPTIONS_FROM.value,
        captions_sha256=mended.digest(_CAPTIONS_FROM.value) if _CAPTIONS_FROM.value else "",
        **others,
    )


_FROM_RATINGS = flags.DEFINE_string(
    "from_ratings", None, "In place of --input: the folder that was the --ratings of sdjax.serve. "
    "--output becomes a folder of pictures with metadata, in train/ and test/, split by prompt.",
    flag_values=FLAGS,
)  # fmt: skip
_RATINGS_AS = flags.DEFINE_enum(
    "ratings_as", "pairs", ratings.KINDS,
    "pairs: a good picture and a rejected one of a prompt, for the method dpo; weights: all "
    "pictures with a weight, for --score=weight and data.weight_key; good: the good ones alone.",
    flag_values=FLAGS,
)  # fmt: skip
_BETA = flags.DEFINE_float(
    "beta", 1.0, "Of --ratings_as=weights: weights are in proportion to exp(rating / beta), with 1 "
    "for good and -1 for bad, and have the mean 1 within a prompt.",
    flag_values=FLAGS,
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """The verb; `argv` with the program's name first."""
    try:
        rest = parse(list(argv), FLAGS)
        if _HELP.value:
            print(f"{__doc__}\n{FLAGS.module_help(__name__) or FLAGS.get_help()}")
            return 0
        return _run(rest[1:])
    except paths.storage_errors(UserError, flags.Error) as error:
        return explain(error)


def _rated() -> int:
    """Make a dataset of ratings."""
    folder, output = paths.to_path(_FROM_RATINGS.value or ""), paths.to_path(_OUTPUT.value or "")
    share, beta = float(FLAGS["test_share"].value or 0.0), float(_BETA.value or 0.0)
    if not _OUTPUT.value or _INPUT.value:
        raise UserError("--from_ratings=DIR takes --output=DIR and no --input")
    if not 0.0 < beta < math.inf or not 0.0 <= share < 1.0:
        raise UserError(
            f"--beta={beta:g}, --test_share={share:g}; expected above 0, and 0 to below 1"
        )
    if paths.exists(output) and any(output.iterdir()):
        raise UserError(f"--output={output} is not empty; give a new folder")
    with locks.held(output, "--output", "sdjax.prepare"):
        found = ratings.write(folder, output, _RATINGS_AS.value or "", beta=beta, test_share=share)
    print(f"{found['train']} examples to train on, {found['test']} held out, in {output}")
    for what, why in (
        ("damaged", "lines are no ratings"),
        ("missing", "pictures are missing or others"),
    ):
        if found[what]:
            print(f"  {found[what]} {why}")
    return 0


def _run(rest: list[str]) -> int:
    if _FROM_RATINGS.value:
        return _rated()
    for flag, what in ((_INPUT, "the raw data"), (_OUTPUT, "the folder of the dataset")):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing, {what}")
    unknown = [text for text in rest if not text.startswith("--")]
    if unknown:
        raise UserError(f"{unknown[0]!r} is no flag; options of Beam go after --, as --key=value")
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError("prepare takes another package: pip install 'sdjax[beam]'")
    logging.set_verbosity(logging.WARNING)
    settings, workspace = settings_of_flags(), Workspace(_OUTPUT.value or "")
    from sdjax.data.prepare import pipeline, report

    with (
        locks.held(workspace.folder, "--output", "sdjax.prepare"),
        ignored_by_children(),
        progress.shown(),
    ):
        found = pipeline.run(
            _INPUT.value or "", settings, workspace, workers=_WORKERS.value, beam_options=rest
        )
    print(f"{found['read']} rows read, {found['kept']} kept: {found['splits']}")
    for what in ("dropped", "changed"):
        for word, count in sorted(found[what].items(), key=lambda item: -item[1]):
            print(f"  {count} {what}: {word}")
    if found["passed_over"]:
        print(f"  {passed_over(found['passed_over'])}")
    path = shlex.quote(f"--config.data.path={workspace.folder}")
    print(f"{workspace.folder / report.HTML} shows what was dropped; to train on what was kept:\n"
          f"  --config.data.name=prepared {path}")  # fmt: skip
    return 0


if __name__ == "__main__":
    if any(re.fullmatch("--?encode(=.*)?", argument) for argument in sys.argv):
        from sdjax import encode
        from sdjax.system.allocator import use_large_pages

        use_large_pages()
        sys.exit(encode.main(sys.argv))
    sys.exit(main(sys.argv))
