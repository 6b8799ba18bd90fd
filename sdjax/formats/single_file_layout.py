"""Which tensor of a single-file checkpoint belongs to what: a network, its average, or nothing.

The families know the names that no network reads and that do not matter. Any other name may belong
to another kind of model, and is an error.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from sdjax.families.family import Family
from sdjax.families.registry import FAMILIES
from sdjax.families.single_file import FileNetwork, Shapes, SingleFile
from sdjax.formats.folders import ModelError
from sdjax.system import paths
from sdjax.system.untrusted import plain

_EMA = "model_ema."  # of ldm/modules/ema.py
_SHOWN = 20  # groups of names that an error shows


@dataclasses.dataclass(frozen=True)
class Found:
    """The layout of a file.

    sure: whether names and shapes tell it; else it is the least particular one that fits.
    prefixes: {network: its prefix} of those that are there.
    """

    family: Family
    layout: SingleFile
    sure: bool
    prefixes: Mapping[str, str]

    def network(self, name: str) -> FileNetwork:
        """Return the record of a network."""
        return self.layout.networks[name]


@dataclasses.dataclass(frozen=True)
class Contents:
    """The tensors of a file, sorted.

    weights: {network: {its name for a weight, without prefix: name in the file}}.
    averages: names of an average.
    ignored: lines about what no network reads: an exact name, or a prefix with a count.
    """

    weights: Mapping[str, Mapping[str, str]]
    averages: tuple[str, ...]
    ignored: tuple[str, ...]


def find_layout(file: paths.Path, shapes: Shapes, like: Family | None = None) -> Found:
    """Return the layout of a file.

    Args:
        like: the family to prefer where the file does not tell it.

    Raises:
        ModelError: it has no network of any layout.
    """
    every = [(family, layout) for family in FAMILIES.values() for layout in family.single_files]
    told = [pair for pair in every if pair[1].tells(shapes)]
    least = [(f, layout) for f in FAMILIES.values() for layout in reversed(f.single_files)]
    least.sort(key=lambda pair: pair[0] is not like)
    for family, layout in [*told[:1], *least]:
        places = {name: part.prefix_in(shapes) for name, part in layout.networks.items()}
        prefixes = {name: prefix for name, prefix in places.items() if prefix is not None}
        if prefixes:
            return Found(family, layout, bool(told), prefixes)
    networks = [network for _, layout in every for network in layout.networks.values()]
    first = dict.fromkeys(n.prefixes[0] or n.bare[0] for n in networks)
    some = ", ".join(map(plain, sorted(shapes)[:4])) or "nothing"
    raise ModelError(
        f"{file}: no network that sdjax knows; expected names that begin with one of "
        f"{', '.join(first)}; found {some}"
    )


def sort_out(file: paths.Path, shapes: Shapes, found: Found) -> Contents:
    """Sorts the tensors of a file.

    Raises:
        ModelError: naming tensors that belong to no network and may matter, or twice to one.
    """
    layout = found.layout
    averaged = any(network.averages for network in layout.networks.values())
    weights: dict[str, dict[str, str]] = {name: {} for name in found.prefixes}
    averages: list[str] = []
    ignored: list[str] = []
    unknown: list[str] = []
    for name in shapes:
        if label := layout.leftover(name):
            ignored.append(label)
        elif averaged and name.startswith(_EMA):
            averages.append(name)
        elif label := _leftover(name, found):
            ignored.append(label)
        elif network := next((n for n in found.prefixes if _holds(found, n, name)), None):
            own = found.network(network).spelling(name[len(found.prefixes[network]) :])
            if own in weights[network]:
                raise ModelError(f"{file}: {weights[network][own]} and {name} are the same weight")
            weights[network][own] = name
        else:
            unknown.append(name)
    if unknown:
        raise ModelError(
            f"{file}: sdjax does not know {_named(unknown)}, which may belong to another kind of "
            "model; nothing was read. Remove these if they do not matter"
        )
    return Contents(weights, tuple(averages), tuple(counted(ignored)))


def _holds(found: Found, network: str, name: str) -> bool:
    return found.network(network).holds(name, found.prefixes[network])


def _leftover(name: str, found: Found) -> str:
    """The label of a tensor that lies with a network of this layout, which does not read it."""
    for network, record in found.layout.networks.items():
        prefix = found.prefixes.get(network, record.prefixes[0])
        if name.startswith(prefix) and (label := record.leftover(name[len(prefix) :])):
            return prefix + label
    return ""


def counted(labels: Iterable[str]) -> list[str]:
    """Return each label once; those that stand for several tensors with their number."""
    counts = Counter(labels)
    return [
        f"{label} ({count} tensors)" if label.endswith("*") else label
        for label, count in counts.items()
    ]


def _named(names: Iterable[str]) -> str:
    """Return the first name under each first word, and how many more there are."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(name.split(".")[0], []).append(name)
    shown = [
        plain(first) + (f" (and {len(more)} more under {plain(top)}.)" if more else "")
        for top, (first, *more) in list(groups.items())[:_SHOWN]
    ]
    rest = len(groups) - _SHOWN
    return ", ".join([*shown, *([f"and names under {rest} more words"] if rest > 0 else [])])


def whole_average(
    file: paths.Path, network: str, start: str, keys: Iterable[str], averages: Sequence[str]
) -> dict[str, str]:
    """{key: name of its average} of every weight of a network; empty if the file has no average.

    LDM drops the dots of the names (ldm/modules/ema.py), which begin at the module it averages:
    the wrapper of the UNet, or an autoencoder.

    Args:
        network: its name, for messages.
        start: of the names of its averages.
        keys: names of its weights without its prefix.
        averages: of `Contents`.

    Raises:
        ModelError: the average covers a part of the network, or more than it.
    """
    # The average of an autoencoder is also one of its losses.
    found = {name for name in averages if not name.startswith(f"{start}loss")}
    flat = {start + key.replace(".", ""): key for key in keys}
    strange = sorted(found - set(flat))
    if found and (strange or len(found) < len(flat)):
        missing = sorted(set(flat) - found)
        lacks = f", without {missing[0]}" if missing else ""
        more = f", and {len(strange)} that are none of them, as {strange[0]}" if strange else ""
        raise ModelError(
            f"{file}: its average (model_ema.*) has {len(found) - len(strange)} of the {len(flat)} "
            f"weights of the {network}{lacks}{more}; a mixture of both is no model. Take the "
            "weights themselves: sdjax.convert --weights=raw"
        )
    return {flat[name]: name for name in found}
