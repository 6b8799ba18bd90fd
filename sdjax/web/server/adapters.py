"""Adapters that requests switch and weigh: in fields, or in prompts as A1111's clients do.

An adapter has the weight that --lora gave it, unless a request says another. What adapters change
is merged into the weights once for each set of weights, as `sdjax.sample --lora` does, and a few
sets are kept.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.checkpoints.adapters import Lora, merged_loras
from sdjax.errors import UserError
from sdjax.families.family import Model
from sdjax.sampling.denoising import named_of_member
from sdjax.system.untrusted import brief
from sdjax.web.server.fields import Fields, InvalidRequest

Weights = tuple[float, ...]  # of all adapters, in their order

MOST_WEIGHT = 10.0
# As A1111's extra_networks.re_extra_net; "lyco" is another name of "lora" there.
_TAG = re.compile(r"<(lora|lyco|hypernet):([^>]+)>")
_KIND = "lora"
_NO_NAME = re.compile(r'[:<>,"\n]')
# Names that files and folders have whatever is in them; the folder around them tells more.
_COMMON = ("pytorch_lora_weights", "adapter", "adapter_model", "lora", "diffusers")


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A model with what its adapters change.

    model: without adapters, and with no other parameters than those that adapters change.
    rows: {path: what learnt words add to such a parameter}.
    number: among those that predict, see `sampling.ensemble`; 0 for the only one.
    """

    model: Model
    loras: Sequence[Lora]
    rows: Mapping[str, np.ndarray]
    number: int = 0


def make_member(model: Model, loras: Sequence[Lora], ready: Model) -> Member:
    """Return a member of a model without adapters in its weights.

    Args:
        ready: the model with adapters and learnt words.

    Raises:
        UserError: an adapter does not fit the model.
    """
    changed = merged_loras(model, loras, [1.0] * len(loras)).params
    base = {path: value for path, value in model.params.items() if changed[path] is not value}
    rows = {
        path: np.asarray(ready.params[path])[len(value) :]
        for path, value in base.items()
        if len(ready.params[path]) > len(value)
    }
    return Member(dataclasses.replace(model, params=base), loras, rows)


