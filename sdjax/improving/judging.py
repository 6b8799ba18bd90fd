"""Whether a model does right by each of some held-out prompts: by shapes, by CLIP, by its loss."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from sdjax.data.pictures import Folder, stretches
from sdjax.errors import UserError
from sdjax.evaluation.features import ClipTower
from sdjax.evaluation.losses import Example
from sdjax.evaluation.metrics.fidelity import is_of_shapes, verdicts
from sdjax.evaluation.session import Session
from sdjax.improving.proposal import Verdict
from sdjax.sampling.drawing import Prompts
from sdjax.system import paths, text_files, untrusted

JUDGES = ("auto", "fidelity", "clip", "loss")
METRIC = {"fidelity": "fidelity", "clip": "clip_score", "loss": "example_loss"}
DISTRACTORS = 99  # other captions among which CLIP has to find a picture's own (AttnGAN)
WORST = 0.25  # the share of examples that fails by their loss, before
FIND, JUDGE = "find", "judge"  # the halves of the held-out prompts


def choose_judge(asked: str, captions: Sequence[str], clip: str) -> str:
    """Return which judge there is: what reads shapes, else CLIP, else the loss.

    Raises:
        UserError: it was asked for and cannot be had.
    """
    if asked == "fidelity" and not is_of_shapes(captions):
        raise UserError(
            "--judge=fidelity reads pictures of captioned_shapes, and the held-out captions are "
            "others; use --judge=clip with --clip=DIR, or --judge=loss"
        )
    if asked == "clip" and not clip:
        raise UserError("--judge=clip needs the folder of a CLIP: --clip=DIR")
    if asked != "auto":
        return asked
    return "fidelity" if is_of_shapes(captions) else "clip" if clip else "loss"


def half_of(text: str) -> str:
    """Return which half a held-out prompt or example belongs to, by its hash.

    Groups are found on one half and judged on the other, so that what was found by chance is not
    taken for an improvement when it goes.
    """
    return JUDGE if hashlib.sha256(text.encode()).digest()[0] % 2 else FIND


def halves(captions: Sequence[str], count: int) -> dict[str, tuple[str, ...]]:
    """Up to `count` different captions of each half, in the order of their hashes."""
    order = sorted(set(captions), key=lambda text: hashlib.sha256(text.encode()).hexdigest()[2:])
    found = {
        half: tuple(text for text in order if half_of(text) == half)[:count]
        for half in (FIND, JUDGE)
    }
    if not all(found.values()):
        raise UserError(
            f"the held-out split has {len(order)} different captions, too few to find failing "
            "groups on one half and to judge on the other; name a larger one with --split"
        )
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class PictureJudge:
    """Draws pictures of prompts, the same noise for the same prompt, and judges each.

    Those that are there already stay.

    shows: of "fidelity", what of its caption a picture has to show, one of PROPERTIES.
    """

    session: Session
    judge: str
    prompts: dict[str, tuple[str, ...]]
    per_prompt: int
    shows: str = "exact"

    def __call__(self, half: str, folder: paths.Path) -> list[Verdict]:
        """Return a verdict for each picture of a half."""
        texts = self.prompts[half]
        prompts, count = Prompts(texts, self.per_prompt), len(texts) * self.per_prompt
        pictures = self.session.draw(folder / half, prompts, count)
        captions = [prompts.text(number) for number in range(count)]
        if self.judge == "fidelity":
            passed = _by_shapes(pictures, captions, self.shows)
        else:
            assert self.session.inputs.clip is not None
            passed = _by_clip(self.session.inputs.clip, pictures, captions)
        keys = [f"{half}/{file.name}" for file in pictures.files]
        return [Verdict(*one) for one in zip(keys, captions, passed, strict=True)]


def _by_shapes(pictures: Folder, captions: Sequence[str], shows: str) -> list[bool]:
    """Whether each picture shows its caption; one that does not state the property is right."""
    images = (image for part in stretches(pictures) for image in part)
    pairs = zip(captions, images, strict=True)
    return [verdicts(text, image).get(shows, True) for text, image in pairs]


def _by_clip(clip: ClipTower, pictures: Folder, captions: Sequence[str]) -> list[bool]:
    """Whether CLIP finds a picture nearer to its caption than to others: R-precision at 1."""
    texts = sorted(set(captions))
    images = np.concatenate([clip.images(part) for part in stretches(pictures)])
    return found_first(images, clip.texts(texts), texts, captions)


def found_first(
    images: np.ndarray, features: np.ndarray, texts: Sequence[str], captions: Sequence[str]
) -> list[bool]:
    """Whether the caption of each image is the nearest of up to a hundred.

    Args:
        images: [N, D], features: [T, D] of `texts`, all of length 1.
        captions: N of `texts`.
    """
    place = {text: i for i, text in enumerate(texts)}
    passed = []
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        own = place[caption]
        others = np.delete(np.arange(len(texts)), own)
        rng = np.random.default_rng(number)  # the same distractors before and after
        chosen = rng.permutation(others)[:DISTRACTORS]
        passed.append(bool((features[chosen] @ image < features[own] @ image).all()))
    return passed


def by_loss(examples: Sequence[Example], threshold: float | None) -> tuple[list[Verdict], float]:
    """Whether the loss of each example is at most the threshold, and that.

    threshold: None for the loss that a quarter of the examples exceeds.
    """
    losses = np.array([one.loss for one in examples])
    limit = float(np.quantile(losses, 1 - WORST)) if threshold is None else threshold
    return [
        Verdict(f"{one.part}/{one.number} {one.key}", one.caption, bool(one.loss <= limit))
        for one in sorted(examples, key=lambda one: (one.part, one.number))
    ], limit


def remembered(file: paths.Path, make: Callable[[], list[Verdict]]) -> list[Verdict]:
    """The verdicts in a file of JSON lines; if it is not there, made and written."""
    if not file.exists():
        lines = [json.dumps(dataclasses.asdict(one), ensure_ascii=False) for one in make()]
        paths.make_folder(file.parent)
        paths.write_text(file, "\n".join(lines) + "\n")
    rows = (line for line in text_files.lines(text_files.read_text(file)) if line)
    with untrusted.explained(file, "verdicts", remedy="delete it, and it is made again"):
        return [_verdict(row) for row in rows]


def _verdict(row: str) -> Verdict:
    """A verdict of its line of JSON; raises an error of damage."""
    found = Verdict(**json.loads(row))
    for field in dataclasses.fields(found):
        kind, value = {"passed": bool}.get(field.name, str), getattr(found, field.name)
        if not isinstance(value, kind):
            raise TypeError(f"{field.name} is {untrusted.brief(value)}")
    return found
