"""Codecs that keep a share: against numpy, and against the bounds of their papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from shoal.sync.codec import Codec, Dct, Draws, Float32, RandomK, TopK, codec_of
from shoal.sync.codec import cosine as cosine_module
from shoal.sync.codec import sparse as sparse_module
from tests.sync.codec_cases import one_thread, rows, squares, through

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
ROUNDING = 1e-5
NORMAL = torch.randn(2, 8192, generator=torch.Generator().manual_seed(0))


def kept(values: np.ndarray, chunk: int, many: int) -> np.ndarray:
    """(chunks, many): where in its chunk the largest by magnitude lie, of equal ones the first."""
    return np.argsort(-np.abs(values.reshape(-1, chunk)), axis=1, kind="stable")[:, :many]


@pytest.mark.parametrize(
    ("text", "chunk", "many", "place"),
    [("topk:0.05", 256, 13, "u1"), ("topk:0.5", 256, 128, "u1"), ("topk:0.0008", 4096, 3, "<u2")],
)
@settings(max_examples=25)
@given(values=rows(8192))
def test_top_k_is_numpys(text, chunk, many, place, values):
    """Ties as well: rows of a few levels have many."""
    for row, payload in zip(values.numpy(), codec_of(text).encode(values), strict=True):
        places = kept(row, chunk, many)
        numbers = np.take_along_axis(row.reshape(-1, chunk), places, 1)
        assert payload.numpy().tobytes() == places.astype(place).tobytes() + numbers.astype("<f4").tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@settings(max_examples=25)
@given(values=rows(512))
def test_top_k_comes_back_where_it_was(dtype, values):
    values = values.to(dtype)
    back = through(codec_of("topk:0.05"), values)
    places = torch.from_numpy(kept(values.float().numpy(), 256, 13))
    chunks, expected = values.view(-1, 256), torch.zeros(4, 256, dtype=dtype)
    expected.scatter_(1, places, chunks.gather(1, places).float().to(dtype))
    assert torch.equal(back.view(-1, 256), expected)


@pytest.mark.parametrize("text", ["topk:0.05", "topk:0.3", "dct:0.05", "dct:0.3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=25)
@given(values=rows(512))
def test_what_is_lost_is_bounded_as_in_the_papers(text, dtype, values):
    """‖x − C(x)‖² ≤ (1 − k/n) ‖x‖² by chunk."""
    values = values.to(dtype)
    codec = codec_of(text)
    lost, whole = squares(values - through(codec, values), 256), squares(values, 256)
    top = codec.top if isinstance(codec, Dct) else codec
    assert (lost <= (1 - top.kept / 256) * whole + ROUNDING * whole).all()


# δ: of a row's sum of squares at most 1 − δ is lost. Of integers, see test_codec_blocks.
DELTA = {"bf16": 1 - 2.0**-16, "fp16": 1 - 2.0**-22, "int8": 0.9990, "int4": 0.755, "int2": 1 / 64, "sign": 1 / 64}
# Of 256 numbers 63, 39 and 13: blocks that are not full, of which 1 in 63, 25 in 39 and 12 in 13 fit once more.
PARTS = [f"{how}:{share}+{what}" for how in ("topk", "dct") for share in (0.246, 0.152, 0.05) for what in DELTA]


@pytest.mark.parametrize("text", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=15)
@given(values=rows(256))
def test_what_is_kept_and_rounded_is_bounded_as_well(text, dtype, values):
    """‖x − C(x)‖² ≤ ‖x‖² − δ ‖y‖² ≤ (1 − δ k/n) ‖x‖², y: what is kept of a row."""
    lost, most = lost_and_bound(text, values.to(dtype))
    assert (lost <= most).all()


@pytest.mark.parametrize("text", ["topk:0.152+sign", "topk:0.05+int2", "topk:0.3+int4", "topk:0.0008+int2"])
@settings(max_examples=15)
@given(values=rows(8192))
def test_blocks_of_what_is_kept_lie_across_chunks(text, values):
    lost, most = lost_and_bound(text, values)
    assert (lost <= most).all()


def lost_and_bound(text: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row. The bound: the lesser of what δ says and, of signs, (1 − φ) of each block's own numbers."""
    codec, what = codec_of(text), text.partition("+")[2]
    top = codec.top if isinstance(codec, Dct) else codec
    lost, whole = (squares(some, values.shape[1]) for some in (values - through(codec, values), values))
    slack = (2.0**-16 + ROUNDING) * whole
    numbers = np.stack([cosines(v.numpy()).ravel() for v in values]) if isinstance(codec, Dct) else values.numpy()
    chunks = numbers.reshape(-1, top.granule)
    found = np.take_along_axis(chunks, kept(chunks.astype(np.float32), top.granule, top.kept), 1)
    kept_RK = torch.from_numpy(found.reshape(len(values), -1)).double()
    assert (kept_RK.square().sum(1) >= top.kept / top.granule * whole - slack).all()
    remaining = DELTA[what] * kept_RK.square().sum(1)
    if what in ("sign", "int2"):
        means = [block.abs().sum(1).square() / block.shape[1] for block in kept_RK.split(64, 1)]
        remaining = torch.stack([remaining, sum(means, torch.zeros(len(values)))]).amax(0)
    return lost, whole - remaining + slack