class Adapters:
    """The adapters of a server; none by default.

    Args:
        members: all with the same adapters.
        kept: sets of weights whose parameters stay on the device.
    """

    def __init__(self, members: Sequence[Member] = (), *, kept: int = 2):
        self._members, self._kept = tuple(members), kept
        self._sets: collections.OrderedDict[Weights, dict[str, jax.Array]] = (
            collections.OrderedDict()
        )
        self.loras: Sequence[Lora] = members[0].loras if members else ()
        self.names = names_of(self.loras)
        self.start: Weights = tuple(lora.weight for lora in self.loras)

    def params(self, weights: Weights) -> dict[str, jax.Array]:
        """Return {path: float32 array} of what adapters of these weights change."""
        if weights not in self._sets:
            while len(self._sets) >= self._kept:  # first, so that the new one finds its place
                self._sets.popitem(last=False)
            self._sets[weights] = {
                path: value
                for member in self._members
                for path, value in _changed(member, weights).items()
            }
        self._sets.move_to_end(weights)
        return self._sets[weights]

    def asked(self, prompt: str, fields: Fields) -> tuple[str, Weights]:
        """Return a prompt without the words about adapters, and the weights that it asks for.

        Args:
            fields: {name: weight}, which the prompt's words come after.

        Raises:
            InvalidRequest: an adapter is not known, or a weight is none.
        """
        weights = dict(zip(self.names, self.start, strict=True))
        for name in fields.keys():
            self._check(name, f"loras has {brief(name)}")
            weights[name] = fields.number(name, weights[name], least=-MOST_WEIGHT, most=MOST_WEIGHT)
        for match in _TAG.finditer(prompt):
            name, weight = self._read(match)
            weights[name] = weight
        kept = _TAG.sub("", prompt)
        return (kept.strip() if kept != prompt else prompt), tuple(weights.values())

    def written(self, prompt: str, weights: Weights | None) -> str:
        """Return a prompt with the words about adapters that `asked` reads the weights from."""
        words = [prompt] if prompt else []
        for name, weight, start in zip(self.names, weights or self.start, self.start, strict=True):
            if weight or start:
                words.append(f"<{_KIND}:{name}:{weight!r}>")
        return " ".join(words)

    def listed(self, weights: Weights | None) -> dict[str, float]:
        """Return {name: weight} of the adapters that are switched on."""
        given = zip(self.names, weights or self.start, strict=True)
        return {name: weight for name, weight in given if weight}

    def options(self, weights: Weights | None) -> list[str]:
        """Return what --lora is to be for these weights, by `sdjax.sample`."""
        return [
            f"{lora.place}:{weight!r}" + (f":lbw={_listed(lora.numbers)}" if lora.numbers else "")
            for lora, weight in zip(self.loras, weights or self.start, strict=True)
            if weight
        ]

    def _check(self, name: str, found: str) -> None:
        if name not in self.names:
            known = f"which are {', '.join(self.names)}" if self.names else "and it has none"
            raise InvalidRequest(
                f"{found}; this server's adapters are those of its --lora, {known}"
            )

    def _read(self, match: re.Match[str]) -> tuple[str, float]:
        """Return name and weight of lora:NAME, lora:NAME:WEIGHT or lora:NAME:TE:UNET, in <>."""
        found = f"the prompt has {brief(match[0])}"
        if match[1] == "hypernet":
            raise InvalidRequest(f"{found}; this server has no hypernetworks, leave it out")
        name, *items = match[2].split(":")
        self._check(name, found)
        numbers = []
        for item in items:
            key, named, value = item.rpartition("=")
            if named and key not in ("te", "unet"):
                raise InvalidRequest(f"{found}, where {brief(key)} is not known; leave it out")
            numbers.append(_number(value, found))
        if len(set(numbers)) > 1:
            raise InvalidRequest(
                f"{found}, with two weights; the text encoders and the denoiser have the same one "
                "here: give one"
            )
        return name, numbers[0] if numbers else 1.0


def names_of(loras: Sequence[Lora]) -> tuple[str, ...]:
    """Return names of adapters: of their files or folders, with folders around where two are equal.

    Raises:
        UserError: an adapter is given twice.
    """
    parts = [_parts(lora) for lora in loras]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(own[-n:]) for own, n in zip(parts, lengths, strict=True)]
        again = [i for i, name in enumerate(names) if names.count(name) > 1]
        if not again:
            return tuple(_NO_NAME.sub("_", name) for name in names)
        if any(lengths[i] >= len(parts[i]) for i in again):
            raise UserError(f"--lora={loras[again[0]].option} is given twice; give it once")
        for i in again:
            lengths[i] += 1


def _parts(lora: Lora) -> tuple[str, ...]:
    """Return the names of an adapter's file and of the folders around it, without common ones."""
    place = lora.place
    parts = (*place.parts[:-1], place.name if place.is_dir() else place.stem)
    while len(parts) > 1 and parts[-1] in _COMMON:
        parts = parts[:-1]
    return parts


def _changed(member: Member, weights: Weights) -> dict[str, jax.Array]:
    """Return the parameters that adapters change, under the names of the member."""
    params = merged_loras(member.model, member.loras, weights).params
    made: dict[str, jax.Array] = {}
    for path, value in params.items():
        if path in member.rows:
            value = np.concatenate([np.asarray(value, np.float32), member.rows[path]])
        made[path] = jnp.asarray(value, jnp.float32)
    return named_of_member(member.number, made)


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(repr(number) for number in numbers)


def _number(text: str, found: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) <= MOST_WEIGHT:
        raise InvalidRequest(
            f"{found}, where the weight is {brief(text)}; expected a number from "
            f"{-MOST_WEIGHT:g} to {MOST_WEIGHT:g}"
        )
    return number
