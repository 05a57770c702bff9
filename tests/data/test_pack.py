"""Packing against a plain best-fit decreasing; every prediction in exactly one place."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data import pack
from shoal.data.pack import best_fit, pieces, plan


def spaces_of_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """What best-fit decreasing, one piece at a time, leaves free in its rows."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(spaces, length)
        space = spaces.pop(at) if at < len(spaces) else capacity
        insort(spaces, space - length)
    return spaces


def spaces(row_P: np.ndarray, lengths: list[int], capacity: int) -> list[int]:
    used = np.bincount(row_P, weights=np.array(lengths)).astype(int) if lengths else np.empty(0, int)
    return sorted((capacity - used).tolist())


@st.composite
def packing(draw):
    capacity = draw(st.integers(1, 40))
    return draw(st.lists(st.integers(1, capacity), max_size=120)), capacity


@settings(deadline=None, max_examples=400)
@given(packing())
def test_rows_are_filled_as_by_plain_best_fit(case):
    lengths, capacity = case
    row_P = best_fit(np.array(lengths, np.int32), capacity)
    assert spaces(row_P, lengths, capacity) == spaces_of_best_fit(lengths, capacity)
    assert set(row_P.tolist()) == set(range(len(set(row_P.tolist()))))


def test_a_large_packing_is_the_same_too_and_nearly_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1.2, 20_000), 1, 1024).astype(np.int32)
    row_P = best_fit(lengths, 1024)
    assert spaces(row_P, lengths.tolist(), 1024) == spaces_of_best_fit(lengths.tolist(), 1024)
    assert lengths.sum() / (1024 * (row_P.max() + 1)) > 0.99


def test_worst_fit_would_be_noticed(monkeypatch):
    found = pack._Rooms.at_least
    monkeypatch.setattr(pack._Rooms, "at_least", lambda self, space: found(self, space)[::-1])
    lengths = [7, 6, 4, 3, 2, 2]
    assert spaces(best_fit(np.array(lengths, np.int32), 10), lengths, 10) != spaces_of_best_fit(lengths, 10)


DOCUMENTS = st.lists(st.integers(0, 90), max_size=40)


def lost_or_doubled(made: pack.Plan, start_D: np.ndarray, length_D: np.ndarray) -> bool:
    """Whether another set of tokens is predicted than all but the first of each document, once."""
    predicted = [t for s, n in zip(made.start_P, made.length_P, strict=True) for t in range(s + 1, s + n + 1)]
    expected = [t for s, n in zip(start_D, length_D, strict=True) for t in range(s + 1, s + n)]
    return sorted(predicted) != expected


@settings(deadline=None, max_examples=200)
@given(length=DOCUMENTS, capacity=st.integers(1, 30), how=st.sampled_from(["best_fit", "pad"]))
def test_every_prediction_is_made_once(length, capacity, how):
    length_D = np.array(length, np.int32)
    start_D = np.cumsum(length_D, dtype=np.int64) - length_D
    made = plan(start_D, length_D, capacity, how)
    assert not lost_or_doubled(made, start_D, length_D)
    assert made.predictions == sum(max(n - 1, 0) for n in length)
    rows = [made.length_P[a:b] for a, b in pairwise(made.first_R)]
    assert made.rows == len(rows)
    assert all(0 < row.sum() <= capacity for row in rows)
    assert how != "pad" or all(len(row) == 1 for row in rows)
    assert made.first_R[0] == 0
    assert made.first_R[-1] == len(made.start_P)


def test_pieces_without_a_token_in_common_would_be_noticed(monkeypatch):
    """The usual bug: chunks of L + 1 tokens, the first of each never predicted."""

    def chunks(start_D, length_D, capacity):
        places = [(s + k, min(capacity, n - k - 1)) for s, n in zip(start_D, length_D, strict=True)
                  for k in range(0, n - 1, capacity + 1)]  # fmt: skip
        return np.array([p[0] for p in places]), np.array([p[1] for p in places], np.int32)

    monkeypatch.setattr(pack, "pieces", chunks)
    start_D, length_D = np.array([0, 30]), np.array([30, 5], np.int32)
    assert lost_or_doubled(plan(start_D, length_D, 8, "best_fit"), start_D, length_D)


@settings(deadline=None, max_examples=100)
@given(length=DOCUMENTS, capacity=st.integers(1, 30))
def test_rows_and_pieces_are_in_the_order_of_the_store(length, capacity):
    length_D = np.array(length, np.int32)
    made = plan(np.cumsum(length_D, dtype=np.int64) - length_D, length_D, capacity, "best_fit")
    firsts = made.start_P[made.first_R[:-1]]
    assert (np.diff(firsts) > 0).all()
    for a, b in pairwise(made.first_R):
        assert (np.diff(made.start_P[a:b]) > 0).all()


def test_a_long_document_is_cut_with_one_token_in_common():
    start_P, length_P = pieces(np.array([10]), np.array([8], np.int32), 3)
    assert start_P.tolist() == [10, 13, 16]
    assert length_P.tolist() == [3, 3, 1]


def test_a_piece_that_does_not_fit_is_a_bug():
    with pytest.raises(AssertionError):
        best_fit(np.array([5], np.int32), 4)
