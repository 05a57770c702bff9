"""The manifest: its seal, and the check that every element of every tensor is saved exactly once."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.checkpoint import manifest
from shoal.checkpoint.manifest import Piece, Tensor, intersect, join, seal, unseal
from shoal.errors import CheckpointError


def test_every_flipped_bit_and_every_truncation_breaks_the_seal():
    body = b'{"format":1,"step":7,"values":{"loss":2.5},"files":{},"tensors":{}}'
    sealed = seal(body)
    assert unseal(sealed) == body
    for at, bit in product(range(len(sealed)), range(8)):
        flipped = bytearray(sealed)
        flipped[at] ^= 1 << bit
        assert unseal(bytes(flipped)) is None, (at, bit)
    assert all(unseal(sealed[:length]) is None for length in range(len(sealed)))
    assert unseal(sealed + b"\n") is None


def test_a_manifest_of_another_format_is_refused(tmp_path):
    (tmp_path / manifest.FILE).write_bytes(seal(b'{"format":2,"new":true}'))
    with pytest.raises(CheckpointError, match="another version"):
        manifest.read(tmp_path)


boxes = st.integers(0, 3).flatmap(
    lambda d: st.tuples(
        st.tuples(*[st.integers(1, 4)] * d),
        st.lists(st.tuples(st.tuples(*[st.integers(-1, 4)] * d), st.tuples(*[st.integers(1, 4)] * d)), max_size=5),
    )
)


def covered_once(shape, pieces) -> bool:
    """The oracle: counts elements."""
    count = np.zeros(tuple(n + 10 for n in shape), dtype=int)
    for offsets, size in pieces:
        count[tuple(slice(o + 5, o + 5 + n) for o, n in zip(offsets, size, strict=True))] += 1
    inside = tuple(slice(5, 5 + n) for n in shape)
    return bool((count[inside] == 1).all()) and count.sum() == count[inside].sum()


def is_accepted(shape, pieces) -> bool:
    tensors = {"w": Tensor("F32", shape, [Piece(f"rank-{i}", o, n, (0, 0)) for i, (o, n) in enumerate(pieces)])}
    try:
        return bool(join([tensors]))
    except CheckpointError as error:
        named = "'w'" in error.what
    assert named
    return False


@given(boxes)
@settings(max_examples=300, deadline=None)
def test_cover_agrees_with_counting(case):
    assert is_accepted(*case) == covered_once(*case)


def cuts(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size), max_size=3).map(lambda inner: sorted({0, size, *inner}))


grids = st.lists(st.integers(1, 6), min_size=1, max_size=3).flatmap(
    lambda shape: st.tuples(st.just(tuple(shape)), st.tuples(*[cuts(n) for n in shape]))
)


def grid(shape, edges):
    spans = [[(a, b - a) for a, b in pairwise(e)] for e in edges]
    return [tuple(zip(*cell, strict=True)) for cell in product(*spans)]


@given(grids, st.data())
@settings(max_examples=100, deadline=None)
def test_a_grid_is_accepted_and_one_piece_less_more_or_moved_is_not(case, data):
    shape, pieces = case[0], grid(*case)
    assert is_accepted(shape, pieces)
    index = data.draw(st.integers(0, len(pieces) - 1))
    assert not is_accepted(shape, pieces[:index] + pieces[index + 1 :])
    assert not is_accepted(shape, [*pieces, pieces[index]])
    offsets, size = pieces[index]
    moved = (tuple(o + 1 for o in offsets), size)
    assert not is_accepted(shape, [*pieces[:index], moved, *pieces[index + 1 :]])


def test_planted_overlap_bug_is_caught(monkeypatch):
    """With a check that overlooks overlaps, two halves on top of each other look like a whole."""
    monkeypatch.setattr(manifest, "_overlap", lambda pieces, dimensions: None)
    twice = [((0,), (2,)), ((0,), (2,))]
    assert is_accepted((4,), twice) != covered_once((4,), twice)


def test_ranks_must_agree_on_type_and_shape():
    with pytest.raises(CheckpointError, match=r"'w' is F32 \[4\] on rank 1 and F32 \[3\]"):
        join([{"w": Tensor("F32", (3,), [])}, {"w": Tensor("F32", (4,), [])}])


@given(boxes)
@settings(max_examples=100, deadline=None)
def test_intersection_agrees_with_sets(case):
    def elements(offsets, size):
        return set(product(*[range(o, o + n) for o, n in zip(offsets, size, strict=True)]))

    for one, other in product(case[1], case[1]):
        common = intersect(*one, *other)
        assert elements(*one) & elements(*other) == (elements(*common) if common else set())