@pytest.mark.parametrize("what", DELTA)
@settings(max_examples=15)
@given(values=rows(2560))
def test_random_k_rounded_loses_no_more_than_what_is_drawn_and_rounded(what, values):
    """‖x − C(x)‖² ≤ ‖x‖² − δ ‖y‖² for what is drawn, y, of which the mean of ‖y‖² is ‖x‖² / S (below)."""
    drawn = through(codec_of("randomk:0.05", Draws(seed=7)), values)
    back = through(codec_of(f"randomk:0.05+{what}", Draws(seed=7)), values)
    assert not back[drawn == 0].any() or what in ("sign", "int2")
    lost, whole, own = (squares(some, 2560) for some in (values - back, values, drawn))
    assert (lost <= whole - DELTA[what] * own + (2.0**-16 + ROUNDING) * own + 1e-9 * whole).all()


@pytest.mark.parametrize("text", ["topk:0.05", "topk:0.002", "topk:0.05+bf16", "topk:0.05+fp16"])
@settings(max_examples=25)
@given(values=rows(8192))
def test_what_was_decoded_is_encoded_as_it_is(text, values):
    once = through(codec_of(text), values)
    assert torch.equal(through(codec_of(text), once), once)


def test_of_what_is_kept_two_bits_lose_little():
    """Of one order within a chunk: a hundredth of what is kept is lost, by one bit a fortieth."""
    alone = through(codec_of("topk:0.05"), NORMAL)
    for text, most in (("topk:0.05+int2", 0.01), ("topk:0.05+sign", 0.025)):
        back = through(codec_of(text), NORMAL)
        assert torch.equal(back != 0, alone != 0)
        assert (back - alone).square().sum() < most * alone.square().sum()


def test_top_k_and_two_bits_are_less_than_a_fiftieth_of_float32():
    codec = codec_of("topk:0.05+int2")
    assert codec.row_bytes(1 << 20) <= 0.02 * 4 * (1 << 20)
    assert codec_of("int8").row_bytes(1 << 20) <= 0.27 * 4 * (1 << 20)


