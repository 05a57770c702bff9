"""Codecs of blocks against numpy, bit by bit, and against the bounds of their papers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from shoal.sync.codec import Draws, codec_of
from shoal.sync.codec import blocks as blocks_module
from shoal.sync.codec import signs as signs_module
from tests.sync.codec_cases import bfloat16, from_bfloat16, one_thread, rows, squares, through

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
LEVELS = {"int8": 127, "int4": 7}
# Of a sum of squares, what float32 may lose in each of its numbers.
ROUNDING = 1e-5


def integers(values: np.ndarray, name: str) -> bytes:
    """A row as the codec is to write it."""
    written = b""
    for block in values.reshape(-1, 64):
        scale = bfloat16(np.maximum(np.abs(block).max() / np.float32(LEVELS[name]), np.float32(2.0**-126)))
        codes = np.rint(block / from_bfloat16(scale)).astype(int).tolist()
        written += scale.tobytes()
        if name == "int8":
            written += bytes(code + 128 for code in codes)
        else:
            written += bytes(low + 8 + 16 * (high + 8) for low, high in zip(codes[::2], codes[1::2], strict=True))
    return written


@pytest.mark.parametrize("name", LEVELS)
@settings(max_examples=25)
@given(rows(192))
def test_integers_are_numpys(name, values):
    written = codec_of(name).encode(values)
    for row, payload in zip(values.numpy(), written, strict=True):
        assert payload.numpy().tobytes() == integers(row, name)


@given(rows(192))
@settings(max_examples=25)
def test_signs_are_numpys(values):
    for row, payload in zip(values.numpy(), codec_of("sign").encode(values).view(2, 3, 10), strict=True):
        for block, bits in zip(row.reshape(3, 64), payload.numpy(), strict=True):
            assert bits[2:].tobytes() == np.packbits(block < 0, bitorder="little").tobytes()
            mean = np.abs(block.astype(np.float64)).mean()
            scale = from_bfloat16(bits[:2].view(np.uint16))[0]
            assert abs(scale - mean) <= 2.0**-8 * (1 + ROUNDING) * mean


@given(rows(192))
@settings(max_examples=25)
def test_two_bits_are_a_sign_and_one_of_two_means(values):
    for row, payload in zip(values.numpy(), codec_of("int2").encode(values).view(2, 3, 20), strict=True):
        for block, bits in zip(row.reshape(3, 64), payload.numpy(), strict=True):
            size = np.abs(block.astype(np.float64))
            codes = [bits[4 + place // 4] >> 2 * (place % 4) & 3 for place in range(64)]
            above = np.array(codes) > 1
            assert np.array_equal(np.array(codes) % 2 == 1, block < 0)
            undecided = np.abs(size - size.mean()) <= ROUNDING * size.mean()
            assert np.array_equal(above[~undecided], (size > size.mean())[~undecided])
            for scale, some in zip(from_bfloat16(bits[:4].view(np.uint16)), (~above, above), strict=True):
                mean = size[some].mean() if some.any() else 0.0
                assert abs(scale - mean) <= 2.0**-8 * (1 + ROUNDING) * mean


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=25)
@given(values=rows(192))
def test_integers_are_off_by_half_a_step_at_most_and_by_no_more_than_the_number(name, dtype, values):
    values = values.to(dtype)
    off = (through(codec_of(name), values).double() - values.double()).abs().view(-1, 64)
    size = values.double().abs().view(-1, 64)
    step = size.amax(1, keepdim=True) / LEVELS[name] * (1 + 2.0**-8)
    assert (off <= step / 2 * (1 + 1e-4)).all()
    assert (off <= size * (1 + ROUNDING)).all()


def most_lost(name: str) -> float:
    """Of a block's sum of squares: 63 numbers off by s/2 that are s/2, the largest off by 2⁻⁸ of itself; s = m / L,
    rounded up by 2⁻⁸."""
    smaller = 63 * (1 + 2.0**-8) ** 2 / (4 * LEVELS[name] ** 2)
    return (smaller + 2.0**-16) / (1 + smaller)


@pytest.mark.parametrize("name", LEVELS)
@settings(max_examples=50)
@given(rows(192))
def test_integers_are_a_contraction(name, values):
    lost, whole = squares(values - through(codec_of(name), values), 64), squares(values, 64)
    assert (lost <= (most_lost(name) + ROUNDING) * whole).all()


@pytest.mark.parametrize("name", LEVELS)
def test_no_contraction_is_stronger(name):
    """The worst block but for the rounding of its scale, which is exact here."""
    values = torch.full((1, 64), -0.5)
    values[0, 17] = LEVELS[name]
    lost = squares(values - through(codec_of(name), values), 64) / squares(values, 64)
    assert lost.item() == pytest.approx(63 / (63 + 4 * LEVELS[name] ** 2), rel=1e-6)
    assert 0.97 * most_lost(name) < lost.item() < most_lost(name)


def test_the_page_gives_the_same_constants():
    page = (Path(__file__).parents[2] / "docs" / "codecs.md").read_text()
    for name in LEVELS:
        (row,) = re.findall(rf"^\| `{name}` .*≤ ([\d.]+) ‖x‖² is lost", page, re.MULTILINE)
        assert float(row) - 10.0 ** -len(row.partition(".")[2]) < most_lost(name) <= float(row)


@given(rows(192))
@settings(max_examples=25)
def test_signs_lose_what_the_paper_says(values):
    """(1 − φ) of the sum of squares, φ = ‖x‖₁² / (d ‖x‖₂²); Karimireddy et al. 2019."""
    lost, whole = squares(values - through(codec_of("sign"), values), 64), squares(values, 64)
    dense = values.double().view(-1, 64).abs().sum(1) ** 2 / 64
    expected = whole - dense
    assert (lost >= expected - ROUNDING * whole).all()
    assert (lost <= expected + 2.0**-16 * dense + ROUNDING * whole).all()


@given(rows(192))
@settings(max_examples=25)
def test_two_bits_lose_no_more_than_one(values):
    one, two = (squares(values - through(codec_of(name), values), 64) for name in ("sign", "int2"))
    assert (two <= one + (2.0**-16 + ROUNDING) * squares(values, 64)).all()
    assert (two <= squares(values, 64) * (1 + ROUNDING)).all()


def test_two_bits_lose_a_third_of_what_one_loses_of_normal_numbers():
    """1 − 2/π for one bit. For two, split at the mean: measured with numpy, 0.1200."""
    values = torch.randn(1, 64_000, generator=torch.Generator().manual_seed(0))
    one, two = (float((values - through(codec_of(name), values)).square().mean()) for name in ("sign", "int2"))
    size = np.abs(np.random.default_rng(0).standard_normal((1000, 64)))
    above = size > size.mean(1, keepdims=True)
    means = [(size * some).sum(1, keepdims=True) / some.sum(1, keepdims=True) for some in (~above, above)]
    assert one == pytest.approx(1 - 2 / np.pi, rel=0.03)
    assert two == pytest.approx(np.square(size - np.where(above, means[1], means[0])).mean(), rel=0.03)


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "sign", "bf16", "fp16"])
@settings(max_examples=25)
@given(values=rows(192))
def test_what_was_decoded_is_encoded_as_it_is(name, values):
    once = through(codec_of(name), values)
    assert torch.equal(through(codec_of(name), once), once)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unbiased_is_right_on_average(name, dtype):
    """z² over numbers has mean 1: each number's error, averaged over calls, in standard errors of a draw of its own."""
    values = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    assert abs(float(z_squares(name, values).mean()) - 1) < 0.2


