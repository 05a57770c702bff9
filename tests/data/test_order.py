"""The computed permutation: a bijection, different each epoch, uniform; and these tests see one that is not."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data import order
from shoal.data.order import permute


def whole(size: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(size), size, seed, epoch)


@settings(deadline=None, max_examples=150)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**80), epoch=st.integers(0, 10**9))
def test_every_element_is_reached_once(size, seed, epoch):
    assert np.array_equal(np.sort(whole(size, seed, epoch)), np.arange(size))


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 2**62), seed=st.integers(0, 2**32), data=st.data())
def test_elements_of_huge_ranges_stay_in_range_and_apart(size, seed, data):
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    out = permute(np.array(index), size, seed, 1)
    assert ((out >= 0) & (out < size)).all()
    assert len(set(out.tolist())) == len(index)
    assert out.tolist() == [int(permute(np.array([i]), size, seed, 1)[0]) for i in index]


def chi_squared(counts: np.ndarray) -> float:
    expected = counts.mean()
    return float(((counts - expected) ** 2 / expected).sum())


def test_small_permutations_are_all_equally_likely():
    seen = Counter(tuple(whole(4, seed).tolist()) for seed in range(12_000))
    counts = np.array([seen[p] for p in permutations(range(4))])
    # 23 degrees of freedom: 60 is exceeded once in 30,000.
    assert chi_squared(counts) < 60


def uniform(size: int, trials: int) -> bool:
    """Whether an element lands everywhere, and neighbours land at all distances, equally often (16 bins each)."""
    places, distances = np.zeros(16), np.zeros(16)
    index = np.array([size // 3, size // 3 + 1])
    for trial in range(trials):
        first, second = permute(index, size, 7, trial)
        places[first * 16 // size] += 1
        distances[(second - first) % size * 16 // size] += 1
    # 15 degrees of freedom: 48 is exceeded once in 40,000.
    return chi_squared(places) < 48 and chi_squared(distances) < 48


@pytest.mark.parametrize("size", [1024, 1000, 99_991])
def test_places_and_distances_are_uniform_over_epochs(size):
    assert uniform(size, 3000)


def test_within_an_epoch_neighbours_are_scattered():
    out = whole(100_000)
    distances = np.diff(out) % 100_000
    assert chi_squared(np.bincount(distances * 100 // 100_000, minlength=100).astype(float)) < 180
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.02


def test_a_weak_permutation_is_noticed(monkeypatch):
    monkeypatch.setattr(order, "_mix", lambda value, key: value + key)
    assert not uniform(1000, 3000)


def test_one_key_for_all_epochs_is_noticed(monkeypatch):
    keys = order._keys
    monkeypatch.setattr(order, "_keys", lambda seed, epoch: keys(seed, 0))
    assert not uniform(1000, 3000)


def test_the_order_is_this_one():
    """A change would break resuming of runs begun before it."""
    assert whole(10, seed=3, epoch=2).tolist() == [1, 8, 4, 0, 2, 5, 6, 3, 9, 7]
