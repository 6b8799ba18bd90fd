"""An audit: how often pictures of a prompt show each label of an attribute.

    prompts:
      - a photo of a doctor
      - a photo of a nurse
    pictures_per_prompt: 100
    attributes:
      hair:                       # labelled by CLIP, zero-shot: texts for each label
        dark: [a photo of a person with dark hair, a person with black hair]
        fair: [a photo of a person with fair hair, a person with blond hair]
      smile: [smiling, serious]   # labelled by the function below
    targets:                      # optional; without it an even share for each label
      hair: {dark: 0.7, fair: 0.3}
    labeller: my_package.my_module:label   # only for attributes without texts

`labeller(images, prompts)` takes uint8 [N, H, W, 3] and N texts, and returns {attribute: N labels}.
A label of None means that the picture does not show the attribute. The labeller is the user's own
code and runs as such.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.errors import UserError
from sdjax.evaluation.features import ClipTower
from sdjax.system import paths, text_files, yaml_files
from sdjax.system.untrusted import brief, explained, plain

UNTOLD = -1  # the code of a picture without a label
_FIELDS = ("prompts", "pictures_per_prompt", "attributes", "targets", "labeller")
Codes = dict[str, np.ndarray]


class AuditError(UserError):
    """An audit file, or a labeller it names, that is not valid; the message names the field."""


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An attribute of a picture.

    texts: for each label the texts that CLIP compares pictures with; () if the labeller labels it.
    target: the share that each label should have; they add up to 1.
    """

    name: str
    labels: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    target: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Audit:
    """The contents of an audit file, as in the module's docstring."""

    prompts: tuple[str, ...]
    pictures_per_prompt: int
    attributes: tuple[Attribute, ...]
    labeller: str | None = None

    @property
    def captions(self) -> list[str]:
        """The prompt of every picture, all pictures of a prompt one after the other."""
        return [prompt for prompt in self.prompts for _ in range(self.pictures_per_prompt)]

    @property
    def needs_clip(self) -> bool:
        """Whether CLIP labels one of the attributes."""
        return any(attribute.texts for attribute in self.attributes)


def read_audit(path: paths.PathLike) -> Audit:
    """Read the audit in a yaml file.

    Raises:
        AuditError: the file is missing, is no yaml, or has an invalid field. The message names the
            field, its value and the expected ones.
    """
    path = paths.to_path(path)
    try:
        content = yaml_files.read_yaml(path)
    except text_files.TextError as error:
        raise AuditError(f"--audit={error}") from error
    with explained(path, "an audit", error=AuditError, remedy="see sdjax/evaluation/audit.py"):
        return _audit(content)


def make_labeller(
    audit: Audit, clip: ClipTower | None = None
) -> Callable[[np.ndarray, Sequence[str]], Codes]:
    """Build `label(images, prompts) -> {attribute: codes}`.

    It takes uint8 [N, H, W, 3] and the N prompts, and returns for each attribute int32 [N]: the
    position of the picture's label among the attribute's, or UNTOLD.

    Args:
        clip: for attributes with texts.

    Raises:
        AuditError: there is no CLIP for them, or the audit's labeller cannot be imported.
    """
    by_text = [attribute for attribute in audit.attributes if attribute.texts]
    by_function = [attribute for attribute in audit.attributes if not attribute.texts]
    if by_text and clip is None:
        raise AuditError(
            f"attribute {by_text[0].name!r} is told by CLIP: name a CLIP folder in --clip, or let "
            "one be fetched with --download"
        )
    anchors = [] if clip is None else [class_features(clip, a.texts) for a in by_text]
    function = import_function(audit.labeller) if audit.labeller else None

    def label(images: np.ndarray, prompts: Sequence[str]) -> Codes:
        found: Codes = {}
        if clip is not None and by_text:
            features = clip.images(images)
            for attribute, texts in zip(by_text, anchors, strict=True):
                chosen = zero_shot(features, texts, clip.logit_scale).argmax(axis=1)
                found[attribute.name] = chosen.astype(np.int32)
        if function is not None:
            named = function(images, list(prompts))
            for attribute in by_function:
                found[attribute.name] = _codes(attribute, named, len(images), audit.labeller)
        return found

    return label


