"""Folders on a disk or in a bucket: whatever folder a user names goes through here.

`gs://bucket/folder` works wherever a local folder does, through etils.epath and the file system
that is built into TensorFlow. An object in a bucket appears whole or not at all, cannot be appended
to and cannot be opened by libraries that want a file; a folder there cannot be renamed at a stroke.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from etils import epath

from sdjax.errors import UserError, system_error, write_error
from sdjax.system.interrupts import at_end

if TYPE_CHECKING:
    from pathlib import Path  # whose methods epath's have, but for those of links and owners
else:

    class Path(type(epath.Path())):
        """An epath.Path that lists and matches as pathlib does.

        epath's `glob` expands `[v2]` or `*` in the folder's own name too, and then finds nothing or
        too much: Orbax never merges what it has written there. Its `iterdir` passes over names that
        end in "~". What Orbax derives from a path of this class is of this class.
        """

        def iterdir(self) -> Iterator[Path]:
            """Yield all that is in the folder."""
            if is_remote(self):
                yield from super().iterdir()
            else:
                yield from (self / name for name in os.listdir(self))

        def glob(self, pattern: str) -> Iterator[Path]:
            """Yield what matches below the folder, level by level; no hidden files."""
            if "**" in pattern.split("/"):
                raise NotImplementedError(f"{pattern!r}: `**` would list a whole bucket")
            found = [self]
            for part in pattern.split("/"):
                found = [
                    child
                    for folder in found
                    if folder.is_dir()
                    for child in folder.iterdir()
                    if fnmatch.fnmatchcase(child.name, part)
                    and (part.startswith(".") or not child.name.startswith("."))
                ]
            yield from found


PathLike = str | os.PathLike[str]

CREDENTIALS = (
    "Is the bucket's name right, and may this machine use it? Credentials are those of the "
    "machine's service account, of `gcloud auth application-default login`, or of the file in "
    "$GOOGLE_APPLICATION_CREDENTIALS"
)


def to_path(path: PathLike) -> Path:
    """A path with the methods of pathlib, local ("~" is expanded) or in a bucket.

    Raises:
      UserError: it has a scheme other than gs://.
    """
    text = os.fspath(path)
    if "://" in text and not (text.startswith("gs://") and text[5:].strip("/")):
        raise UserError(f"{text}: expected a local folder or gs://BUCKET/FOLDER")
    if is_remote(text) and not _installed("google.cloud.storage"):
        raise UserError(f"{text}: buckets take another package: pip install 'sdjax[gcs]'")
    return Path(text).expanduser()


@functools.cache
def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def is_remote(path: PathLike) -> bool:
    """Whether it is in a bucket."""
    return os.fspath(path).startswith("gs://")


def absolute(path: PathLike) -> Path:
    """The same place whatever the working directory. (epath's own breaks gs://.)"""
    path = to_path(path)
    return path if is_remote(path) else path.absolute()


def resolved(path: PathLike) -> Path:
    """`absolute`, through symbolic links."""
    path = absolute(path)
    return path if is_remote(path) else Path(pathlib.Path(path).resolve())


def storage_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What reading and writing may raise, and `more`: for `except`, which asks when one is up."""
    tf = sys.modules.get("tensorflow")  # its errors are no OSErrors; not loaded, it raised none
    return (*more, OSError, tf.errors.OpError) if tf is not None else (*more, OSError)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents if need be, and so try early whether it can be reached.

    Raises:
      UserError: it cannot be made.
    """
    try:
        # TensorFlow would try for ever to make a folder in a bucket that is not there.
        if is_remote(folder) and not Path(f"gs://{folder.parts[2]}").exists():
            raise FileNotFoundError(f"there is no bucket {folder.parts[2]}")
        folder.mkdir(parents=True, exist_ok=True)
    except storage_errors() as error:
        if system_error(error) is not None:
            raise write_error(folder, error) from error
        raise UserError(_unreachable(folder, "cannot be made", error)) from error


def exists(path: Path) -> bool:
    """Like `path.exists()`, but a bucket that cannot be reached is a UserError."""
    try:
        return path.exists()
    except storage_errors() as error:
        raise UserError(_unreachable(path, "cannot be reached", error)) from error


def _unreachable(path: Path, what: str, error: Exception) -> str:
    hint = f"\n{CREDENTIALS}" if is_remote(path) else ""
    return f"{path} {what}: {str(error).strip()[:500]}{hint}"


@contextmanager
def reading(path: PathLike) -> Iterator[pathlib.Path]:
    """A local file with what is in `path`, for libraries that open nothing else."""
    path = to_path(path)
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder, path.name)
        epath.Path(path).copy(local)
        yield local


@contextmanager
def explained_writes(path: PathLike) -> Iterator[None]:
    """In here a file is written: what goes wrong is a WriteError that names it.

    Libraries in C++ and Rust raise errors of their own, which quote the system's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        rust = sys.modules.get("safetensors")
        disk = storage_errors(*([rust.SafetensorError] if rust is not None else []))
        if isinstance(error, disk) or system_error(error) is not None:
            raise write_error(path, error) from error
        raise


@contextmanager
def writing(path: PathLike) -> Iterator[pathlib.Path]:
    """A local file to write, which becomes `path` at the end of the block, whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    path = to_path(path)
    with explained_writes(path), _writing(path) as local:
        yield local


@contextmanager
def _writing(path: Path) -> Iterator[pathlib.Path]:
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = pathlib.Path(folder, path.name)
            yield local
            epath.Path(local).copy(path, overwrite=True)
        return
    local = pathlib.Path(f"{path}.partial")
    try:
        with at_end(lambda *_: local.unlink(missing_ok=True)):
            yield local
            os.replace(local, path)
    finally:
        local.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Write a UTF-8 file, whole or not at all. Raises WriteError."""
    with writing(path) as local:
        local.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file or a whole folder, if it is there."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        epath.Path(path).rmtree() if path.is_dir() else path.unlink()
