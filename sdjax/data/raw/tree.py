"""A walk through a folder of raw data: every folder below it once, wherever links lead."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator

from sdjax.data.config import DataError
from sdjax.system import paths

_FILE = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,8}$")  # names of files, not of folders, in a bucket


@dataclasses.dataclass
class Links:
    """Links to folders that a walk does not follow: back to its own folders, or out of the root."""

    back: list[str] = dataclasses.field(default_factory=list)
    out: list[str] = dataclasses.field(default_factory=list)


def walk(
    root: paths.Path, links: Links | None = None, *, outside: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """Each folder below the root, "" for the root itself, and the names of its files.

    Files and folders come in the order of their names, without hidden ones and __MACOSX. A link to
    a folder is not followed. With `outside`, links that lead out of the root are followed, with two
    exceptions: to a folder that holds the link or the root, and to a folder that was seen already.
    Links that are not followed are added to `links`.

    Raises DataError: a folder cannot be listed.
    """
    if paths.is_remote(root):
        yield from _walk_bucket(root, "")
    else:
        yield from _walk_disk(os.fspath(root), links or Links(), outside)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() == "__macosx"


def _walk_disk(root: str, links: Links, outside: bool) -> Iterator[tuple[str, list[str]]]:
    real_root = os.path.realpath(root)
    seen: set[tuple[int, int]] = set()  # device and inode of each folder
    pending = [""]
    while pending:
        below = pending.pop()
        folder = os.path.join(root, below) if below else root
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                links.back.append(below)
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{folder}: the folder cannot be listed ({error.strerror}); give this user the "
                "right to read it, or move it out of the input"
            ) from error
        files, folders = [], []
        for entry in found:
            if _is_hidden(entry.name):
                continue
            path = f"{below}/{entry.name}" if below else entry.name
            if _is(entry.is_dir):
                if entry.is_symlink() and _leads_back(entry.path, folder, real_root):
                    links.back.append(path)
                elif entry.is_symlink() and not outside:
                    links.out.append(path)
                else:
                    folders.append(path)
            elif _is(entry.is_file) or entry.is_symlink():  # a broken link is missing when read
                files.append(entry.name)
        yield below, files
        pending += reversed(folders)


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link that leads to itself
        return False


def _leads_back(link: str, folder: str, real_root: str) -> bool:
    """Whether a link to a folder leads into the root, or to a folder that holds the link."""
    target = os.path.realpath(link)
    within = f"{target}/".startswith(f"{real_root.rstrip('/')}/")
    above = any(
        f"{place.rstrip('/')}/".startswith(f"{target.rstrip('/')}/")
        for place in (real_root, os.path.realpath(folder))
    )
    return within or above


def _walk_bucket(root: paths.Path, below: str) -> Iterator[tuple[str, list[str]]]:
    """Walk a bucket; to check whether an object is a folder costs a request, so few are checked."""
    try:
        children = sorted(child.name for child in (root / below if below else root).iterdir())
    except paths.storage_errors() as error:
        raise DataError(f"{root}/{below}: the folder cannot be listed: {error}") from error
    files: list[str] = []
    folders: list[str] = []
    for name in children:
        if _is_hidden(name):
            continue
        path = f"{below}/{name}" if below else name
        if not _FILE.search(name) and (root / path).is_dir():
            folders.append(path)
        else:
            files.append(name)
    yield below, files
    for path in folders:
        yield from _walk_bucket(root, path)