@pytest.mark.parametrize("share", [0.5, 0.3, 0.05, 1 / 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_random_k_keeps_one_number_of_every_stretch(share, dtype):
    codec = RandomK(share, Float32(), Draws())
    values = torch.arange(1, 100 * codec.stretch + 1).remainder(251).add(1)[None].expand(2, -1).to(dtype)
    back = through(codec, values)
    assert codec.stretch == round(1 / share)
    assert (back.view(2, 100, codec.stretch) != 0).sum(2).eq(1).all()
    assert torch.equal(back[back != 0], values[back != 0])
    assert not torch.equal(back[0] != 0, back[1] != 0)


def test_random_k_keeps_each_number_as_often_as_any_other():
    """χ² over 20 places, 40,000 draws: mean 19, standard deviation 6.2. Over pairs of neighbours, 399 and 28."""
    assert abs(chi_squares(20)[0] - 19) < 5 * 6.2
    assert abs(chi_squares(20)[1] - 399) < 5 * 28.2


def chi_squares(stretch: int) -> tuple[float, float]:
    codec = RandomK(1 / stretch, Float32(), Draws(seed=5))
    values = torch.ones(20, 100 * stretch)
    drawn = torch.stack([through(codec, values) for _ in range(20)]).view(-1, 100, stretch).argmax(2)
    of_one = drawn.flatten().bincount(minlength=stretch)
    of_two = (drawn[:, :-1] * stretch + drawn[:, 1:]).flatten().bincount(minlength=stretch**2)
    one, two = ((many - many.sum() / len(many)).square().sum() / many.sum() * len(many) for many in (of_one, of_two))
    return float(one), float(two)


def test_random_k_loses_on_average_what_the_paper_says():
    """E‖x − C(x)‖² = (1 − 1/S) ‖x‖² (Stich et al. 2018), within five standard errors, for numbers of many orders."""
    values = (NORMAL[:1, :2000].double() * 3).exp()
    codec = codec_of("randomk:0.1", Draws(seed=1))
    found = torch.stack([squares(values - through(codec, values), 2000) for _ in range(500)])
    assert abs(found.mean() - 0.9 * values.square().sum()) < 5 * found.std() / 500**0.5


@pytest.mark.parametrize("text", ["randomk:0.1:unbiased", "randomk:0.1:unbiased+int8:unbiased"])
def test_unbiased_random_k_is_right_on_average(text):
    """z² over numbers has mean 1, the variance of each draw being (S − 1) x²."""
    assert abs(z_squares(text) - 1) < 0.15


def z_squares(text: str) -> float:
    values, codec = NORMAL[:1, :6400], codec_of(text, Draws(seed=2))
    mean = torch.stack([through(codec, values) for _ in range(400)]).mean(0)
    large = values.abs() > 0.5
    return float(((mean - values)[large] / (values[large] * (9 / 400) ** 0.5)).square().mean())


def cosines(values: np.ndarray) -> np.ndarray:
    """Orthonormal DCT-II of every 64 numbers, by a Fourier transform of the chunk and its mirror image."""
    chunks = values.astype(np.float64).reshape(-1, 64)
    half = np.exp(-1j * np.pi * np.arange(64) / 128)
    found = (half * np.fft.fft(np.concatenate([chunks, chunks[:, ::-1]], 1))[:, :64]).real / 2
    return found * np.where(np.arange(64) > 0, (2 / 64) ** 0.5, 64**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosine_transform_is_numpys_and_its_largest_come_back(dtype):
    values = NORMAL.to(dtype)
    back = through(codec_of("dct:0.05"), values)
    before, after = (cosines(v.numpy()).reshape(-1, 256) for v in (values, back))
    places = kept(before, 256, 13)
    expected = np.zeros_like(before)
    np.put_along_axis(expected, places, np.take_along_axis(before, places, 1), 1)
    assert np.abs(after - expected).max() < 1e-5


def test_cosine_transform_keeps_smooth_rows_that_a_top_k_does_not():
    smooth = torch.sin(torch.arange(512) / 40)[None]
    for text, most in (("dct:0.05", 0.01), ("topk:0.05", 1.0)):
        lost = float((smooth - through(codec_of(text), smooth)).square().sum() / smooth.square().sum())
        assert most / 2 < lost < most or lost < most == 0.01


def test_few_coefficients_of_huge_numbers_stay_finite():
    """Signs of a sum of cosines that meet at one place: there they come back more than twice as large."""
    basis = torch.from_numpy(cosines(np.eye(64)).T.copy()).float()
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(30, 256)
    for row in rows:
        some, place = torch.randperm(64, generator=generator)[:13], int(torch.randint(64, (1,), generator=generator))
        row[:64] = (basis[some, place][:, None] * basis[some]).sum(0).sign()
    assert through(codec_of("dct:0.05"), rows).abs().max() > 2.2
    back = through(codec_of("dct:0.05"), rows * 2.0**127)
    assert back.isfinite().all()
    assert back.abs().max() == torch.finfo(torch.float32).max


def seen(test: Any, *arguments: Any, **more: Any) -> None:
    """That the test fails, if it takes rows on numbers in general."""
    inner = getattr(test, "hypothesis", None)
    with pytest.raises(AssertionError):
        inner.inner_test(*arguments, values=NORMAL[:, :512].clone(), **more) if inner else test(*arguments)


def test_sees_ties_in_another_order(monkeypatch):
    honest = sparse_module.largest
    backwards = lambda values, many: values.shape[1] - 1 - honest(values.flip(1), many)  # noqa: E731
    monkeypatch.setattr(sparse_module, "largest", backwards)
    test_top_k_is_numpys.hypothesis.inner_test("topk:0.05", 256, 13, "u1", values=NORMAL)
    levels = NORMAL.round()
    with pytest.raises(AssertionError):
        test_top_k_is_numpys.hypothesis.inner_test("topk:0.05", 256, 13, "u1", values=levels)


def test_sees_the_largest_with_their_signs(monkeypatch):
    monkeypatch.setattr(sparse_module, "largest", lambda values, many: values.topk(many).indices)
    seen(test_top_k_comes_back_where_it_was, torch.float32)


def test_sees_the_smallest(monkeypatch):
    monkeypatch.setattr(sparse_module, "largest", lambda values, many: values.abs().topk(many, largest=False).indices)
    seen(test_what_is_lost_is_bounded_as_in_the_papers, "topk:0.05", torch.float32)
    seen(test_what_is_lost_is_bounded_as_in_the_papers, "dct:0.3", torch.float64)


def test_sees_a_block_filled_up_with_zeros(monkeypatch):
    def zeros(codec: Codec, kept: torch.Tensor) -> torch.Tensor:
        return codec.encode(torch.nn.functional.pad(kept, (0, -kept.shape[1] % codec.granule)))

    monkeypatch.setattr(sparse_module, "_write", zeros)
    seen(test_of_what_is_kept_two_bits_lose_little)


def test_sees_a_block_filled_up_with_some_numbers_once_more(monkeypatch):
    """Of 63 numbers one comes twice: a mean that is almost double, where it is the only one that is not 0."""

    def again(codec: Codec, kept: torch.Tensor) -> torch.Tensor:
        over = kept.shape[1] % codec.granule
        return codec.encode(torch.cat([kept, kept[:, torch.arange(-over % codec.granule) % over - over]], 1))

    monkeypatch.setattr(sparse_module, "_write", again)
    one = torch.zeros(2, 256)
    one[:, 5] = 1.0
    with pytest.raises(AssertionError):
        test_what_is_kept_and_rounded_is_bounded_as_well.hypothesis.inner_test("topk:0.246+sign", torch.float32, one)


def test_sees_one_too_few(monkeypatch):
    honest = TopK.__init__

    def fewer(self: TopK, *arguments: Any) -> None:
        honest(self, *arguments)
        self.kept -= 1

    monkeypatch.setattr(TopK, "__init__", fewer)
    seen(test_top_k_comes_back_where_it_was, torch.float32)


@pytest.mark.parametrize(
    "bug",
    [
        lambda self, key, numbers: torch.arange(0, numbers, self.stretch).expand(len(key), -1),
        lambda self, key, numbers: torch.arange(0, numbers, self.stretch) + (key[:, None] % self.stretch),
        lambda self, key, numbers: (
            torch.arange(0, numbers, self.stretch)
            + sparse_module.hashes(key, 0, numbers // self.stretch).long() % (self.stretch - 1)
        ),
    ],
    ids=["always the first", "the same in every stretch", "never the last"],
)
def test_sees_draws_that_are_not_uniform(bug, monkeypatch):
    monkeypatch.setattr(RandomK, "_places", bug)
    seen(test_random_k_keeps_each_number_as_often_as_any_other)


def test_sees_draws_that_are_always_alike(monkeypatch):
    monkeypatch.setattr(Draws, "keys", lambda self, rows, device: torch.arange(rows))
    seen(test_random_k_loses_on_average_what_the_paper_says)
    seen(test_unbiased_random_k_is_right_on_average, "randomk:0.1:unbiased")


@pytest.mark.parametrize("bug", ["not orthonormal", "another frequency"])
def test_sees_another_transform(bug, monkeypatch):
    def basis(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        found = torch.from_numpy(cosines(np.eye(64)).T.copy())
        found[0 if bug == "not orthonormal" else 5] *= 1.1
        return found.to(dtype)

    monkeypatch.setattr(cosine_module, "_basis", basis)
    seen(test_cosine_transform_is_numpys_and_its_largest_come_back, torch.float64)
