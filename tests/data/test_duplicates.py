"""Duplicates of sdjax.prepare: hashes, pairs, and what follows from them."""

from collections import defaultdict

import numpy as np
import pytest

from sdjax.data.prepare import duplicates
from sdjax.data.prepare.duplicates import EXACT, NEAR, SAME, difference_hash


def test_difference_hash_of_slopes():
    slope = np.repeat(np.arange(0, 252, 4, dtype=np.uint8)[None], 40, 0)[..., None].repeat(3, -1)
    assert difference_hash(slope) == 2**64 - 1
    assert difference_hash(slope[:, ::-1]) == 0


@pytest.mark.parametrize("distance", [0, 3, 6])
def test_near_duplicates_are_those_of_going_through_in_order(distance):
    """The pairs found by parts of the hash, and what follows from them, against all pairs."""
    rng = np.random.default_rng(distance)
    centres = rng.integers(0, 2**63, 40)
    hashes, digests = [], []
    for _ in range(400):
        flips = rng.choice(64, rng.integers(0, 7), replace=False)
        value = int(centres[rng.integers(40)])
        for bit in flips:
            value ^= 1 << int(bit)
        hashes.append(value)
        digests.append(f"{value} {rng.integers(2)}")  # equal pixels have equal hashes
    expected, kept = {}, []
    for at, value in enumerate(hashes):
        equal = [k for k in kept if digests[k] == digests[at]]
        alike = [k for k in kept if (hashes[k] ^ value).bit_count() <= distance]
        if equal or alike:
            expected[at] = EXACT if equal else NEAR
        else:
            kept.append(at)
    by_digest, by_hash, by_part = defaultdict(list), defaultdict(list), defaultdict(list)
    for at in rng.permutation(400).tolist():
        by_digest[digests[at]].append(at)
        by_hash[f"{hashes[at]:016x}"].append(at)
    pairs = [pair for group in by_digest.items() for pair in duplicates.exact_pairs(group)]
    for group in by_hash.items():
        pairs += [(a, b, SAME) for a, b, _ in duplicates.exact_pairs(group)]
        for part, member in duplicates._parts(group, distance=distance):
            by_part[part].append(member)
    for group in by_part.items():
        pairs += duplicates.alike_pairs(group, distance=distance)
    found = duplicates.resolve(pairs)
    assert {at: reason for at, (reason, _) in found.items()} == expected
    assert set(first for _, first in found.values()) <= set(kept)
    assert len(expected) > 20
