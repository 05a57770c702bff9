"""Rows to try codecs on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from shoal.sync.codec.protocol import SizedCodec


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small products by several threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def length(codec: SizedCodec, least: int = 600) -> int:
    return -(-least // codec.granule) * codec.granule


def normal(codec: SizedCodec, rows: int = 2, seed: int = 0, least: int = 600) -> torch.Tensor:
    return torch.randn(rows, length(codec, least), generator=torch.Generator().manual_seed(seed))


def through(codec: SizedCodec, values: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(values), values.dtype)


@st.composite
def rows(draw: st.DrawFn, numbers: int) -> torch.Tensor:
    """(2, numbers), float32: numbers of one order, of many orders, mostly zeros, a few levels, all alike."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = random.standard_normal((2, numbers))
    match draw(st.sampled_from(["normal", "orders", "zeros", "levels", "alike", "steps"])):
        case "orders":
            values = values * np.exp(random.uniform(-12, 12, values.shape))
        case "zeros":
            values[random.random(values.shape) < 0.95] = 0
        case "levels":
            values = values.round()
        case "alike":
            values[:] = values[0, 0]
        case "steps":
            values = values * 2.0 ** (np.arange(numbers) // 50 % 40 - 20)
    for place in draw(st.lists(st.integers(0, numbers - 1), max_size=3)):
        # Nothing that float32 would have few bits of.
        values[draw(st.integers(0, 1)), place] = draw(st.integers(-(10**8), 10**8)) / 10**4
    return torch.from_numpy(values * 2.0 ** draw(st.integers(-60, 60))).float()


def squares(values: torch.Tensor, size: int) -> torch.Tensor:
    """Sum of squares of every `size` numbers of a row, in float64."""
    return values.double().view(-1, size).square().sum(1)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the nearest of bfloat16, ties to even, by the bits; as uint16."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
