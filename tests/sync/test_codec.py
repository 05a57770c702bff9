"""What every codec promises, whatever it does to the numbers in between."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import JobError
from shoal.job.codec import KEEPING, ROUNDING
from shoal.sync.codec import CODECS, Draws, codec_of
from shoal.sync.codec.protocol import numbers_in
from shoal.sync.codec.sparse import RandomK
from tests.sync.codec_cases import length, normal, one_thread, through

UNBIASED = ("int8:unbiased", "int4:unbiased", "randomk:0.1:unbiased")
ALL = (
    *ROUNDING, *UNBIASED, "topk:0.05", "topk:0.002", "topk:0.05+int2", "topk:0.05+sign", "topk:0.002+fp16",
    "randomk:0.1", "randomk:0.1+int4", "randomk:0.05:unbiased+int8:unbiased",
    "dct:0.05", "dct:0.05+int2", "dct:0.002+bf16", "dct:0.0003",
)  # fmt: skip
"""Every kind of codec, alone and with another."""

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
codecs = pytest.mark.parametrize("text", ALL)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def test_every_codec_is_tried_and_can_be_asked_for():
    assert set(CODECS) == {*KEEPING, *ROUNDING} == {text.partition("+")[0].partition(":")[0] for text in ALL}
    with pytest.raises(JobError):
        codec_of("int7")


@codecs
@dtypes
def test_bytes_depend_on_the_length_alone_and_tell_it(text, dtype):
    codec = codec_of(text)
    for least in (1, 600, 5000):
        values = normal(codec, least=least).to(dtype)
        for rows in (values, torch.zeros_like(values), values[:1].expand(3, -1)):
            payload = codec.encode(rows)
            assert payload.dtype == torch.uint8
            assert payload.shape == (len(rows), codec.row_bytes(rows.shape[1]))
            back = codec.decode(payload, dtype)
            assert back.dtype == dtype
            assert back.shape == rows.shape


@codecs
@settings(max_examples=30)
@given(granules=st.integers(0, 10**6))
def test_bytes_tell_the_length_of_any_row(text, granules):
    codec = codec_of(text)
    numbers = granules * codec.granule
    assert numbers_in(codec, codec.row_bytes(numbers)) == numbers
    with pytest.raises(AssertionError):
        numbers_in(codec, codec.row_bytes(numbers + codec.granule) - 1)


@pytest.mark.parametrize("text", [t for t in ALL if codec_of(t).granule > 2])
def test_rows_that_would_be_cut_across_each_other_are_refused(text):
    codec = codec_of(text)
    with pytest.raises(AssertionError, match="granule"):
        codec.encode(torch.zeros(codec.granule, length(codec) + 1))


@codecs
@dtypes
def test_zeros_stay_zeros(text, dtype):
    codec = codec_of(text)
    assert through(codec, torch.zeros(2, length(codec), dtype=dtype)).eq(0).all()


@codecs
@dtypes
def test_what_is_not_finite_does_not_become_finite_and_leaves_other_rows_alone(text, dtype):
    values = normal(codec_of(text), rows=3).to(dtype)
    back = through(codec_of(text), values)
    assert back.isfinite().all()
    for value, place in product((torch.nan, torch.inf, -torch.inf), (0, values.shape[1] // 2 + 3, -1)):
        broken = values.clone()
        broken[1, place] = value
        seen = through(codec_of(text), broken)
        assert not seen[1].isfinite().all()
        assert torch.equal(seen[::2], back[::2])


@codecs
@dtypes
@pytest.mark.parametrize("size", [2.0**127, 1e38, 1e-38, 1e-44])
def test_no_size_makes_a_number_infinite(text, dtype, size):
    codec = codec_of(text)
    # What comes back so many times as large must have room for it.
    grown = codec.stretch if isinstance(codec, RandomK) and codec.unbiased else 1
    values = (normal(codec, rows=3) * size).clamp(-size, size).div(grown).to(dtype)
    back = through(codec, values)
    assert back.isfinite().all()
    assert back.abs().max() <= 4.5 * size + 2.0**-126 * grown


@codecs
def test_the_same_call_writes_the_same_bytes(text):
    """And a later one too, where nothing is drawn; else only when it is told to go on from there."""
    values = normal(codec_of(text))
    draws = [Draws(seed=1), Draws(seed=1), Draws(seed=2), Draws(seed=1, rank=1)]
    first, same, *others = (codec_of(text, draw).encode(values) for draw in draws)
    assert torch.equal(first, same)
    again = Draws(seed=1)
    second = codec_of(text, draws[0]).encode(values)
    again.calls = draws[1].calls
    assert torch.equal(codec_of(text, again).encode(values), second)
    drawn = "unbiased" in text or "randomk" in text
    assert all(torch.equal(first, other) != drawn for other in (second, *others))
    assert (draws[0].calls > 0) == drawn


@codecs
def test_a_row_is_read_without_the_others(text):
    codec = codec_of(text)
    payload = codec.encode(normal(codec, rows=3))
    back = codec.decode(payload, torch.float32)
    alone = codec.decode(payload[1:2], torch.float32)
    if text.startswith("dct"):  # a matrix product of fewer rows may round otherwise
        assert torch.allclose(alone, back[1:2], rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(alone, back[1:2])


@codecs
def test_what_is_worked_on_together_makes_no_difference(text, monkeypatch):
    values = normal(codec_of(text))
    at_once = codec_of(text).encode(values)
    monkeypatch.setattr("shoal.sync.codec.blocks._TOGETHER", 3)
    monkeypatch.setattr("shoal.sync.codec.sparse._TOGETHER", 4096)
    assert torch.equal(codec_of(text).encode(values), at_once)


@pytest.mark.parametrize("text", [t for t in ALL if "randomk" not in t and "unbiased" not in t])
def test_rows_are_written_as_each_would_be_alone(text):
    codec = codec_of(text)
    values = normal(codec, rows=3).double()  # in which the rounding of a matrix product changes no choice
    written = torch.cat([codec.encode(row[None]) for row in values])
    if text.startswith("dct"):
        apart = codec.decode(written, torch.float64) - codec.decode(codec.encode(values), torch.float64)
        assert apart.abs().max() < 1e-6
    else:
        assert torch.equal(codec.encode(values), written)


@codecs
@dtypes
def test_no_number_is_waited_for_and_all_tensors_are_made_where_the_row_is(text, dtype):
    """As a GPU needs it. On meta there are no numbers: whatever reads one, or adds a tensor of the CPU's, raises."""
    codec = codec_of(text)
    values = torch.empty(2, length(codec, 5000), dtype=dtype, device="meta")
    payload = codec.encode(values)
    back = codec.decode(payload, dtype)
    assert payload.is_meta
    assert payload.shape == (2, codec.row_bytes(values.shape[1]))
    assert back.is_meta
    assert back.shape == values.shape


@pytest.mark.parametrize("bug", [lambda values: values.cpu(), lambda values: values * values.max().item()])
def test_sees_a_codec_that_waits_for_a_number(bug, monkeypatch):
    monkeypatch.setattr("shoal.sync.codec.blocks.widened", bug)
    with pytest.raises((NotImplementedError, RuntimeError)):
        test_no_number_is_waited_for_and_all_tensors_are_made_where_the_row_is("int8", torch.float32)
