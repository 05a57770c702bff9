"""Stretches of flat tensors as boxes."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.parallel.flat import boxes


@given(
    shape=st.lists(st.integers(0, 4), max_size=4), edges=st.tuples(st.integers(0, 300), st.integers(0, 300)).map(sorted)
)
def test_boxes_of_a_stretch_are_its_elements_in_their_order(shape, edges):
    start, stop = (min(edge, prod(shape)) for edge in edges)
    numbers = torch.arange(prod(shape)).view(shape)
    found = []
    for offsets, size in boxes(start, stop, shape):
        box = numbers[tuple(slice(o, o + n) for o, n in zip(offsets, size, strict=True))]
        assert tuple(box.shape) == size
        found += box.flatten().tolist()
    assert found == [*range(start, stop)]
    assert len([*boxes(start, stop, shape)]) <= max(1, 2 * len(shape) - 1)
