"""The chunked loss against F.cross_entropy in float64 (bound 1e-12), in every shape of tile, and its
memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.ops import loss
from shoal.ops.loss import chunked_cross_entropy
from tests.numbers import largest


def inputs(
    rows: int, length: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    hidden_BLD = torch.randn(rows, length, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels_BL = torch.randint(vocabulary, (rows, length), generator=generator)
    weight_BL = (torch.rand(rows, length, generator=generator) < 0.7).float()
    return hidden_BLD, weight_VD, labels_BL, weight_BL


def plain(hidden_BLD: Tensor, weight_VD: Tensor, labels_BL: Tensor, weight_BL: Tensor) -> Tensor:
    logits = (hidden_BLD @ weight_VD.T).flatten(0, 1)
    nll_BL = F.cross_entropy(logits.to(loss._wide(logits.dtype)), labels_BL.flatten(), reduction="none").view_as(
        weight_BL
    )
    return (nll_BL * weight_BL).sum()


def worst(ours: Tensor, theirs: Tensor, tensors: tuple[Tensor, ...]) -> float:
    """Largest difference of loss and of both gradients, relative to the largest value of each."""
    pairs = [(ours, theirs)]
    pairs += zip(torch.autograd.grad(3 * ours, tensors), torch.autograd.grad(3 * theirs, tensors), strict=True)
    return largest(((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item() for a, b in pairs)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 33),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_equals_plain_in_any_tiling(
    rows: int, length: int, vocabulary: int, width: int, tokens: int, words: int
) -> None:
    hidden_BLD, weight_VD, labels_BL, weight_BL = inputs(rows, length, vocabulary, width)
    by_tile = loss._ChunkedCrossEntropy.apply(
        hidden_BLD.flatten(0, 1), weight_VD, labels_BL.reshape(-1, 1), weight_BL.double().reshape(-1, 1),
        (tokens, words), torch.float64,
    )  # fmt: skip
    theirs = plain(hidden_BLD, weight_VD, labels_BL, weight_BL)
    assert worst(by_tile, theirs, (hidden_BLD, weight_VD)) < 1e-12
    by_chunk = chunked_cross_entropy(hidden_BLD, weight_VD, labels_BL, weight_BL, tokens)
    theirs = plain(hidden_BLD, weight_VD, labels_BL, weight_BL)
    assert worst(by_chunk, theirs, (hidden_BLD, weight_VD)) < 1e-12


@pytest.mark.parametrize("tile", [(4, 19), (100, 19), (4, 5), (100, 7)])
def test_gradcheck(tile: tuple[int, int]) -> None:
    hidden_BLD, weight_VD, labels_BL, weight_BL = inputs(1, 9, 19, 5)
    rest = labels_BL.reshape(-1, 1), weight_BL.double().reshape(-1, 1), tile, torch.float64
    assert torch.autograd.gradcheck(
        lambda h, w: loss._ChunkedCrossEntropy.apply(h[0], w, *rest), (hidden_BLD, weight_VD)
    )


def test_backward_twice_gives_the_same() -> None:
    tensors = inputs(2, 5, 11, 3)
    value = chunked_cross_entropy(*tensors, chunk=4)
    first = torch.autograd.grad(5 * value, tensors[:2], retain_graph=True)
    second = torch.autograd.grad(5 * value, tensors[:2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_labels_without_weight_may_be_anything() -> None:
    hidden_BLD, weight_VD, labels_BL, weight_BL = inputs(2, 6, 11, 3)
    strange_BL = torch.where(weight_BL == 0, torch.tensor([-100, 10**9])[:, None], labels_BL)
    theirs = plain(hidden_BLD, weight_VD, labels_BL, weight_BL)
    assert (
        worst(
            chunked_cross_entropy(hidden_BLD, weight_VD, strange_BL, weight_BL, 5),
            theirs,
            (hidden_BLD, weight_VD),
        )
        < 1e-12
    )


def test_no_valid_token() -> None:
    hidden_BLD, weight_VD, labels_BL, _ = inputs(2, 6, 11, 3)
    value = chunked_cross_entropy(hidden_BLD, weight_VD, labels_BL, torch.zeros(2, 6))
    assert value.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(value, (hidden_BLD, weight_VD)))


def test_without_gradients_it_makes_none() -> None:
    hidden_BLD, weight_VD, labels_BL, weight_BL = inputs(2, 6, 11, 3)
    with torch.no_grad():
        value = chunked_cross_entropy(hidden_BLD, weight_VD, labels_BL, weight_BL, 5)
    assert not value.requires_grad
    assert abs(value.item() - plain(hidden_BLD, weight_VD, labels_BL, weight_BL).item()) < 1e-12


@pytest.mark.parametrize("arrives", ["cast", "autocast"])
@pytest.mark.parametrize("words", [40, 7])
def test_bf16_is_no_further_from_the_truth_than_plain(
    arrives: str, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products in bf16, sums in float32: from float64, at most 1.2× as far as plain bf16 products and softmax
    in float32."""
    monkeypatch.setattr(loss, "_tile", lambda vocabulary, dtype: (16, words))
    exact = inputs(2, 32, 40, 16)
    given = inputs(2, 32, 40, 16, torch.bfloat16 if arrives == "cast" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=arrives == "autocast"):
        ours, theirs = chunked_cross_entropy(*given), plain(*given)
    truth = plain(*exact)
    assert ours.dtype == torch.float32
    grads = [torch.autograd.grad(value, t[:2]) for value, t in ((ours, given), (theirs, given), (truth, exact))]
    for our, their, true in zip(*grads, strict=True):
        assert our.dtype == given[0].dtype
        assert (our - true).norm() < 1.2 * (their - true).norm()
    assert abs(ours - truth) < 1e-2 * truth


