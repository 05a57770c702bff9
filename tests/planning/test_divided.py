"""Blocks of a pipeline's stages: against all divisions that there are, simulated."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.planning.divided import divided
from shoal.planning.timeline import Seconds, simulate


def seconds(blocks, forward, backward, head, batches):
    f, b = blocks * forward, blocks * backward
    f[..., -1] += head[0]
    b[..., -1] += head[1]
    return simulate("1f1b", len(forward), 1, batches, Seconds(f, b, np.zeros_like(f))).seconds


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(0, 6), st.integers(0, 2**32))
def test_one_of_the_best_is_as_good_as_any(ranks, more, seed):
    """Two kinds of devices, memory for more or fewer blocks on each rank; the best of all when simulated."""
    rng, blocks = np.random.default_rng(seed), ranks + more
    forward = rng.uniform(0.3, 3, 2)[np.sort(rng.integers(0, 2, ranks))]
    backward, head = forward * rng.uniform(1, 2.5), rng.uniform(0, 2, 2)
    most, batches = rng.integers(1, 8, ranks), int(rng.integers(ranks, 20))
    every = np.array([c for c in product(*(range(1, m + 1) for m in most)) if sum(c) == blocks])
    found = divided(blocks, forward, backward, head, most, batches)
    assert bool(len(found)) == bool(len(every))
    if not len(found):
        return
    assert (found.sum(axis=1) == blocks).all()
    assert ((found >= 1) & (found <= most)).all()
    best = seconds(every, forward, backward, head, batches).min()
    assert seconds(found, forward, backward, head, batches).min() <= 1.001 * best


def test_ranks_as_fast_have_as_many():
    """126 blocks on 32 ranks, half of them twice as slow, the last one with an output layer as dear as two of its."""
    forward = np.where(np.arange(32) < 16, 1.0, 2.0)
    found = divided(126, forward, 2 * forward, np.array([4.0, 8.0]), np.full(32, 20), 256)[0]
    for ranks in (found[:16], found[16:-1]):
        assert ranks.max() - ranks.min() <= 1
    # No division has a slowest rank of less: 16 ranks with 5 blocks, 15 with 2, and one with 1 are too few.
    assert (3 * forward * found + np.eye(32)[-1] * 12).max() == 18


def test_what_cannot_be_divided():
    forward, head = np.ones(3), np.zeros(2)
    for blocks, most in ((2, [4, 4, 4]), (8, [2, 2, 2]), (8, [9, 0, 9])):
        assert divided(blocks, forward, forward, head, np.array(most), 6).shape == (0, 3)
