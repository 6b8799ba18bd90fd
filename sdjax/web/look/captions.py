"""Captions that are mended on the page: a new metadata file; the data stays as it is."""

from __future__ import annotations

import threading

from sdjax.data.raw import mended
from sdjax.data.raw.limits import MOST_CAPTION_CHARS
from sdjax.errors import UserError
from sdjax.system import paths
from sdjax.web.server.fields import InvalidRequest


class MendedCaptions:
    """The file of --captions, which has the captions that were mended and no others.

    Args:
        data: the folders of --data, in none of which it may be.

    Raises:
        UserError: it lies there, or is no such file, or its folder is not there.
    """

    def __init__(self, file: paths.Path, data: list[paths.Path]):
        within = [d for d in data if paths.resolved(file).is_relative_to(paths.resolved(d))]
        if within:
            raise UserError(
                f"--captions={file} lies in --data={within[0]}, which is only read; give a file "
                "elsewhere"
            )
        if not paths.exists(file.parent):
            raise UserError(f"--captions={file}: there is no folder {file.parent}; make it first")
        self.file = file
        self._lock = threading.Lock()
        self._captions = mended.read(file) if paths.exists(file) else {}

    def get(self, name: str, otherwise: str) -> str:
        """Return the caption of a picture: the mended one, or that of the data."""
        return self._captions.get(name, otherwise)

    def is_mended(self, name: str) -> bool:
        """Whether the caption of a picture was mended."""
        return name in self._captions

    @property
    def count(self) -> int:
        """The number of captions that were mended."""
        return len(self._captions)

    def set(self, name: str, caption: str, *, before: str, stored: str) -> None:
        """Write a caption down; it is on the disk when this returns.

        Args:
            before: what the page showed; another caption by now is not overwritten.
            stored: that of the data; to write it again takes the mended one away.

        Raises:
            InvalidRequest: the caption is too long, or somebody else changed it meanwhile.
            WriteError: of the disk.
        """
        if len(caption) > MOST_CAPTION_CHARS:
            raise InvalidRequest(
                f"the caption has {len(caption)} characters; expected at most {MOST_CAPTION_CHARS}"
            )
        with self._lock:
            if self.get(name, stored) != before:
                raise InvalidRequest(
                    "somebody else has changed this caption meanwhile; look at it again"
                )
            changed = {**self._captions, name: caption}
            if caption == stored:
                del changed[name]
            mended.write(self.file, changed)
            self._captions = changed