BUGS = {
    "one-hot left out": lambda tile, place, weight: tile,
    "label of the next token": lambda tile, place, weight: tile.scatter_add_(1, place.roll(1, 0), weight),
    "weight left out of the label": lambda tile, place, weight: tile.scatter_add_(1, place, -torch.ones_like(weight)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_sees_planted_bug(bug: str) -> None:
    tensors = inputs(2, 9, 19, 5)

    class Plant(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.scatter_add_.default:
                tile, _, place, weight = args
                return BUGS[bug](tile, place, weight)
            return func(*args, **(kwargs or {}))

    with Plant():
        ours = chunked_cross_entropy(*tensors, chunk=4)
    assert worst(ours, plain(*tensors), tensors[:2]) > 1e-3


class Largest(TorchDispatchMode):
    """The most bytes that one operation's result takes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [300, 20_000, 131_072])
def test_no_tensor_is_as_large_as_the_logits(vocabulary: int, dtype: torch.dtype) -> None:
    """Nothing is larger than a tile (16 MiB, or 128 tokens) or the weight's gradient."""
    hidden_BLD, weight_VD = torch.zeros(2, 512, 4, dtype=dtype), torch.zeros(vocabulary, 4, dtype=dtype)
    labels_BL, weight_BL = torch.zeros(2, 512, dtype=torch.long), torch.ones(2, 512)
    with Largest() as largest:
        chunked_cross_entropy(hidden_BLD.requires_grad_(), weight_VD.requires_grad_(), labels_BL, weight_BL).backward()
    assert largest.bytes <= max(16 << 20, 128 * vocabulary * 4, vocabulary * 4 * 4)


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_is_a_quarter_of_plain() -> None:
    """Vocabulary 131,072 × 4096 tokens, width 256, each in its own process. Plain takes above 4 GiB."""
    command = [sys.executable, "-m", "tests.ops.peak"]
    peak = {
        which: float(subprocess.run([*command, which, "131072", "4096", "256"], check=True, capture_output=True).stdout)
        for which in ("plain", "chunked")
    }
    assert peak["plain"] > 4096
    assert peak["chunked"] <= peak["plain"] / 4
