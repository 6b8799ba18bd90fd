"""The ratings that people give on the page: kept with the pictures and all they were drawn from."""

from __future__ import annotations

import collections
import hashlib
import threading
import time
from typing import Any

from sdjax.data import ratings
from sdjax.system import paths
from sdjax.web.server.adapters import Adapters
from sdjax.web.server.requests import InvalidRequest, PictureRequest

_KEPT = 256  # pictures that can still be rated ...
_MOST_BYTES = 256 << 20  # ... as long as they take no more memory


class RatingStore:
    """The pictures that were shown last, and the folder of their ratings.

    Args:
        digest: of the model; adapters: that requests switch.
    """

    def __init__(self, folder: paths.Path, digest: str, adapters: Adapters | None = None):
        self._folder, self._digest, self._adapters = folder, digest, adapters or Adapters()
        self._lock = threading.Lock()
        self._shown: collections.OrderedDict[str, tuple[PictureRequest, bytes]] = (
            collections.OrderedDict()
        )

    def show(self, request: PictureRequest, file: bytes) -> str:
        """Remember a picture; return its sha256."""
        name = hashlib.sha256(file).hexdigest()
        with self._lock:
            self._shown[name] = request, file
            self._shown.move_to_end(name)
            while len(self._shown) > _KEPT or (
                len(self._shown) > 1
                and sum(_size(*each) for each in self._shown.values()) > _MOST_BYTES
            ):
                self._shown.popitem(last=False)
        return name

    def rate(self, name: str, rating: int) -> None:
        """Write down a rating, 1 for good and -1 for bad.

        Raises:
            InvalidRequest: the picture is not among the last ones.
            WriteError: of the disk.
        """
        with self._lock:
            request, file = self._find("picture", name)
            row = {"picture": name, "rating": rating, **self._about(request)}
            ratings.append(self._folder, row, {name: file})

    def prefer(self, better: str, worse: str) -> None:
        """Write down that one picture is better than another of the same prompt.

        Raises:
            InvalidRequest: one is not among the last ones, or they are no two of one prompt.
            WriteError: of the disk.
        """
        with self._lock:
            (first, file), (second, other) = (
                self._find("better", better), self._find("worse", worse)
            )  # fmt: skip
            if first.prompt != second.prompt or better == worse:
                raise InvalidRequest("better and worse are to be two pictures of one prompt")
            # What the worse was drawn from, where that is not the same.
            own, theirs = self._about(first), self._about(second)
            differs = {f"worse_{k}": v for k, v in theirs.items() if k != "time" and own[k] != v}
            row = {"better": better, "worse": worse, **own, **differs}
            ratings.append(self._folder, row, {better: file, worse: other})

    def _find(self, field: str, name: str) -> tuple[PictureRequest, bytes]:
        if name not in self._shown:
            raise InvalidRequest(
                f"{field} is {name[:80]!r}; expected one of the last {_KEPT} that were drawn"
            )
        return self._shown[name]

    def _about(self, request: PictureRequest) -> dict[str, Any]:
        """Return what a picture was drawn from, and by which model."""
        loras = self._adapters.listed(request.adapters)
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "steps": request.sampler.steps,
            "sampler": request.sampler.name,
            "guidance": request.guidance,
            "width": request.width,
            "height": request.height,
            "begun": request.image is not None,
            **({"loras": loras} if loras else {}),
            "model": self._digest,
            "time": time.time(),
        }


def _size(request: PictureRequest, file: bytes) -> int:
    """The bytes that a picture takes, and what it was drawn from."""
    arrays = (request.image, request.mask)
    return len(file) + sum(array.nbytes for array in arrays if array is not None)