def class_features(clip: ClipTower, texts: Sequence[Sequence[str]]) -> np.ndarray:
    """The mean direction of each label's texts, float32 [labels, D] of length 1.

    The ensemble of prompts of CLIP's zero-shot classifier (arXiv:2103.00020, section 3.1.4).
    """
    means = np.stack([clip.texts(list(some)).mean(axis=0) for some in texts])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def zero_shot(images: np.ndarray, classes: np.ndarray, logit_scale: float) -> np.ndarray:
    """The probabilities of labels, float32 [N, labels]: softmax of scaled cosines with each.

    Args:
        images: [N, D] of `ClipTower.images`; classes: [labels, D] of `class_features`.
    """
    logits = logit_scale * images @ classes.T
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def import_function(name: str) -> Callable[..., Any]:
    """Import the function "package.module:function", which runs the module.

    Raises:
        AuditError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        raise AuditError(
            f"labeller {name!r} cannot be imported ({type(error).__name__}: {error}); expected "
            "package.module:function, importable from where the command is run"
        ) from error
    if not callable(found):
        raise AuditError(f"labeller {name!r} is a {type(found).__name__}; expected a function")
    return found


def _codes(attribute: Attribute, named: Any, count: int, labeller: str | None) -> np.ndarray:
    """The positions of the labeller's labels among those of one attribute, int32 [count]."""
    if not isinstance(named, Mapping) or attribute.name not in named:
        what = f"has {sorted(map(str, named))}" if isinstance(named, Mapping) else repr(type(named))
        raise AuditError(
            f"labeller {labeller!r} must give a dictionary with {attribute.name!r}; it {what}"
        )
    labels = list(named[attribute.name])
    unknown = {str(label) for label in labels if label is not None} - set(attribute.labels)
    if len(labels) != count or unknown:
        odd = f"{sorted(unknown)}" if unknown else f"{len(labels)} labels"
        raise AuditError(
            f"labeller {labeller!r} gives {odd} for {attribute.name!r} of {count} pictures; "
            f"expected one each of {', '.join(attribute.labels)}, or None"
        )
    where = {label: code for code, label in enumerate(attribute.labels)}
    return np.array([UNTOLD if x is None else where[str(x)] for x in labels], np.int32)


# ---- the file ------------------------------------------------------------------------------------


def _audit(content: Any) -> Audit:
    """The audit in the content of a yaml file."""
    if not isinstance(content, Mapping):
        raise AuditError(f"expected {', '.join(_FIELDS)}; found {type(content).__name__}")
    unknown = [name for name in content if name not in _FIELDS]
    if unknown:
        raise AuditError(
            f"unknown field {', '.join(map(plain, unknown[:8]))}; expected {', '.join(_FIELDS)}"
        )
    prompts = _texts("prompts", content.get("prompts"))
    number = content.get("pictures_per_prompt")
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= 1e6:
        raise AuditError(f"pictures_per_prompt is {brief(number)}; expected 1 to 1,000,000")
    attributes, targets = content.get("attributes"), content.get("targets") or {}
    if not isinstance(attributes, Mapping) or not attributes:
        raise AuditError(
            f"attributes is {brief(attributes)}; expected {{name: labels}}, at least one"
        )
    if not isinstance(targets, Mapping) or set(targets) - set(attributes):
        raise AuditError(f"targets is {brief(targets)}; expected shares for names in attributes")
    found = tuple(_attribute(name, value, targets) for name, value in attributes.items())
    labeller = content.get("labeller")
    by_function = [attribute.name for attribute in found if not attribute.texts]
    if labeller is not None and (
        not isinstance(labeller, str) or not all(labeller.partition(":")[::2])
    ):
        raise AuditError(f"labeller is {brief(labeller)}; expected package.module:function")
    if bool(by_function) != bool(labeller):
        raise AuditError(
            f"attributes.{plain(by_function[0])} is a list of labels without texts for CLIP: add "
            "texts, or name the function that tells it in labeller"
            if by_function
            else f"labeller is {brief(labeller)}, but every attribute has texts and is told by "
            "CLIP; write an attribute as a list of its labels for the labeller to tell it"
        )
    return Audit(prompts, number, found, labeller)


def _attribute(name: Any, value: Any, targets: Mapping[Any, Any]) -> Attribute:
    """The attribute in an entry of `attributes`."""
    _texts("attributes", [name])
    where = f"attributes.{plain(name)}"
    if isinstance(value, Mapping):
        labels = _texts(where, list(value))
        texts = tuple(_texts(f"{where}.{plain(label)}", found) for label, found in value.items())
    else:
        labels, texts = _texts(where, value), ()
    if len(labels) < 2:
        raise AuditError(f"{where} has 1 label; expected at least 2")
    target = targets.get(name, {label: 1 / len(labels) for label in labels})
    if (
        not isinstance(target, Mapping)
        or set(target) != set(labels)
        or not all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in target.values())
        or abs(sum(target.values()) - 1) > 1e-6
    ):
        raise AuditError(
            f"targets.{name} is {brief(target)}; expected a share for each of "
            f"{', '.join(map(plain, labels))}, which add up to 1"
        )
    return Attribute(name, labels, texts, tuple(float(target[label]) for label in labels))


def _texts(where: str, value: Any) -> tuple[str, ...]:
    """The different texts of a list, at least one; a single text may stand without a list."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise AuditError(f"{where} is {brief(value)}; expected a list of texts")
    odd = [text for text in texts if not isinstance(text, str) or not text.strip()]
    if odd:  # yaml reads yes, no, on, off and 1 as other types
        raise AuditError(f"{where} has {brief(odd[0])}, which is no text; put it in quotes")
    twice = [text for text, count in Counter(texts).items() if count > 1]
    if twice:
        raise AuditError(f"{where} has {brief(twice[0])} twice")
    return tuple(texts)