def z_squares(name: str, values: torch.Tensor, calls: int = 300) -> torch.Tensor:
    codec = codec_of(f"{name}:unbiased", Draws(seed=3))
    decoded = torch.stack([codec.decode(codec.encode(values), torch.float64)[0] for _ in range(calls)])
    blocks, found = values.double().view(-1, 64), decoded.view(calls, -1, 64)
    # Steps are s = max|x| / L rounded up to bfloat16.
    exact = (blocks.abs().amax(1, keepdim=True) / LEVELS[name]).float().numpy()
    bits = bfloat16(exact).astype(np.int64)
    step = torch.from_numpy(from_bfloat16((bits + (from_bfloat16(bits.astype(np.uint16)) < exact)).astype(np.uint16)))
    share = blocks / step - (blocks / step).floor()
    assert ((found - blocks).abs() <= step * (1 + 1e-6)).all()
    drawn = (share > 0.02) & (share < 0.98)
    z = (found.mean(0) - blocks) / (step * (share * (1 - share) / calls).sqrt())
    return z[drawn].square()


def test_errors_of_ranks_calls_and_places_are_independent():
    values = torch.randn(1, 6400, generator=torch.Generator().manual_seed(0))
    first, second, other = (codec_of("int4:unbiased", Draws(0, rank)) for rank in (0, 0, 1))
    second.encode(values)
    errors = [through(codec, values) - values for codec in (first, second, other)]
    errors.append(errors[0].roll(64, 1))
    apart = torch.corrcoef(torch.cat(errors)) - torch.eye(4)
    assert apart.abs().max() < 5 / 80


