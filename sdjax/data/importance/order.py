"""The places of an epoch, shared out by weights: each example has floor(w) or ceil(w) of them.

It is systematic sampling (Madow 1949): the ends of intervals of lengths w_i lie on a line, and
place k takes the example in whose interval k + u is, with u in [0, 1) anew in every epoch. So the
expected number of times that an example comes is w_i, and it is a closed form of the place.
"""

from __future__ import annotations

import numpy as np


class Shares:
    """The example at each place of an epoch of `places` places.

    weights: float64 [N] above 0.
    """

    def __init__(self, weights: np.ndarray, places: int):
        self.places = places
        self.expected = weights * (places / weights.sum())  # times that each comes in an epoch
        self._ends = np.cumsum(self.expected)
        self._ends[-1] = places

    def at(self, place: int, offset: float) -> int:
        """The number of the example at a place from 0 to `places`, for u = offset in [0, 1)."""
        found = int(np.searchsorted(self._ends, place + offset, side="right"))
        return min(found, len(self._ends) - 1)
