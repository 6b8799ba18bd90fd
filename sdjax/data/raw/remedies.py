"""Remedies for rows that cannot be used, by the first row of each reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from sdjax.data.raw.rows import Skip, passed_over

# reason: (the option, its effect)
_OPTIONS = {
    "no_caption": (("text_key", "names the field of the caption"),
                   ("min_caption_chars", "of 0 keeps pictures without one")),
    "caption_too_short": (("min_caption_chars", "is the limit"),),
    "caption_too_long": (("max_caption_chars", "is the limit"),),
    "caption_pattern": (("drop_pattern", "is what is found in it"),),
    "caption_not_text": (("text_key", "names the field of the caption"),),
    "missing_image": (("image_key", "names the column of the images"),),
    "too_small": (("min_side", "is the limit, 0 for none"),),
    "aspect_ratio": (("max_aspect", "is the limit, 0 for none"),),
    "too_many_pixels": (("max_pixels", "is the limit"),),
    "colour_mode": (("convert_modes", "converts it"),),
    "leads_outside": (("outside_links", "reads what links lead to outside of the folder"),),
    "no_score": (("score", "names it"),),
    "score": (("score", "has the limits"),),
}  # fmt: skip
# reason: the remedy in the data
_MEND = {
    "missing_file": "file_name is a path below the folder of the metadata file",
    "no_file_name": "expected a field file_name, a path below the folder of the metadata file",
    "unsafe_path": "file_name is a path below the folder of the metadata file",
    "not_a_file": "only regular files are read",
    "bad_json": "expected one JSON object in each line",
    "bad_record": "expected one JSON object in each line, or as many cells as the header of CSV",
    "unsupported_format": "convert the pictures to PNG or JPEG",
    "bad_shard": "copy the file again",
}


def unusable(skips: Iterable[Skip], others: Mapping[str, int], options: Mapping[str, str]) -> str:
    """A line for each reason, the most frequent first, with its first row and the remedy.

    others: files without a row, by ending. options: {option: the caller's name for it}, as
    {"min_side": "--min_side"}; options that the caller lacks are not named.
    """
    counts: Counter[str] = Counter()
    first: dict[str, Skip] = {}
    for skip in skips:
        counts[skip.reason] += 1
        first.setdefault(skip.reason, skip)
    lines = [] if counts else ["there is not one row"]
    for reason, count in counts.most_common():
        skip = first[reason]
        detail = f" ({skip.detail})" if skip.detail else ""
        lines.append(f"{count:,} {reason}, first {skip.name}{detail}{_help(reason, options)}")
    if others:
        lines.append(passed_over(others))
    for end, format in ((".tar", "webdataset"), (".tgz", "webdataset"), (".parquet", "parquet")):
        if end in others and "format" in options:
            lines.append(f"{options['format']}={format} reads the {end} files")
    return "".join(f"\n  {line}" for line in lines)


def _help(reason: str, options: Mapping[str, str]) -> str:
    named = _OPTIONS.get(reason, ())
    helps = [f"{options[name]} {does}" for name, does in named if name in options]
    helps += [_MEND[reason]] if reason in _MEND else []
    return f"; {', '.join(helps)}" if helps else ""
