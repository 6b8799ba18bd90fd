"""Paths of files and folders on a disk or in a bucket: every path that a user names.

`gs://bucket/folder` works wherever a local folder does, through etils.epath and the file system
that is built into TensorFlow. An object in a bucket appears whole or not at all. It cannot be
appended to, and libraries that want a file cannot open it. A folder in a bucket cannot be renamed
in one step.
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
    from pathlib import Path  # epath has its methods except those of links and owners
else:

    class Path(type(epath.Path())):
        """An epath.Path that lists and matches as pathlib does.

        epath's `glob` expands `[v2]` or `*` in the folder's own name too, and then finds nothing or
        too much; Orbax then never merges its own files there. epath's `iterdir` skips names that
        end in "~". Paths that Orbax derives from a path of this class are of this class too.
        """

        def iterdir(self) -> Iterator[Path]:
            """Yield the paths of all entries of the folder."""
            if is_remote(self):
                yield from super().iterdir()
            else:
                yield from (self / name for name in os.listdir(self))

        def glob(self, pattern: str) -> Iterator[Path]:
            """Yield the paths below the folder that match, without hidden files."""
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
      UserError: it has a scheme other than gs://, or buckets need a package that is not installed.
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
    except ModuleNotFoundError:  # a parent package is missing
        return False


def is_remote(path: PathLike) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith("gs://")


def not_cut_off(path: Path) -> Path:
    """Return the path, where Orbax writes to all of it.

    Raises:
        UserError: it is in a bucket and has # or ?, where Orbax ends a path: arrays of gs://b/x#1
            would go to gs://b/x.
    """
    if is_remote(path) and any(mark in str(path) for mark in "#?"):
        raise UserError(
            f"{path}: checkpoints in a bucket cannot have # or ? in their path, since Orbax ends "
            "it there; choose another name"
        )
    return path


def absolute(path: PathLike) -> Path:
    """The absolute path, whatever the working directory. (epath's own method breaks gs://.)"""
    path = to_path(path)
    return path if is_remote(path) else path.absolute()


def resolved(path: PathLike) -> Path:
    """The absolute path, with symbolic links followed."""
    path = absolute(path)
    return path if is_remote(path) else Path(pathlib.Path(path).resolve())


def storage_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """The errors that reading and writing may raise, and `more`, for an `except` clause.

    Call it when the error is handled: TensorFlow's errors count once TensorFlow is loaded.
    """
    tf = sys.modules.get("tensorflow")  # its errors are no OSErrors; not loaded, it raised none
    return (*more, OSError, tf.errors.OpError) if tf is not None else (*more, OSError)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents if need be, which also tests early whether it can be reached.

    Raises:
      UserError: it cannot be made.
    """
    try:
        # TensorFlow would try for ever to make a folder in a bucket that does not exist.
        if is_remote(folder) and not Path(f"gs://{folder.parts[2]}").exists():
            raise FileNotFoundError(f"there is no bucket {folder.parts[2]}")
        folder.mkdir(parents=True, exist_ok=True)
    except storage_errors() as error:
        if system_error(error) is not None:
            raise write_error(folder, error) from error
        raise UserError(_unreachable(folder, "cannot be made", error)) from error


def exists(path: Path) -> bool:
    """Whether a path exists, as `path.exists()`.

    Raises:
      UserError: its bucket cannot be reached.
    """
    try:
        return path.exists()
    except storage_errors() as error:
        raise UserError(_unreachable(path, "cannot be reached", error)) from error


def _unreachable(path: Path, what: str, error: Exception) -> str:
    hint = f"\n{CREDENTIALS}" if is_remote(path) else ""
    return f"{path} {what}: {str(error).strip()[:500]}{hint}"


@contextmanager
def reading(path: PathLike) -> Iterator[pathlib.Path]:
    """A context with a local file of the contents of `path`, for libraries that need one."""
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
    """A context for writing a file: its errors become a WriteError that names `path`.

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
    """A context with a local file to write, which becomes `path` at the end, whole or not at all.

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
            mode = _usual_mode(local)
            yield local
            if local.stat().st_mode != mode:  # safetensors' own files are their owner's alone
                local.chmod(mode)
            os.replace(local, path)
    finally:
        local.unlink(missing_ok=True)


def _usual_mode(file: pathlib.Path) -> int:
    """The mode of a new file there, which is then gone again."""
    file.touch()
    mode = file.stat().st_mode
    file.unlink()
    return mode


def write_text(path: PathLike, text: str) -> None:
    """Write a UTF-8 file, whole or not at all. Raises WriteError."""
    with writing(path) as local:
        local.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file or a whole folder, if it exists."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        epath.Path(path).rmtree() if path.is_dir() else path.unlink()