def test_a_mean_of_huge_numbers_is_right():
    values = torch.full((1, 64), 2.0**127)
    values[0, ::2] *= -1
    for name in ("sign", "int2", "int8", "int4"):
        assert torch.allclose(through(codec_of(name), values), values, rtol=2.0**-8)


def seen(test: Any, **arguments: Any) -> None:
    """That numbers in general are enough for the test to fail."""
    values = torch.randn(2, 192, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError):
        test.hypothesis.inner_test(values=values, **arguments)


def test_sees_a_scale_rounded_down(monkeypatch):
    def down(scale: torch.Tensor, up: bool = False) -> torch.Tensor:
        return (scale.view(torch.int32) & -0x10000).view(torch.float32).to(torch.bfloat16)

    monkeypatch.setattr(blocks_module, "bf16", down)
    seen(test_integers_are_numpys, name="int8")
    bounded = test_integers_are_off_by_half_a_step_at_most_and_by_no_more_than_the_number
    seen(bounded, name="int8", dtype=torch.float32)


@pytest.mark.parametrize("size", [0.98, 1.05])
def test_sees_a_scale_that_is_not_the_mean(size, monkeypatch):
    monkeypatch.setattr(signs_module, "_shares", lambda values: values.abs() / 64 * size)
    seen(test_signs_are_numpys)
    seen(test_signs_lose_what_the_paper_says)


def test_sees_bits_in_another_order(monkeypatch):
    honest = signs_module.pack
    monkeypatch.setattr(signs_module, "pack", lambda codes, width: honest(codes.flip(1), width))
    seen(test_signs_are_numpys)
    seen(test_two_bits_are_a_sign_and_one_of_two_means)


def test_sees_two_magnitudes_that_changed_places(monkeypatch):
    honest = signs_module.Int2._write

    def write(self: Any, values: torch.Tensor, payload: torch.Tensor, drawn: None) -> None:
        honest(self, values, payload, drawn)
        payload[:, :2], payload[:, 2:4] = payload[:, 2:4].clone(), payload[:, :2].clone()

    monkeypatch.setattr(signs_module.Int2, "_write", write)
    seen(test_two_bits_are_a_sign_and_one_of_two_means)
    seen(test_two_bits_lose_no_more_than_one)


@pytest.mark.parametrize(
    "bug",
    [
        lambda key, first, blocks: torch.full((blocks, 64), 0.5),
        lambda key, first, blocks: torch.rand(blocks, 64) * 0.95,
        lambda key, first, blocks: torch.rand(blocks, 64, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["to the nearest", "never all of a step", "every call alike"],
)
def test_sees_draws_that_are_not_uniform(bug, monkeypatch):
    monkeypatch.setattr(blocks_module, "_uniform", bug)
    with pytest.raises(AssertionError):
        test_unbiased_is_right_on_average("int8", torch.float32)
