"""In which order samples come: a random permutation that is computed, not stored."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8


def permute(index_N: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where a random permutation of 0 … size − 1, another for each (seed, epoch), takes the elements
    `index_N`.

    A Feistel network over pairs (i, j) with a·b slightly more than `size` values, walked on until the value
    is in range (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", generalised Feistel and
    cycle walking). O(1) memory and time per element. Not for cryptography.
    """
    assert len(index_N) == 0 or (index_N.min() >= 0 and index_N.max() < size)
    value_N = index_N.astype(np.uint64)
    value_N = _feistel(value_N, size, _keys(seed, epoch))
    outside = np.flatnonzero(value_N >= size)
    while len(outside):
        value_N[outside] = _feistel(value_N[outside], size, _keys(seed, epoch))
        outside = outside[value_N[outside] >= size]
    return value_N.astype(np.int64)


def _feistel(value_N: NDArray[np.uint64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of 0 … a·b − 1: each round adds to one half what a hash makes of the other."""
    a = np.uint64(isqrt(max(size - 1, 0)) + 1)
    b = np.uint64(-(-size // int(a)))
    left_N, right_N = value_N // b, value_N % b
    for first, second in keys.reshape(-1, 2):
        left_N = (left_N + _mix(right_N, first) % a) % a
        right_N = (right_N + _mix(left_N, second) % b) % b
    return left_N * b + right_N


def _mix(value_N: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, section 5), of value and key."""
    value_N = value_N + key
    value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_N ^ (value_N >> np.uint64(31))


@lru_cache(maxsize=4)
def _keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8")
