"""The files of named pictures in image folders: beside a picture, in a folder, or in metadata.

The key of a named picture says where its file is:

- "edge": the column `edge` or `edge_file_name` of the row, which names a file below the folder of
  the metadata file; without one, NAME.edge.png beside NAME.jpg, with any ending of pictures.
- "edges/": a folder below data.path with the same tree, where edges/a/NAME.png is that of
  a/NAME.jpg (`conditioning_data_dir` of kohya's sd-scripts). Else edges/NAME.png is, so data.path
  may be the folder above a folder of pictures and a folder of edges.

Such files make no rows of their own.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

from sdjax.data.named_images import NamedImage
from sdjax.data.raw.files import PathGuard, safe_name
from sdjax.data.raw.layout import join
from sdjax.data.raw.limits import MOST_PICTURE_BYTES
from sdjax.data.raw.rows import IMAGE_SUFFIXES, Fields, ending
from sdjax.system import paths

_IMAGES = frozenset(IMAGE_SUFFIXES)


def is_named(folder: str, file: str, fields: Fields) -> bool:
    """Whether a file is a named picture by its folder or its name.

    folder: below the root, "" for the root.
    """
    stem = file.rpartition(".")[0]
    if ending(file) not in _IMAGES:
        return False
    return any(
        f"{folder}/".startswith(_folder_of(named))
        if _folder_of(named)
        else stem.endswith(f".{named.origin}")
        for named in fields.images
        if not named.is_alpha
    )


def _folder_of(named: NamedImage) -> str:
    """The folder of a named picture, with a slash at its end; "" if its key is no folder."""
    return named.origin if named.origin.endswith("/") else ""


def of_metadata(entry: Mapping[str, Any], named: NamedImage) -> Any:
    """The file that a row of metadata names for a picture, unchecked; None if it names none."""
    columns = (named.origin, f"{named.origin}_file_name")
    return next((entry[column] for column in columns if entry.get(column)), None)


class NamedFiles:
    """The finder and reader of the files of named pictures, for one shard.

    base: the folder of the metadata file below the root.
    """

    def __init__(self, root: str, base: str, fields: Fields, *, outside: bool):
        self._root, self._base = paths.to_path(root), base
        self._images = [named for named in fields.images if not named.is_alpha]
        self._inside = PathGuard(root, outside=outside)
        self._listed: dict[str, dict[str, str]] = {}  # {folder: {stem: file}}

    def files(self, entry: Mapping[str, Any]) -> dict[str, str | None]:
        """The file of each named picture of a row, below the root; None if there is none.

        Raises BadRow: metadata name one that is not below the folder.
        """
        return {named.name: self._file(entry, named) for named in self._images}

    def _file(self, entry: Mapping[str, Any], named: NamedImage) -> str | None:
        folder, name = posixpath.split(entry["file_name"])
        stem = name.rpartition(".")[0]
        if other := _folder_of(named):
            inner = folder.partition("/")[2]
            below = dict.fromkeys((folder, inner))
            found = (
                self._beside(join(other.rstrip("/"), part).rstrip("/"), stem) for part in below
            )
            return next(filter(None, found), None)
        if written := of_metadata(entry, named):
            return join(self._base, safe_name(written))
        return self._beside(folder, f"{stem}.{named.origin}")

    def _beside(self, folder: str, stem: str) -> str | None:
        """The picture of a folder with a stem."""
        if folder not in self._listed:
            self._listed[folder] = self._list(folder)
        found = self._listed[folder].get(stem)
        return None if found is None else join(folder, found)

    def _list(self, folder: str) -> dict[str, str]:
        try:
            there = sorted(child.name for child in (self._root / folder).iterdir())
        except paths.storage_errors():
            return {}
        return {name.rpartition(".")[0]: name for name in there if ending(name) in _IMAGES}

    def read(self, entry: Mapping[str, Any]) -> dict[str, bytes | None]:
        """The bytes of each named picture of a row; None if it is not there.

        Raises BadRow: a file is not to be read.
        """
        found: dict[str, bytes | None] = {}
        for name, file in self.files(entry).items():
            found[name] = None
            if file is not None:
                try:
                    found[name] = self._inside.read(
                        self._root / file, MOST_PICTURE_BYTES, "too_many_bytes"
                    )
                except paths.storage_errors():
                    continue
        return found
