"""Raw images and captions -> a clean dataset of ArrayRecord shards that training reads.

    python -m sdjax.prepare --input=DIR --output=DIR

The input is an image folder, WebDataset tar shards or parquet files, local or gs://. What cannot be
used is dropped and listed with the reason in report.json, report.html and dropped.jsonl of the
output. A run that was killed goes on when the same command is given again. Training reads the
output with --config.data.name=prepared --config.data.path=DIR.

Everything after `--` goes to Apache Beam, which runs it on other machines, too:

    python -m sdjax.prepare --input=gs://B/RAW --output=gs://B/CLEAN -- --runner=DataflowRunner ...
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from sdjax.data.prepare.settings import DUPLICATES, Place, Settings
from sdjax.data.raw import formats
from sdjax.data.raw.clean import Rules, ScoreRule
from sdjax.data.raw.rows import Fields
from sdjax.errors import UserError, explain

_RULES, _FIELDS = Rules(), Fields()
_DEFAULT = Settings("", _FIELDS, _RULES)
INPUT = flags.DEFINE_string(
    "input", None, "Folder, file or pattern (DIR/train-*.tar) of the raw data; may be gs://.",
    required=True,
)  # fmt: skip
OUTPUT = flags.DEFINE_string("output", None, "Folder of the dataset; may be gs://.", required=True)
FORMAT = flags.DEFINE_enum(
    "format", "auto", ("auto", *formats.FORMATS), "What the input is; auto looks."
)
IMAGE_KEY = flags.DEFINE_string("image_key", _FIELDS.image, "Parquet column of the images.")
TEXT_KEY = flags.DEFINE_string(
    "text_key", _FIELDS.text,
    "Column or JSON field of the caption. In tars, text is the .txt, or `caption` of the .json.",
)  # fmt: skip
CAPTIONS_KEY = flags.DEFINE_string(
    "captions_key", _FIELDS.captions, "Column or JSON field of a list of other captions."
)
MIN_SIDE = flags.DEFINE_integer("min_side", _RULES.min_side, "Short side in pixels; 0 for any.")
MAX_ASPECT = flags.DEFINE_float(
    "max_aspect", _RULES.max_aspect, "Long side over short side; 0 for any."
)
MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", _RULES.max_pixels, "More are refused before decoding."
)
BACKGROUND = flags.DEFINE_string(
    "background", "255,255,255", "Red, green, blue under what is transparent."
)
MIN_CHARS = flags.DEFINE_integer(
    "min_caption_chars", _RULES.min_caption_chars, "Shorter captions are dropped."
)
MAX_CHARS = flags.DEFINE_integer(
    "max_caption_chars", _RULES.max_caption_chars, "Longer captions are dropped; 0 for none."
)
UNESCAPE = flags.DEFINE_bool("unescape_html", _RULES.unescape_html, "&amp;amp; becomes &.")
CONTROL = flags.DEFINE_bool("strip_control", _RULES.strip_control, "Drop control characters.")
PATTERN = flags.DEFINE_string(
    "drop_pattern", _RULES.drop_pattern, "Captions that this regular expression finds are dropped."
)
SCORES = flags.DEFINE_multi_string(
    "score", [],
    "A number of each row that is stored with it, and its limits: aesthetic, aesthetic>=5, "
    "nsfw<=0.3 or 4<=quality<=9. Give it once for each.",
)  # fmt: skip
DUPLICATES_FLAG = flags.DEFINE_enum(
    "duplicates", _DEFAULT.duplicates, DUPLICATES,
    "What is dropped: nothing, equal pixels, or also what looks alike.",
)  # fmt: skip
DISTANCE = flags.DEFINE_integer(
    "near_distance", _DEFAULT.near_distance, "Of 64 bits of the hash, how many may differ."
)
VALIDATION = flags.DEFINE_float(
    "validation_share", _DEFAULT.validation_share,
    "Of train, by hash of the name, unless the input has such a split.",
)  # fmt: skip
TEST = flags.DEFINE_float("test_share", _DEFAULT.test_share, "The same for test.")
SHARD_MB = flags.DEFINE_integer("shard_mb", _DEFAULT.shard_mb, "Size of the files written.")
THUMBNAILS = flags.DEFINE_integer(
    "thumbnails", _DEFAULT.thumbnails, "Pictures of each reason in the report."
)
WORKERS = flags.DEFINE_integer("workers", 0, "Processes on this machine; 0 is one for each core.")


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
            f"--score is {text!r}; expected a column such as aesthetic, aesthetic>=5, nsfw<=0.3 "
            "or 4<=quality<=9"
        ) from error
    return ScoreRule(match[2], **limits)


def parse_colour(text: str) -> tuple[int, int, int]:
    """ "255,0,0" -> (255, 0, 0). Raises UserError."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) < 256 for part in parts):
        raise UserError(f"--background is {text!r}; expected three numbers of 0 to 255, as 255,0,0")
    red, green, blue = (int(part) for part in parts)
    return red, green, blue


def settings_of_flags() -> Settings:
    """Raises UserError, naming the flag, for a value that cannot be."""
    scores = tuple(parse_score(text) for text in SCORES.value)
    rules = Rules(
        min_side=MIN_SIDE.value,
        max_aspect=MAX_ASPECT.value,
        max_pixels=MAX_PIXELS.value,
        background=parse_colour(BACKGROUND.value),
        min_caption_chars=MIN_CHARS.value,
        max_caption_chars=MAX_CHARS.value,
        unescape_html=UNESCAPE.value,
        strip_control=CONTROL.value,
        drop_pattern=PATTERN.value,
        scores=scores,
    )
    columns = tuple(rule.column for rule in scores)
    found = FORMAT.value if FORMAT.value != "auto" else formats.detect(INPUT.value)
    return Settings(
        format=found,
        fields=Fields(IMAGE_KEY.value, TEXT_KEY.value, CAPTIONS_KEY.value, columns),
        rules=rules,
        duplicates=DUPLICATES_FLAG.value,
        near_distance=DISTANCE.value,
        validation_share=VALIDATION.value,
        test_share=TEST.value,
        shard_mb=SHARD_MB.value,
        thumbnails=THUMBNAILS.value,
    )


def main(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.INFO)
    try:
        if importlib.util.find_spec("apache_beam") is None:
            raise UserError("prepare takes another package: pip install 'sdjax[beam]'")
        from sdjax.data.prepare import pipeline, report

        unknown = [text for text in argv[1:] if not text.startswith("--")]
        if unknown:
            raise UserError(
                f"{unknown[0]!r} is no flag; options of Beam go after --, as --key=value"
            )
        place = Place(OUTPUT.value)
        found = pipeline.run(
            INPUT.value, settings_of_flags(), place, workers=WORKERS.value, beam_options=argv[1:]
        )
    except UserError as error:
        sys.exit(explain(error))
    print(f"{found['read']} rows read, {found['kept']} kept: {found['splits']}")
    for reason, count in sorted(found["dropped"].items(), key=lambda item: -item[1]):
        print(f"  {count} dropped: {reason}")
    print(f"{place.folder / report.HTML} shows what was dropped; to train on what was kept:\n"
          f"  --config.data.name=prepared --config.data.path={place.folder}")  # fmt: skip


if __name__ == "__main__":
    app.run(main)
