"""First weights: any shard is the slice of the whole; values are normal, and differ by seed, name and
block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.ops import initialise
from shoal.ops.fill import ONES, ZEROS, Fill
from shoal.ops.initialise import initialise_

NORMAL = Fill(mean=0.5, std=2.0)


def whole(shape: tuple[int, ...], name: str = "w", seed: int = 0, fill: Fill = NORMAL, dtype=torch.float64) -> Tensor:
    return initialise_(torch.empty(shape, dtype=dtype), name, shape, (0,) * len(shape), fill, seed)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shape, offsets and shape of a piece of it, with edges on both sides of the blocks' edges."""
    edges = {1: st.integers(1, 40_000), 2: st.integers(1, 300), 3: st.integers(1, 150)}
    dimensions = draw(st.integers(1, 3))
    shape = [draw(edges[dimensions]) for _ in range(dimensions)]
    if dimensions == 3:
        shape[0] = min(shape[0], 3)
    offsets = [draw(st.integers(0, n)) for n in shape]
    sizes = [draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True)]
    return tuple(shape), tuple(offsets), tuple(sizes)


@settings(max_examples=60, deadline=None)
@given(cuts())
def test_piece_is_the_slice_of_the_whole(
    cut: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> None:
    shape, offsets, sizes = cut
    piece = initialise_(torch.empty(sizes, dtype=torch.float64), "w", shape, offsets, NORMAL, 0)
    place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
    assert torch.equal(piece, whole(shape)[place])


@pytest.mark.parametrize("shape", [(100_000,), (400, 300), (4, 200, 130)])
def test_values_are_standard_normal_and_uncorrelated(shape: tuple[int, ...]) -> None:
    """n ≥ 100,000 values: mean, variance, 4th moment and neighbours' correlation within 5 standard errors."""
    values = whole(shape, fill=Fill(std=1.0)).flatten()
    error = 5 * values.numel() ** -0.5
    assert abs(values.mean()) < error
    assert abs(values.pow(2).mean() - 1) < 2**0.5 * error
    assert abs(values.pow(4).mean() - 3) < 96**0.5 * error
    for lag in (1, shape[-1], 128, 128 * 128):
        if lag < values.numel() / 2:
            assert abs((values[:-lag] * values[lag:]).mean()) < 1.5 * error
    assert values.unique().numel() == values.numel()


def test_names_and_seeds_give_other_values() -> None:
    first = whole((200, 30))
    for other in (whole((200, 30), name="v"), whole((200, 30), seed=1)):
        assert not (first == other).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_the_rounded_wide_one(dtype: torch.dtype) -> None:
    assert torch.equal(whole((150, 140), dtype=dtype), whole((150, 140)).to(dtype))


def test_constants() -> None:
    assert torch.equal(whole((3, 2), fill=ONES), torch.ones(3, 2, dtype=torch.float64))
    assert torch.equal(whole((3, 2), fill=ZEROS), torch.zeros(3, 2, dtype=torch.float64))


def test_torchs_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first = whole((10, 10))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, whole((10, 10)))
    assert torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(before)


def test_only_touched_blocks_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    block = initialise._block
    monkeypatch.setattr(initialise, "_block", lambda *key: made.append(key[2]) or block(*key))
    initialise_(torch.empty(100, 10), "w", (1000, 1000), (200, 120), NORMAL, 0)
    assert sorted(made) == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_sees_planted_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that starts anew at each shard: what slicing torch's own generator would give."""
    monkeypatch.setattr(initialise, "_edges", lambda dimensions: (100,) + (1000,) * (dimensions - 1))
    block = initialise._block
    monkeypatch.setattr(initialise, "_block", lambda seed, name, index: block(seed, name, (0,)))
    piece = initialise_(torch.empty(100, 30, dtype=torch.float64), "w", (200, 30), (100, 0), NORMAL, 0)
    monkeypatch.undo()
    assert not torch.equal(piece, whole((200, 30))[100:])
