"""YAML files of unknown origin: no objects, no small file that grows large, no repeated key."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from sdjax.system import paths, text_files
from sdjax.system.untrusted import MOST_DEPTH, brief, check_depth, damage, why

MOST_YAML = 2**19  # bytes; PyYAML reads some 50,000 in a second


def read_yaml(path: paths.PathLike) -> Any:
    """Return the value in a YAML file.

    Raises:
        TextError: it cannot be read, is larger than 512 KiB, is not YAML, is nested more than 100
            deep, has a key twice, or merges groups (`<<`).
    """
    path = paths.to_path(path)
    text = text_files.read_text(path, most=MOST_YAML)
    try:
        value = yaml.load(text, _Loader)
        check_depth(value)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}" if mark else ""
        why_not = why(ValueError(error.problem or error.context or ""))
        raise text_files.TextError(f"{path}: not YAML ({why_not}{where})") from error
    except damage() as error:
        raise text_files.TextError(f"{path}: not YAML ({why(error)})") from error
    return value


class _Loader(yaml.SafeLoader):
    """A loader that refuses repeated keys, of which yaml drops the first silently.

    It refuses merges too, which double a small file at every line.
    """

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= MOST_DEPTH:  # type: ignore[has-type]  # at thousands, it takes minutes
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MOST_DEPTH} deep", problem_mark=self.get_mark()
            )
        super().fetch_flow_collection_start(token)  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem="merged groups (<<) are not read", problem_mark=key.start_mark
                )
            name = self.construct_object(key, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(name, Hashable):
                continue  # the call below raises yaml's own error
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{brief(name)} is there twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)
