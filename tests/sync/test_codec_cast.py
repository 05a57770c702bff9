"""The casts against arithmetic on bits, and against their bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.sync.codec import codec_of

# Nothing that the nearest of fewer bits would make infinite.
FLOATS = st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False, allow_subnormal=False)
ROWS = st.integers(1, 3).flatmap(
    lambda rows: st.integers(1, 8).flatmap(
        lambda pairs: st.lists(st.lists(FLOATS, min_size=2 * pairs, max_size=2 * pairs), min_size=rows, max_size=rows)
    )
)


def through(name: str, values: torch.Tensor) -> torch.Tensor:
    codec = codec_of(name)
    return codec.decode(codec.encode(values), values.dtype)


def rounded_to_bf16(values: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even, by the bits of float32."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32)


@settings(deadline=None)
@given(ROWS)
def test_bf16_rounds_to_the_nearest(rows):
    values = torch.tensor(rows, dtype=torch.float32)
    expected = rounded_to_bf16(values.numpy())
    assert np.array_equal(through("bf16", values).numpy(), expected)


@settings(deadline=None)
@given(ROWS, st.sampled_from([torch.float32, torch.float64]))
def test_fp16_is_off_by_no_more_than_it_says_whatever_the_size(rows, dtype):
    values = torch.tensor(rows, dtype=dtype)
    largest = values.abs().amax(1, keepdim=True)
    off = (through("fp16", values).double() - values.double()).abs()
    bound = torch.maximum(values.abs().double() * 2.0**-11, largest.double() * 2.0**-39)
    # And never by less than float32's smallest number.
    assert (off <= bound.clamp_min(2.0**-149)).all()


def test_fp16_of_a_row_is_numpys_after_a_power_of_two():
    values = torch.randn(3, 500, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1e-8], [1.0], [1e30]])
    for row, back in zip(values.numpy(), through("fp16", values).numpy(), strict=True):
        scale = np.float32(2.0) ** (np.frexp(np.abs(row).max())[1] - 15)
        assert np.array_equal(back, (row / scale).astype(np.float16).astype(np.float32) * scale)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_what_is_not_finite_leaves_other_rows_alone(name):
    values = torch.ones(2, 4)
    values[1, 2] = torch.nan
    back = through(name, values)
    assert torch.equal(back[0], values[0])
    assert not back[1].isfinite().all()
