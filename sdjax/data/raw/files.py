"""Access to the files of raw data: regular, of bounded size, and none outside of the folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sdjax.data.raw.limits import MOST_NAME_CHARS
from sdjax.data.raw.rows import BadRow, Shard, shown
from sdjax.system import paths


class PathGuard:
    """A check that files lie in a folder, and that no link leads out of it.

    outside: whether links may lead out of it.
    """

    def __init__(self, root: str, *, outside: bool):
        self._is_local = not paths.is_remote(root)
        self._root = os.path.realpath(root) if self._is_local else root
        self._outside = outside
        self._folders: dict[str, str] = {}  # folders checked so far, and their real paths

    def check(self, file: paths.Path) -> int:
        """The size of a file in bytes.

        Raises:
            BadRow: leads_outside; missing_file for a folder; not_a_file for anything else that is
                no regular file.
            OSError: the file does not exist.
        """
        if not self._is_local:
            return int(file.stat().length)  # type: ignore[attr-defined]  # epath's
        path = os.fspath(file)
        found = os.lstat(path)
        if not self._outside:
            self._check_place(path, link=stat.S_ISLNK(found.st_mode))
        if stat.S_ISLNK(found.st_mode):
            found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            if stat.S_ISDIR(found.st_mode):
                raise BadRow("missing_file", "a folder is there")
            raise BadRow("not_a_file", "a device, a pipe or a socket")
        return found.st_size

    def _check_place(self, path: str, *, link: bool) -> None:
        """Raise a BadRow if a path lies outside of the folder."""
        if link:
            real = os.path.realpath(path)
        else:
            folder = os.path.dirname(path)
            if folder not in self._folders:
                self._folders[folder] = os.path.realpath(folder)
            real = os.path.join(self._folders[folder], os.path.basename(path))
        if not is_within(real, self._root):
            raise BadRow("leads_outside", "a link leads out of the folder")

    def read(self, file: paths.Path, most: int, reason: str) -> bytes:
        """The bytes of a file.

        Raises BadRow as `check`, and with `reason` for more than `most` bytes.
        """
        size = self.check(file)
        if size <= most:
            with open(file, "rb") if self._is_local else file.open("rb") as opened:
                data = opened.read(size + 1)
                if len(data) != size:  # files of /proc have no size, and others grow
                    data += opened.read(most + 1 - len(data))
            if len(data) <= most:
                return data
        raise BadRow(reason, f"{max(size, most + 1):,} bytes; at most {most:,} are read")


def is_within(real: str, root: str) -> bool:
    """Whether a path without links is the root, or lies below it."""
    return real == root or real.startswith(root.rstrip("/") + "/")


@contextmanager
def open_shard(shard: Shard) -> Iterator[Any]:
    """A context with the file of a shard, open for reading. Raises as `PathGuard.check`."""
    path = paths.to_path(shard.path)
    PathGuard(shard.root, outside=shard.outside).check(path)
    with path.open("rb") as file:
        yield file


def safe_name(name: Any) -> str:
    """A path that stays below the folder. Raises BadRow for any other."""
    if not isinstance(name, str) or not name:
        raise BadRow("no_file_name")
    parts = name.split("/")
    if name[0] == "/" or ".." in parts or "\0" in name or "\\" in name:
        raise BadRow("unsafe_path", "expected a path below the folder")
    if len(name) > MOST_NAME_CHARS:
        raise BadRow("unsafe_path", f"a file_name of {len(name):,} characters")
    if shown(name) != name:
        raise BadRow("bad_encoding", "a file_name with half of a surrogate pair")
    return "/".join(part for part in parts if part not in ("", "."))
